"""Intake: tables of one row a series, whatever they were read from, become checked series."""

import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from chronomoe.data.checks import as_timestamps, check_columns, check_finite, check_known, listed, refuse_text
from chronomoe.data.frequency import (
    Rows,
    check_increasing,
    check_regular,
    find_clock,
    infer_offset,
    later,
    parse_freq,
    same_step,
)
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
        """Read what a caller asks; refuse targets that are no columns of values."""
        targets = tuple(map(str, target if isinstance(target, list | tuple) else [target]))
        if not targets or len(set(targets)) < len(targets) or {ITEM_ID, TIMESTAMP} & set(targets):
            raise InputError(f"target must be one or more different value columns, got {listed(targets) or 'none'}")
        return cls(targets, tuple(known), freq, trusted)


class Intake:
    """Checks tables of one row a series, one after the other, as the parts of one data set.

    Columns: ``item_id`` or ``id`` (the row number without either); ``timestamp``, a list of times, or ``start`` and
    ``freq``; the target, a list of numbers or, for several variates, a list of such lists; other lists of numbers are
    covariates. Columns that are not lists say nothing about time and are ignored.

    Item ids that are known to be ``distinct`` are not kept, whose number may be large.
    """

    def __init__(self, wish: Wish, *, distinct: bool = False) -> None:
        self.wish, self.distinct = wish, distinct
        self.layout: Layout | None = None
        self.total = 0
        self.dropped: list[str] = []
        self._seen: set[str] = set()

    def check(self, table: pa.Table, *, part: int = 0, first: int = 0) -> Facts:
        """Check rows, the ``first`` and following ones of a ``part``, and return what is known of those with a value.

        Raises:
            InputError: a list is shorter than the times of its row, a value is infinite, times are unsorted,
                duplicated or irregular, an item id stands twice.
        """
        item_ids = self._item_ids(table)
        variates, covariates = _lists(table, self.wish.target, item_ids)
        rows, freq = self._rows(table, item_ids, steps=_lengths(next(iter(variates.values()))))
        if self.layout is None:
            self.layout = self._layout(rows, freq, tuple(variates), tuple(covariates))
        layout, trusted = self.layout, self.wish.trusted
        if (*variates, *sorted(covariates)) != (*layout.names, *sorted(layout.covariates)):
            raise InputError(
                f"every part of a table must have the columns of the first one, which are "
                f"{listed([*layout.names, *layout.covariates])}, got {listed([*variates, *covariates])}"
            )
        rows = rows._replace(timestamps=layout.clock.read(rows.timestamps))
        if TIMESTAMP in table.column_names and not trusted:
            check_increasing(rows)
            check_regular(rows, parse_freq(layout.freq), given=self.wish.freq is not None)
        observed = np.full(len(rows.timestamps), trusted)
        for name, column in (variates | covariates).items():
            _check_lengths(name, _lengths(column), rows)
            if not trusted:
                values = numbers_of(_flat(column))
                check_finite(name, values, rows)
                if name in variates:
                    observed |= ~np.isnan(values)
        lengths, times = np.diff(rows.bounds), rows.timestamps.to_numpy()
        empty = np.full(len(item_ids), np.datetime64("NaT"), dtype=times.dtype)
        facts = Facts(
            item_ids=np.array(item_ids, dtype=object),
            starts=times[np.minimum(rows.bounds[:-1], len(times) - 1)] if len(times) else empty,
            lengths=lengths,
            part=np.full(len(item_ids), part),
            row=first + np.arange(len(item_ids)),
        )
        kept = np.bincount(rows.item()[observed], minlength=len(item_ids)) > 0
        self.total += len(item_ids)
        self.dropped += facts.item_ids[~kept].tolist()
        return facts.take(np.flatnonzero(kept))

    def report(self) -> Layout:
        """Warn about series that were left out because they have no value; refuse a data set without any."""
        if self.layout is None:
            raise InputError("the data set is empty, it has no rows")
        if len(self.dropped) == self.total:
            raise InputError(f"at least one series must have a target value, all {self.total} hold only missing values")
        if self.dropped:
            warnings.warn(
                f"dropped {len(self.dropped)} of {self.total} series, their target holds only missing values: "
                f"{listed(self.dropped)}",
                stacklevel=3,
            )
        return self.layout

    def _layout(self, rows: Rows, freq: str | None, names: tuple[str, ...], covariates: tuple[str, ...]) -> Layout:
        check_known(self.wish.known, covariates)
        clock = find_clock(rows, freq)
        if freq is None:
            rows = rows._replace(timestamps=clock.read(rows.timestamps))
            if not self.wish.trusted:
                check_increasing(rows)
        offset = infer_offset(rows) if freq is None else parse_freq(freq)
        return Layout(self.wish.target, names, covariates, self.wish.known, str(offset.freqstr), clock)

    def _rows(self, table: pa.Table, item_ids: list[str], *, steps: NDArray[np.int64]) -> tuple[Rows, str | None]:
        """Return the times of all rows, as listed or ``steps`` of them from each start, and the step where stated."""
        freq = self.wish.freq
        if TIMESTAMP in table.column_names:
            bounds = np.concatenate([[0], np.cumsum(_lengths(table[TIMESTAMP]))])
            times = _flat(table[TIMESTAMP]).to_pandas().rename(TIMESTAMP)
            return Rows(item_ids, as_timestamps(times) if len(times) else pd.DatetimeIndex([]), bounds), freq
        if freq is None:
            if FREQ not in table.column_names:
                raise InputError(f"rows with a {START!r} say nothing of the step; pass freq=, for example freq='h'")
            aliases = table[FREQ].unique().to_pylist()
            freq = aliases[0] if self.layout is None else self.layout.freq
            other = next((alias for alias in aliases if not same_step(alias, freq)), None)
            if other is not None:
                raise InputError(f"all series must have the same step, got {freq!r} and {other!r}; pass freq=")
        bounds = np.concatenate([[0], np.cumsum(steps)])
        ahead = np.arange(bounds[-1]) - bounds[:-1].repeat(steps)
        starts = pd.DatetimeIndex(table[START].to_numpy()).repeat(steps)
        return Rows(item_ids, later(starts, ahead, parse_freq(freq)), bounds), freq

    def _item_ids(self, table: pa.Table) -> list[str]:
        name = next((name for name in (ITEM_ID, ID) if name in table.column_names), None)
        found = list(range(self.total, self.total + len(table))) if name is None else table[name].to_pylist()
        if None in found:
            raise InputError(
                f"column {name!r} must name an item in every row, row {self.total + found.index(None)} is empty"
            )
        item_ids = [str(item_id) for item_id in found]
        for item_id in () if self.distinct else item_ids:
            if item_id in self._seen:
                raise InputError(f"every series needs an item id of its own, got {item_id!r} again")
            self._seen.add(item_id)
        return item_ids


