"""Series of a data set in Arrow tables of one row a series, in memory or mapped from a disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, overload

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from chronomoe.data.frequency import Clock, alias_from, later, parse_freq, same_step
from chronomoe.data.series import Series
from chronomoe.errors import InputError


class Layout(NamedTuple):
    """What all series of a data set have in common."""

    target: tuple[str, ...]
    """Columns of the target: one for each variate, or a single one of lists of lists."""
    names: tuple[str, ...]
    """Names of the variates."""
    covariates: tuple[str, ...]
    known: tuple[str, ...]
    freq: str
    """Pandas alias of the step; weeks may start on other days."""
    clock: Clock = Clock()
    """How times with a zone were counted."""

    def check_same(self, other: "Layout", *, one: str, another: str) -> None:
        """Check that another data set has the same variates, covariates and step.

        Raises:
            InputError: it differs; the message names both.
        """
        for what, mine, theirs in (
            ("variates", list(self.names), list(other.names)),
            ("covariates", sorted(self.covariates), sorted(other.covariates)),
            ("known covariates", sorted(self.known), sorted(other.known)),
        ):
            if mine != theirs:
                raise InputError(
                    f"series that belong together must have the same {what}: {one} has {mine or 'none'}, "
                    f"{another} has {theirs or 'none'}; make them data sets of their own"
                )
        if not same_step(self.freq, other.freq):
            raise InputError(
                f"series that belong together must have the same step: that of {one} is {self.freq!r}, that of "
                f"{another} is {other.freq!r}; make them data sets of their own"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Facts:
    """What is known of each series without reading its values."""

    item_ids: list[str]
    starts: pd.DatetimeIndex
    lengths: NDArray[np.int64]
    part: NDArray[np.int64]
    """Which table it is in."""
    row: NDArray[np.int64]
    """Which row of it."""

    def take(self, places: NDArray[np.int64] | slice) -> "Facts":
        """Return the facts of some of the series."""
        numbers = np.arange(len(self.item_ids))[places]
        return Facts(
            item_ids=[self.item_ids[number] for number in numbers],
            starts=self.starts[numbers],
            lengths=self.lengths[numbers],
            part=self.part[numbers],
            row=self.row[numbers],
        )

    @staticmethod
    def join(parts: Sequence["Facts"]) -> "Facts":
        """Put facts one after the other; their tables are numbered already."""
        return Facts(
            item_ids=[name for part in parts for name in part.item_ids],
            starts=pd.DatetimeIndex(np.concatenate([part.starts.to_numpy() for part in parts])),
            lengths=np.concatenate([part.lengths for part in parts]),
            part=np.concatenate([part.part for part in parts]),
            row=np.concatenate([part.row for part in parts]),
        )


class SeriesTable(Sequence[Series]):
    """Checked series, whose values are read, without copies, when asked for."""

    def __init__(self, parts: Sequence[pa.Table | datasets.Dataset], facts: Facts, layout: Layout) -> None:
        self.parts, self.facts, self.layout = list(parts), facts, layout
        self._columns: dict[tuple[int, str], _Lists] = {}

    @staticmethod
    def join(tables: Mapping[str, "SeriesTable"]) -> "SeriesTable":
        """Put data sets one after the other; item ids become ``<name>/<item_id>``.

        Raises:
            InputError: they differ in variates, covariates or step.
        """
        names, found = list(tables), list(tables.values())
        facts = []
        before = 0
        for name, table in tables.items():
            found[0].layout.check_same(table.layout, one=repr(names[0]), another=repr(name))
            item_ids = [f"{name}/{item_id}" for item_id in table.facts.item_ids]
            facts.append(replace(table.facts, item_ids=item_ids, part=table.facts.part + before))
            before += len(table.parts)
        return SeriesTable([part for table in found for part in table.parts], Facts.join(facts), found[0].layout)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Steps of each series."""
        return self.facts.lengths

    def __len__(self) -> int:
        return len(self.facts.item_ids)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_columns": {}}

    @overload
    def __getitem__(self, index: int) -> Series: ...

    @overload
    def __getitem__(self, index: slice) -> "SeriesTable": ...

    def __getitem__(self, index: int | slice) -> "Series | SeriesTable":
        if isinstance(index, slice):
            return self.take(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"series {index} of {len(self)}")
        facts, layout = self.facts, self.layout
        start = facts.starts[index]
        target = [self._values(index, name) for name in layout.target]
        return Series(
            item_id=facts.item_ids[index],
            start=start,
            freq=alias_from(parse_freq(layout.freq), start),
            target=target[0].reshape(len(layout.names), -1) if len(target) == 1 else np.stack(target),
            target_names=layout.names,
            covariates={name: self._values(index, name) for name in layout.covariates},
            known=layout.known,
        )

    def take(self, places: NDArray[np.int64] | slice) -> "SeriesTable":
        """Return some of the series, in the order of ``places``."""
        return SeriesTable(self.parts, self.facts.take(places), self.layout)

    def horizon(self, steps: int) -> pd.DatetimeIndex:
        """Return the times of the steps that follow each series, as they are counted: all of the first one, and so on.

        Raises:
            InputError: one lies after the year 2262.
        """
        ahead = np.tile(np.arange(steps), len(self))
        offset = parse_freq(self.layout.freq)
        after = later(self.facts.starts, self.lengths, offset)
        return later(after.repeat(steps), ahead, offset)

    def _values(self, index: int, name: str) -> NDArray[np.floating[Any]]:
        key = (int(self.facts.part[index]), name)
        if key not in self._columns:
            part = self.parts[key[0]]
            table = part if isinstance(part, pa.Table) else part.data.table
            self._columns[key] = _Lists(table[name])
        return self._columns[key].read(int(self.facts.row[index]))


