"""Intake: a frame or a table of lists becomes checked series, one Arrow row each."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from chronomoe.data.checks import (
    as_timestamps,
    check_columns,
    check_finite,
    check_increasing,
    check_known,
    listed,
    refuse_text,
    report_dropped,
    with_values,
)
from chronomoe.data.frequency import Clock, Rows, check_regular, find_clock, infer_offset, later, parse_freq, same_step
from chronomoe.data.series import ITEM_ID, TARGET, TIMESTAMP
from chronomoe.data.table import Facts, Layout, SeriesTable, is_list, numbers_of
from chronomoe.errors import InputError

ID = "id"
"""What fev and Chronos call ``item_id`` in their data sets."""
START, FREQ = "start", "freq"
_BATCH_BYTES = 1 << 26


class Wish(NamedTuple):
    """What is asked of a data set."""

    target: tuple[str, ...] = (TARGET,)
    """Column to forecast, or several for multivariate series."""
    known: tuple[str, ...] = ()
    """Columns whose future is known at forecast time."""
    freq: str | None = None
    """Pandas alias of one step; inferred when None."""
    trusted: bool = False
    """Skip the checks of values and times, and keep series without any value: for callers that have checked."""

    @classmethod
    def of(
        cls, target: str | Sequence[str], known: Sequence[str], freq: str | None, *, trusted: bool = False
    ) -> "Wish":
        """Read what a caller asks.

        Raises:
            InputError: the target names no columns, or other ones than values.
        """
        targets = tuple(map(str, target if isinstance(target, list | tuple) else [target]))
        if not targets or len(set(targets)) < len(targets) or {ITEM_ID, TIMESTAMP} & set(targets):
            raise InputError(f"target must be one or more different value columns, got {listed(targets) or 'none'}")
        return cls(targets, tuple(known), freq, trusted)


class Intake:
    """Checks tables of one row a series, one after the other, as the parts of one data set.

    Columns: ``item_id`` or ``id`` (the row number without either); ``timestamp``, a list of times, or ``start`` and
    ``freq``; the target, a list of numbers or, for several variates, a list of such lists; other lists of numbers are
    covariates. Columns that are not lists say nothing about time and are ignored.
    """

    def __init__(self, wish: Wish, *, again: str = "every series needs an item id of its own, got {!r} again") -> None:
        self.wish, self._again = wish, again
        self.layout: Layout | None = None
        self.total = 0
        self.dropped: list[str] = []
        self._seen: set[str] = set()

    def check(self, table: pa.Table, *, part: int = 0, first: int = 0) -> Facts:
        """Check rows and return what is known of those that have a target value.

        Args:
            table: one row a series.
            part: number of the table that they belong to.
            first: number of the first of them in it.

        Raises:
            InputError: a list is shorter than the times of its row, a value is infinite, times are unsorted,
                duplicated or irregular, an item id stands twice.
        """
        item_ids = self._item_ids(table)
        if self.layout is None:
            self.layout = self._layout(table, item_ids)
        layout, offset = self.layout, parse_freq(self.layout.freq)
        if TIMESTAMP in table.column_names:
            rows = _times(table, item_ids)
            rows = rows._replace(timestamps=layout.clock.read(rows.timestamps))
            if not self.wish.trusted:
                check_increasing(rows)
                check_regular(rows, offset, given=self.wish.freq is not None)
            lengths = np.diff(rows.bounds)
            starts = rows.timestamps[np.minimum(rows.bounds[:-1], max(0, len(rows.timestamps) - 1))]
        else:
            aliases = table[FREQ].unique().to_pylist()
            other = next((alias for alias in aliases if not same_step(alias, layout.freq)), None)
            if other is not None:
                raise InputError(f"all series must have the same step, got {layout.freq!r} and {other!r}; pass freq=")
            starts = pd.DatetimeIndex(table[START].to_numpy())
            lengths = _lengths(table, layout.target[0])
            bounds = np.concatenate([[0], np.cumsum(lengths)])
            steps = np.arange(bounds[-1]) - bounds[:-1].repeat(lengths)
            rows = Rows(item_ids, later(starts.repeat(lengths), steps, offset), bounds)
        _check_lengths(table, rows, layout)
        kept = np.arange(len(item_ids))
        if not self.wish.trusted:
            target = _target(table, lengths, layout)
            for name, values in zip(layout.names, target, strict=True):
                check_finite(name, values, rows)
            for name in layout.covariates:
                check_finite(name, numbers_of(_flat(table, name)), rows)
            kept = with_values(target, rows)
            self.dropped += [item_ids[row] for row in np.setdiff1d(np.arange(len(item_ids)), kept)]
        self.total += len(item_ids)
        return Facts(
            item_ids=item_ids,
            starts=starts,
            lengths=lengths,
            part=np.full(len(item_ids), part),
            row=first + np.arange(len(item_ids)),
        ).take(kept)

    def report(self) -> None:
        """Say which series had no value.

        Raises:
            InputError: none had one, or there were no series.
        """
        if self.total == 0:
            raise InputError("the data set is empty, it has no rows")
        report_dropped(self.dropped, self.total)

    def finish(self, parts: Sequence[pa.Table | datasets.Dataset], facts: Sequence[Facts]) -> SeriesTable:
        """Return the series of all tables that were checked.

        Raises:
            InputError: there are none.
        """
        self.report()
        if self.layout is None:
            raise InputError("the data set is empty, it has no rows")
        return SeriesTable(parts, Facts.join(facts), self.layout)

    def _layout(self, table: pa.Table, item_ids: list[str]) -> Layout:
        target, known, freq, _ = self.wish
        names = table.column_names
        lists = [name for name in names if is_list(table.schema.field(name).type) and name not in {ITEM_ID, ID}]
        if START not in names or TIMESTAMP in names:
            check_columns([TIMESTAMP], lists)
        values = [name for name in lists if name != TIMESTAMP]
        check_columns(target, values)
        covariates = tuple(name for name in values if name not in target)
        check_known(known, covariates)
        variates = target
        for name in values:
            inner = _inner(table, name)
            if target == (name,) and is_list(inner):
                inner = inner.value_type
                count = int(_lengths(table.slice(0, 1), name)[0])
                variates = (name,) if count < 2 else tuple(f"{name}_{variate}" for variate in range(count))
            number = pa.types.is_integer(inner) or pa.types.is_floating(inner) or pa.types.is_decimal(inner)
            if not (number or pa.types.is_boolean(inner) or pa.types.is_null(inner)):
                raise refuse_text(name, f"values of type {inner}")
        clock = Clock()
        if TIMESTAMP in names:
            rows = _times(table, item_ids)
            clock = find_clock(rows, freq)
            rows = rows._replace(timestamps=clock.read(rows.timestamps))
            if freq is None:
                if not self.wish.trusted:
                    check_increasing(rows)
                freq = str(infer_offset(rows).freqstr)
        else:
            freq = freq or table[FREQ][0].as_py()
        return Layout(target, variates, covariates, known, str(parse_freq(freq).freqstr), clock)

    def _item_ids(self, table: pa.Table) -> list[str]:
        name = next((name for name in (ITEM_ID, ID) if name in table.column_names), None)
        if name is None:
            found = [str(self.total + row) for row in range(len(table))]
        else:
            item_ids = table[name].to_pylist()
            if None in item_ids:
                raise InputError(
                    f"column {name!r} must name an item in every row, row {self.total + item_ids.index(None)} is empty"
                )
            found = [str(item_id) for item_id in item_ids]
        for item_id in found:
            if item_id in self._seen:
                raise InputError(self._again.format(item_id))
            self._seen.add(item_id)
        return found


def _target(table: pa.Table, lengths: NDArray[np.int64], layout: Layout) -> NDArray[np.floating[Any]]:
    """Return the target of all rows of a table, one after the other: ``(variate, time)``."""
    flat = [numbers_of(_flat(table, name)) for name in layout.target]
    count = len(layout.names)
    if len(flat) == count:
        return np.stack(flat)
    parts = np.split(flat[0], np.cumsum(lengths)[:-1] * count)
    return np.concatenate([part.reshape(count, -1) for part in parts], axis=1)


def _check_lengths(table: pa.Table, rows: Rows, layout: Layout) -> None:
    """Check that every list of a row is as long as its times."""
    steps, count = np.diff(rows.bounds), len(layout.names)
    for name in (*layout.target, *layout.covariates):
        lengths, wanted, items = _lengths(table, name), steps, rows.item_ids
        if is_list(_inner(table, name)):
            wrong = np.flatnonzero(lengths != count)
            if len(wrong):
                raise InputError(
                    f"every row of {name!r} must have the first one's {count} variates, "
                    f"got {lengths[wrong[0]]} for item {items[wrong[0]]!r}"
                )
            items = [item_id for item_id in items for _ in range(count)]
            wanted = np.repeat(steps, count)
            lengths = pc.fill_null(pc.list_value_length(_flat(table, name)), 0).to_numpy()
        wrong = np.flatnonzero(lengths != wanted)
        if len(wrong):
            raise InputError(
                f"every list of a row must be as long as its {TIMESTAMP!r}, got {lengths[wrong[0]]} values of "
                f"{name!r} for {wanted[wrong[0]]} times of item {items[wrong[0]]!r}"
            )


def _inner(table: pa.Table, name: str) -> pa.DataType:
    return table.schema.field(name).type.value_type


def _times(table: pa.Table, item_ids: list[str]) -> Rows:
    bounds = np.concatenate([[0], np.cumsum(_lengths(table, TIMESTAMP))])
    times = _flat(table, TIMESTAMP).to_pandas().rename(TIMESTAMP)
    return Rows(item_ids, as_timestamps(times) if len(times) else pd.DatetimeIndex([]), bounds)


def _lengths(table: pa.Table, name: str) -> NDArray[np.int64]:
    return np.asarray(pc.fill_null(pc.list_value_length(table[name]), 0).to_numpy(), dtype=np.int64)


def _flat(table: pa.Table, name: str) -> pa.Array:
    column = table[name].combine_chunks()
    return (column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column).flatten()


def take_in(tables: Iterable[pa.Table], wish: Wish) -> SeriesTable:
    """Check tables of one row a series that fit into memory.

    Raises:
        InputError: they break a rule of ``Intake``.
    """
    intake = Intake(wish)
    parts = list(tables)
    return intake.finish(parts, [intake.check(table, part=number) for number, table in enumerate(parts)])


def dataset_to_series(
    dataset: datasets.Dataset,
    *,
    target: str | Sequence[str] = TARGET,
    known_covariates: Sequence[str] = (),
    freq: str | None = None,
) -> SeriesTable:
    """Check a `datasets.Dataset` with one row a series, as fev and Chronos have them; its values stay where they are.

    Raises:
        InputError: it breaks a rule of ``Intake``.
    """
    dataset = dataset.flatten_indices() if dataset._indices is not None else dataset
    intake = Intake(Wish.of(target, known_covariates, freq))
    table = dataset.data.table
    size = max(1, int(_BATCH_BYTES * len(table) / max(1, table.nbytes)))
    parts = range(0, len(table), size)
    return intake.finish([dataset], [intake.check(table.slice(first, size), first=first) for first in parts])
