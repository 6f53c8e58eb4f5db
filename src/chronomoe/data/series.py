"""One series, and the names that its columns have in frames and files."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

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