class _Lists:
    """A column of lists."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._stops = np.cumsum([len(chunk) for chunk in self._chunks])
        self._views = [_view(chunk) for chunk in self._chunks]

    def read(self, row: int) -> NDArray[np.floating[Any]]:
        number = int(np.searchsorted(self._stops, row, side="right"))
        place = row - int(self._stops[number]) + len(self._chunks[number])
        view = self._views[number]
        if view is None:
            return numbers_of(self._chunks[number][place].values)
        values, stops = view
        return values[stops[place] : stops[place + 1]]


def _view(chunk: pa.Array) -> tuple[NDArray[np.floating[Any]], NDArray[np.integer[Any]]] | None:
    """Return the values of lists of floats and where each list ends, without a copy; None where that takes one."""
    if not (pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type)) or chunk.null_count:
        return None
    values = chunk.values
    if not (pa.types.is_float32(values.type) or pa.types.is_float64(values.type)) or values.null_count:
        return None
    return values.to_numpy(), chunk.offsets.to_numpy()


def numbers_of(values: pa.Array | None) -> NDArray[np.floating[Any]]:
    """Return Arrow numbers, or lists of them, as one row of floats; NaN where missing."""
    if values is None:
        return np.empty(0, dtype=np.float32)
    while is_list(values.type):
        values = values.flatten()
    if not pa.types.is_float32(values.type):
        values = values.cast(pa.float64(), safe=False)
    return np.asarray(values.to_numpy(zero_copy_only=False))


def is_list(kind: pa.DataType) -> bool:
    """Return whether an Arrow type is a list of any kind."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def layout_of(series: Sequence[Series], *, name: str) -> Layout:
    """Return what the series of a domain have in common.

    Raises:
        InputError: they differ in variates, covariates or step.
    """
    if isinstance(series, SeriesTable):
        return series.layout
    layouts = [
        Layout(item.target_names, item.target_names, tuple(item.covariates), item.known, item.freq) for item in series
    ]
    for item, layout in zip(series, layouts, strict=True):
        layouts[0].check_same(layout, one=f"{series[0].item_id!r} of domain {name!r}", another=repr(item.item_id))
    return layouts[0]


def lengths_of(series: Sequence[Series]) -> NDArray[np.int64]:
    """Return the steps of each series, without reading values where it can."""
    return series.lengths if isinstance(series, SeriesTable) else np.array([len(item) for item in series])
