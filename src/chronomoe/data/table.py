"""Series of a data set in Arrow tables of one row a series, in memory or mapped from a disk."""

from collections.abc import Mapping, Sequence
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
        """Refuse another data set whose variates, covariates or step differ; the message names both."""
        for what, mine, theirs in (
            ("variates", list(self.names), list(other.names)),
            ("covariates", sorted(self.covariates), sorted(other.covariates)),
            ("known covariates", sorted(self.known), sorted(other.known)),
            ("step", self.freq, self.freq if same_step(self.freq, other.freq) else other.freq),
        ):
            if mine != theirs:
                raise InputError(
                    f"series that belong together must have the same {what}: {one} has {mine or 'none'}, "
                    f"{another} has {theirs or 'none'}; make them data sets of their own"
                )


class Facts(NamedTuple):
    """What is known of series without reading their values, an array each."""

    item_ids: NDArray[np.object_]
    starts: NDArray[np.datetime64]
    lengths: NDArray[np.int64]
    part: NDArray[np.int64]
    """Which table each is in."""
    row: NDArray[np.int64]
    """Which row of it."""

    def take(self, places: NDArray[np.int64] | slice) -> "Facts":
        """Return the facts of some of the series."""
        return Facts._make(column[places] for column in self)

    @staticmethod
    def join(parts: Sequence["Facts"]) -> "Facts":
        """Put facts one after the other; their tables are numbered already."""
        return Facts._make(np.concatenate(columns) for columns in zip(*parts, strict=True))


class SeriesTable(Sequence[Series]):
    """Checked series, whose values are read when asked for."""

    def __init__(self, parts: Sequence[pa.Table | datasets.Dataset], facts: Facts, layout: Layout) -> None:
        self.parts, self.facts, self.layout = list(parts), facts, layout

    @staticmethod
    def join(tables: Mapping[str, "SeriesTable"]) -> "SeriesTable":
        """Put data sets of one layout one after the other; item ids become ``<name>/<item_id>``."""
        (first, layout), *_ = ((name, table.layout) for name, table in tables.items())
        parts: list[pa.Table | datasets.Dataset] = []
        facts = []
        for name, table in tables.items():
            layout.check_same(table.layout, one=repr(first), another=repr(name))
            item_ids = np.array([f"{name}/{item_id}" for item_id in table.facts.item_ids], dtype=object)
            facts.append(table.facts._replace(item_ids=item_ids, part=table.facts.part + len(parts)))
            parts += table.parts
        return SeriesTable(parts, Facts.join(facts), layout)

    def __len__(self) -> int:
        return len(self.facts.item_ids)

    @overload
    def __getitem__(self, index: int) -> Series: ...

    @overload
    def __getitem__(self, index: slice) -> "SeriesTable": ...

    def __getitem__(self, index: int | slice) -> "Series | SeriesTable":
        if isinstance(index, slice):
            return self.take(index)
        facts, layout = self.facts, self.layout
        start = pd.Timestamp(facts.starts[index])  # the IndexError beyond the last one ends loops
        target, covariates = self.values(index)
        return Series(
            item_id=facts.item_ids[index],
            start=start,
            freq=alias_from(parse_freq(layout.freq), start),
            target=target,
            target_names=layout.names,
            covariates=covariates,
            known=layout.known,
        )

    def values(self, index: int) -> tuple[NDArray[np.floating[Any]], dict[str, NDArray[np.floating[Any]]]]:
        """Return the target, ``(variate, time)``, and the covariates of a series."""
        facts, layout = self.facts, self.layout
        part, row = self.parts[facts.part[index]], int(facts.row[index])
        table = part if isinstance(part, pa.Table) else part.data.table
        columns = {name: numbers_of(table[name][row].values) for name in (*layout.target, *layout.covariates)}
        target = [columns.pop(name) for name in layout.target]
        return target[0].reshape(len(layout.names), -1) if len(target) == 1 else np.stack(target), columns

    def take(self, places: NDArray[np.int64] | slice) -> "SeriesTable":
        """Return some of the series, in the order of ``places``."""
        return SeriesTable(self.parts, self.facts.take(places), self.layout)

    def horizon(self, steps: int) -> pd.DatetimeIndex:
        """Return the times of the steps that follow each series, as they are counted: all of the first one, then on."""
        offset = parse_freq(self.layout.freq)
        after = later(pd.DatetimeIndex(self.facts.starts), self.facts.lengths, offset)
        return later(after.repeat(steps), np.tile(np.arange(steps), len(self)), offset)


def numbers_of(values: pa.Array | None) -> NDArray[np.floating[Any]]:
    """Return Arrow numbers, or lists of them, as one row of floats; NaN where missing."""
    if values is None:
        return np.empty(0, dtype=np.float32)
    while is_list(values.type):
        values = values.flatten()
    if not (pa.types.is_float32(values.type) or pa.types.is_float64(values.type)):
        values = values.cast(pa.float64(), safe=False)
    return np.asarray(values.to_numpy(zero_copy_only=False))


def is_list(kind: pa.DataType) -> bool:
    """Return whether an Arrow type is a list of any kind."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def layout_of(series: Sequence[Series], *, name: str) -> Layout:
    """Return what the series of a domain have in common; refuse variates, covariates or steps that differ."""
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
    return series.facts.lengths if isinstance(series, SeriesTable) else np.array([len(item) for item in series])


def take(series: Sequence[Series], places: NDArray[np.int64]) -> Sequence[Series]:
    """Return some of the series, without reading values where it can."""
    return series.take(places) if isinstance(series, SeriesTable) else [series[place] for place in places]
