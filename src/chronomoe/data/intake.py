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
    as_numbers,
    as_timestamps,
    check_columns,
    check_finite,
    check_increasing,
    check_known,
    check_names,
    listed,
    refuse_text,
    report_dropped,
    similar,
    with_values,
)
from chronomoe.data.frequency import Clock, Rows, check_regular, find_clock, infer_offset, later, parse_freq, same_step
from chronomoe.data.series import ITEM_ID, TARGET, TIMESTAMP
from chronomoe.data.table import Facts, Layout, SeriesTable, is_list, numbers_of
from chronomoe.errors import InputError

DATE = "date"
"""What wide files of the long-horizon benchmarks call ``timestamp``."""
ONLY_ITEM = "series"
"""The ``item_id`` of a frame that has a target column and no ``item_id``."""
ID = "id"
"""What fev and Chronos call ``item_id`` in their data sets."""
START, FREQ = "start", "freq"
_BATCH_BYTES = 1 << 26
_NAMELESS = r"Unnamed: \d+(_level_\d+)?(\.\d+)?|__index_level_\d+__|\s*"


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
        targets = (target,) if isinstance(target, str) else tuple(target)
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


def frame_to_series(
    frame: pd.DataFrame,
    *,
    target: str | Sequence[str] = TARGET,
    known_covariates: Sequence[str] = (),
    freq: str | None = None,
) -> SeriesTable:
    """Check a frame and return its series, in order of first appearance.

    A long frame has ``item_id``, ``timestamp``, the target and any number of covariate columns, all numbers; without
    ``item_id`` it is one series. A wide frame (see ``is_wide``) has one univariate series in each column. Missing
    values stay NaN. Series without any target value are dropped with a warning. Columns without a name, such as row
    numbers that pandas or R wrote, are no data.

    Args:
        frame: Long or wide, its rows in any order.
        target: Column to forecast, or several for multivariate series.
        known_covariates: Columns whose future is known at forecast time; all others besides the target are past-only.
        freq: Pandas alias of one step; inferred when None.

    Raises:
        InputError: columns are missing or hold anything but numbers, a value is infinite, timestamps are duplicated
            or irregular, or there is nothing in it.
    """
    wish = Wish.of(target, known_covariates, freq)
    return take_in([frame_to_rows(frame, wish)], wish)


def is_wide(frame: pd.DataFrame) -> bool:
    """Return whether a frame has one column for each series: a time column, but no ``item_id`` and no ``target``."""
    names = set(map(str, frame.columns))
    return bool(names & {TIMESTAMP, DATE}) and not names & {ITEM_ID, TARGET}


def to_long(frame: pd.DataFrame, target: Sequence[str] = (TARGET,)) -> pd.DataFrame:
    """Return a long frame with times parsed: a wide one is turned, and ``item_id`` is added to a frame of one series.

    Raises:
        InputError: columns are missing or misnamed, or hold no times.
    """
    frame = tidy(frame)
    if tuple(target) == (TARGET,) and is_wide(frame):
        time, names = _wide_columns(frame)
        times = as_timestamps(frame[time])
        return pd.DataFrame(
            {
                ITEM_ID: np.repeat(np.array(names, dtype=object), len(frame)),
                TIMESTAMP: times[np.tile(np.arange(len(times)), len(names))],
                TARGET: np.concatenate([as_numbers(frame[name]) for name in names]),
            }
        )
    if ITEM_ID not in frame:
        if similar(ITEM_ID, frame.columns):
            check_columns([ITEM_ID], list(frame.columns))
        frame = frame.rename(columns={} if TIMESTAMP in frame else {DATE: TIMESTAMP})
        check_columns([TIMESTAMP, *target], list(frame.columns))
        frame = frame.assign(**{ITEM_ID: ONLY_ITEM})
    check_columns([ITEM_ID, TIMESTAMP, *target], list(frame.columns))
    return frame.assign(**{TIMESTAMP: as_timestamps(frame[TIMESTAMP])})


def frame_to_rows(frame: pd.DataFrame, wish: Wish) -> pa.Table:
    """Return a long or wide frame as an Arrow table with one row a series.

    Raises:
        InputError: columns are missing, hold no numbers or no times, or a row names no item.
    """
    frame = tidy(frame)
    if wish.target == (TARGET,) and is_wide(frame) and wish.known:
        raise InputError(
            f"a wide frame has no covariates, got known_covariates {listed(wish.known)}; "
            "name the target column with target=, then the others are covariates"
        )
    frame = to_long(frame, wish.target)
    names = [name for name in frame.columns if name not in {ITEM_ID, TIMESTAMP}]
    check_known(wish.known, [name for name in names if name not in wish.target])
    codes, item_ids = item_codes(frame[ITEM_ID])
    order = np.lexsort([frame[TIMESTAMP].array.asi8, codes])
    bounds = pa.array(np.concatenate([[0], np.cumsum(np.bincount(codes))]), type=pa.int64())
    columns = [pa.array(item_ids, type=pa.string())]
    for name in (TIMESTAMP, *names):
        values = frame[name].take(order) if name == TIMESTAMP else as_numbers(frame[name])[order]
        array = pa.Array.from_pandas(values) if name == TIMESTAMP else pa.array(values)
        columns.append(pa.LargeListArray.from_arrays(bounds, array))
    return pa.table(columns, names=[ITEM_ID, TIMESTAMP, *names])


def item_codes(column: pd.Series) -> tuple[NDArray[np.int64], list[str]]:
    """Number the items of a column in order of first appearance, whatever its type, and return their names.

    Raises:
        InputError: a row names no item, or numbers and names are mixed.
    """
    codes, uniques = pd.factorize(column)
    item_ids = [str(item_id) for item_id in uniques]
    nameless = codes == (item_ids.index("") if "" in item_ids else -1)
    if nameless.any():
        row = int(np.flatnonzero(nameless)[0])
        raise InputError(f"column {column.name!r} must name an item in every row, row {row} (counted from 0) is empty")
    if len(set(item_ids)) < len(item_ids):
        raise InputError(f"column {column.name!r} must hold names or numbers, not both")
    return codes, item_ids


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the frame with named index levels as columns, all names as text, and no column that has none.

    Raises:
        InputError: it is empty, or a name is used twice.
    """
    if set(frame.index.names) & {ITEM_ID, TIMESTAMP, DATE}:
        frame = frame.reset_index()
    if frame.empty:
        raise InputError(f"the frame is empty, it has {len(frame)} rows and {len(frame.columns)} columns")
    frame = frame.set_axis([str(name) for name in frame.columns], axis="columns")
    frame = frame.loc[:, ~frame.columns.str.fullmatch(_NAMELESS)]
    check_names(list(frame.columns))
    return frame


def _wide_columns(frame: pd.DataFrame) -> tuple[str, list[str]]:
    """Return the time column and the series columns of a wide frame."""
    if similar(ITEM_ID, frame.columns):  # a long frame with misnamed columns
        check_columns([ITEM_ID], list(frame.columns))
    time = TIMESTAMP if TIMESTAMP in frame else DATE
    names = [name for name in frame.columns if name != time]
    if not names:
        raise InputError(f"a wide frame needs a column of values beside {time!r}, got none")
    return time, names