def _lists(
    table: pa.Table, target: tuple[str, ...], item_ids: list[str]
) -> tuple[dict[str, pa.ChunkedArray], dict[str, pa.ChunkedArray]]:
    """Return the lists of numbers of a table: those of each variate, then those of each covariate."""
    kinds = {name: table.schema.field(name).type for name in table.column_names if name not in {ITEM_ID, ID}}
    lists = {name: table[name] for name, kind in kinds.items() if is_list(kind)}
    if START not in kinds or TIMESTAMP in kinds:
        check_columns([TIMESTAMP], list(lists))
        del lists[TIMESTAMP]
    check_columns(target, list(lists))
    variates = {name: lists.pop(name) for name in target}
    if len(target) == 1 and is_list(kinds[target[0]].value_type):
        variates = _taken_apart(target[0], variates[target[0]], item_ids)
    for name, column in (variates | lists).items():
        kind = column.type.value_type
        number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
        if not (number or pa.types.is_boolean(kind) or pa.types.is_null(kind)):
            raise refuse_text(name, f"values of type {kind}")
    return variates, lists


def _taken_apart(name: str, column: pa.ChunkedArray, item_ids: list[str]) -> dict[str, pa.ChunkedArray]:
    """Return the lists of each variate of a column of lists of lists."""
    counts = _lengths(column)
    most = max(1, counts[0])
    wrong = np.flatnonzero(counts != most)
    if len(wrong):
        raise InputError(
            f"every row of {name!r} must have the first one's {most} variates, "
            f"got {counts[wrong[0]]} for item {item_ids[wrong[0]]!r}"
        )
    names = [name] if most == 1 else [f"{name}_{variate}" for variate in range(most)]
    return {name: pc.list_element(column, variate) for variate, name in enumerate(names)}


def _check_lengths(name: str, lengths: NDArray[np.int64], rows: Rows) -> None:
    steps = np.diff(rows.bounds)
    wrong = np.flatnonzero(lengths != steps)
    if len(wrong):
        raise InputError(
            f"every list of a row must be as long as its {TIMESTAMP!r}, got {lengths[wrong[0]]} values of "
            f"{name!r} for {steps[wrong[0]]} times of item {rows.item_ids[wrong[0]]!r}"
        )


def _lengths(column: pa.ChunkedArray) -> NDArray[np.int64]:
    return np.asarray(pc.fill_null(pc.list_value_length(column), 0).to_numpy(), dtype=np.int64)


def _flat(column: pa.ChunkedArray) -> pa.Array:
    flat = column.combine_chunks()
    return (flat.combine_chunks() if isinstance(flat, pa.ChunkedArray) else flat).flatten()


def take_in(tables: Iterable[pa.Table], wish: Wish) -> SeriesTable:
    """Check tables of one row a series that fit into memory."""
    intake, parts = Intake(wish), list(tables)
    facts = [intake.check(table, part=number) for number, table in enumerate(parts)]
    layout = intake.report()
    return SeriesTable(parts, Facts.join(facts), layout)


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
    intake, table = Intake(Wish.of(target, known_covariates, freq)), dataset.data.table
    size = max(1, int(_BATCH_BYTES * len(table) / max(1, table.nbytes)))
    facts = [intake.check(table.slice(first, size), first=first) for first in range(0, len(table), size)]
    layout = intake.report()
    return SeriesTable([dataset], Facts.join(facts), layout)
