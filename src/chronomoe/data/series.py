"""One series, and the names that its columns have in frames and files."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from chronomoe.data.frequency import parse_freq
from chronomoe.errors import InputError

ITEM_ID = "item_id"
TIMESTAMP = "timestamp"
TARGET = "target"


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """One series: evenly spaced values of one or more variates, oldest first, and its covariates."""

    item_id: str
    """Its name, unique within a data set."""
    start: pd.Timestamp
    """Time of the first value, without time zone."""
    freq: str
    """Pandas offset alias of one step, such as ``h``, ``15min``, ``B`` or ``MS``."""
    target: NDArray[np.floating[Any]]
    """Values, ``(variate, time)``; NaN is missing. A univariate series has one variate."""
    target_names: tuple[str, ...] = (TARGET,)
    """One name for each variate."""
    covariates: dict[str, NDArray[np.floating[Any]]] = field(default_factory=dict)
    """Name to values, ``(time,)``, over the same steps as the target."""
    known: tuple[str, ...] = ()
    """Covariates whose future is known at forecast time; the others are past-only."""

    def __post_init__(self) -> None:
        if self.target.ndim != 2 or len(self.target) != len(self.target_names):
            raise InputError(
                f"target must be (variate, time) with one variate for each of {list(self.target_names)}, "
                f"got shape {self.target.shape} for item {self.item_id!r}"
            )
        for name, values in self.covariates.items():
            if values.shape != (len(self),):
                raise InputError(
                    f"covariate {name!r} of item {self.item_id!r} must have the target's {len(self)} steps, "
                    f"got shape {values.shape}"
                )
        if unknown := set(self.known) - set(self.covariates):
            raise InputError(
                f"known covariates must be among {list(self.covariates)}, got {sorted(unknown)} "
                f"for item {self.item_id!r}"
            )

    def __len__(self) -> int:
        """Return the number of steps."""
        return int(self.target.shape[1])

    def timestamps(self) -> pd.DatetimeIndex:
        """Return the time of every step."""
        return pd.date_range(self.start, periods=len(self), freq=self.freq)

    def cut(self, start: int, stop: int) -> "Series":
        """Return rows ``start:stop`` (counted from 0) as a series that shares memory with this one.

        Raises:
            InputError: the rows do not lie within the series.
        """
        if not 0 <= start <= stop <= len(self):
            raise InputError(f"rows must lie within 0:{len(self)} of item {self.item_id!r}, got {start}:{stop}")
        return Series(
            item_id=self.item_id,
            start=self.start if start == 0 else self.start + start * parse_freq(self.freq),
            freq=self.freq,
            target=self.target[:, start:stop],
            target_names=self.target_names,
            covariates={name: values[start:stop] for name, values in self.covariates.items()},
            known=self.known,
        )


def series_to_frame(series: Sequence[Series]) -> pd.DataFrame:
    """Return one long frame: ``item_id``, ``timestamp``, a column for each variate and each covariate.

    A series that lacks a column of another one has NaN there.

    Raises:
        InputError: there are no series.
    """
    items = list(series)
    if not items:
        raise InputError("series_to_frame needs at least one series, got none")
    rows = [{**dict(zip(item.target_names, item.target, strict=True)), **item.covariates} for item in items]
    targets = dict.fromkeys(name for item in items for name in item.target_names)
    names = list(targets | dict.fromkeys(name for item in items for name in item.covariates))
    columns: dict[str, object] = {
        ITEM_ID: np.repeat(np.array([item.item_id for item in items], dtype=object), [len(item) for item in items]),
        TIMESTAMP: np.concatenate([item.timestamps().to_numpy() for item in items]),
    }
    for name in names:
        parts = [
            row[name] if name in row else np.full(len(item), np.nan, dtype=np.float32)
            for item, row in zip(items, rows, strict=True)
        ]
        columns[name] = np.concatenate(parts)
    return pd.DataFrame(columns)
