"""Long and wide frames to series."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
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
    report_dropped,
    similar,
    with_values,
)
from chronomoe.data.frequency import Rows, alias_from, check_regular, infer_offset, parse_freq
from chronomoe.data.series import ITEM_ID, TARGET, TIMESTAMP, Series
from chronomoe.errors import InputError

DATE = "date"
"""What wide files of the long-horizon benchmarks call ``timestamp``."""
ONLY_ITEM = "series"
"""The ``item_id`` of a frame that has a target column and no ``item_id``."""


def is_wide(frame: pd.DataFrame) -> bool:
    """Return whether a frame has one column for each series: a time column, but no ``item_id`` and no ``target``."""
    names = set(map(str, frame.columns))
    return bool(names & {TIMESTAMP, DATE}) and not names & {ITEM_ID, TARGET}


def wide_to_long(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the long frame of a wide one: every column but the time column (``timestamp`` or ``date``) is a series.

    Raises:
        InputError: not a wide frame, or a column does not hold numbers.
    """
    frame = _tidy(frame)
    time, names = _wide_columns(frame)
    values = [as_numbers(frame[name]) for name in names]
    timestamps = as_timestamps(frame[time])
    return pd.DataFrame(
        {
            ITEM_ID: np.repeat(np.array(names, dtype=object), len(frame)),
            TIMESTAMP: np.tile(timestamps.to_numpy(), len(names)),
            TARGET: np.concatenate(values),
        }
    )


def to_long(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a long frame with times parsed: a wide one is turned, and ``item_id`` is added to a frame of one series.

    Raises:
        InputError: columns are missing or misnamed, or hold no times.
    """
    frame = _tidy(frame)
    if is_wide(frame):
        return wide_to_long(frame)
    if ITEM_ID not in frame:
        frame = _only_item(frame, [TARGET])
    check_columns([ITEM_ID, TIMESTAMP], list(frame.columns))
    return frame.assign(**{TIMESTAMP: as_timestamps(frame[TIMESTAMP])})


def frame_to_series(
    frame: pd.DataFrame,
    *,
    target: str | Sequence[str] = TARGET,
    known_covariates: Sequence[str] = (),
    freq: str | None = None,
) -> list[Series]:
    """Check a frame and return its series, in order of first appearance.

    A long frame has ``item_id``, ``timestamp``, the target and any number of covariate columns, all numbers; without
    ``item_id`` it is one series. A wide frame (see ``is_wide``) has one univariate series in each column. Missing
    values stay NaN. Series without any target value are dropped with a warning.

    Args:
        frame: Long or wide; the rows of an item in order of time, those of several items may alternate.
        target: Column to forecast, or several for multivariate series.
        known_covariates: Columns whose future is known at forecast time; all others besides the target are past-only.
        freq: Pandas alias of one step; inferred when None.

    Raises:
        InputError: columns are missing or hold anything but numbers, a value is infinite, timestamps are unsorted,
            duplicated or irregular, or there is nothing in it.
    """
    frame = _tidy(frame)
    targets = (target,) if isinstance(target, str) else tuple(target)
    if targets == (TARGET,) and is_wide(frame):
        return _wide_series(frame, known_covariates, freq)
    if not targets or len(set(targets)) < len(targets) or {ITEM_ID, TIMESTAMP} & set(targets):
        raise InputError(f"target must be one or more different value columns, got {listed(targets) or 'none'}")
    if ITEM_ID not in frame:
        frame = _only_item(frame, targets)
    check_columns([ITEM_ID, TIMESTAMP, *targets], list(frame.columns))
    names = [name for name in frame.columns if name not in {ITEM_ID, TIMESTAMP, *targets}]
    check_known(known_covariates, names)

    rows, order = _grouped(frame)
    columns = {name: as_numbers(frame[name])[order] for name in (*targets, *names)}
    for name, values in columns.items():
        check_finite(name, values, rows)
    offset = _checked_offset(rows, freq)
    values = np.stack([columns[name] for name in targets])
    kept = with_values(values, rows)
    dropped = np.setdiff1d(np.arange(len(rows.item_ids)), kept)
    report_dropped([rows.item_ids[item] for item in dropped], len(rows.item_ids))
    series = []
    for item in kept:
        part = slice(rows.bounds[item], rows.bounds[item + 1])
        start = rows.timestamps[part.start]
        series.append(
            Series(
                item_id=rows.item_ids[item],
                start=start,
                freq=alias_from(offset, start),
                target=values[:, part],
                target_names=targets,
                covariates={name: columns[name][part] for name in names},
                known=tuple(known_covariates),
            )
        )
    return series


def _tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the frame with named index levels as columns and all names as text."""
    if set(frame.index.names) & {ITEM_ID, TIMESTAMP, DATE}:
        frame = frame.reset_index()
    if frame.empty:
        raise InputError(f"the frame is empty, it has {len(frame)} rows and {len(frame.columns)} columns")
    names = [str(name) for name in frame.columns]
    check_names(names)
    return frame.set_axis(names, axis="columns")


def _wide_columns(frame: pd.DataFrame) -> tuple[str, list[str]]:
    """Return the time column and the series columns of a wide frame."""
    if not is_wide(frame):
        check_columns([TIMESTAMP], list(frame.columns))
        raise InputError(f"a wide frame has no column {ITEM_ID!r} or {TARGET!r}, got {listed(frame.columns)}")
    if similar(ITEM_ID, frame.columns):  # a long frame with misnamed columns
        check_columns([ITEM_ID], list(frame.columns))
    time = TIMESTAMP if TIMESTAMP in frame else DATE
    names = [name for name in frame.columns if name != time]
    if not names:
        raise InputError(f"a wide frame needs a column of values beside {time!r}, got none")
    return time, names


def _only_item(frame: pd.DataFrame, targets: Sequence[str]) -> pd.DataFrame:
    """Return the frame of one series with the ``item_id`` it lacks; refuse it where another column seems to be that."""
    names = list(frame.columns)
    if similar(ITEM_ID, names):
        check_columns([ITEM_ID], names)
    if TIMESTAMP not in frame and DATE in frame:
        frame = frame.rename(columns={DATE: TIMESTAMP})
    check_columns([TIMESTAMP, *targets], list(frame.columns))
    return frame.assign(**{ITEM_ID: ONLY_ITEM})


def _grouped(frame: pd.DataFrame) -> tuple[Rows, NDArray[np.int64]]:
    """Return the checked timestamps, rows of an item together, and the order of frame rows that does it."""
    codes, uniques = pd.factorize(frame[ITEM_ID])
    item_ids = [str(item_id) for item_id in uniques]
    nameless = codes == (item_ids.index("") if "" in item_ids else -1)
    if nameless.any():
        row = int(np.flatnonzero(nameless)[0])
        raise InputError(f"column {ITEM_ID!r} must name an item in every row, row {row} (counted from 0) is empty")
    if len(set(item_ids)) < len(item_ids):
        raise InputError(f"column {ITEM_ID!r} must hold names or numbers, not both")
    order = np.argsort(codes, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(codes))])
    rows = Rows(item_ids, as_timestamps(frame[TIMESTAMP])[order], bounds)
    check_increasing(rows)
    return rows, order


def _checked_offset(rows: Rows, freq: str | None) -> pd.offsets.BaseOffset:
    offset = infer_offset(rows) if freq is None else parse_freq(freq)
    check_regular(rows, offset, given=freq is not None)
    return offset


def _wide_series(frame: pd.DataFrame, known_covariates: Sequence[str], freq: str | None) -> list[Series]:
    """Return one series for each column, without the copies a long frame would need."""
    if known_covariates:
        raise InputError(
            f"a wide frame has no covariates, got known_covariates {listed(known_covariates)}; "
            "name the target column with target=, then the others are covariates"
        )
    time, names = _wide_columns(frame)
    timestamps = as_timestamps(frame[time])
    rows = Rows(["(all columns)"], timestamps, np.array([0, len(frame)]))
    check_increasing(rows)
    offset = _checked_offset(rows, freq)
    alias = alias_from(offset, timestamps[0])
    series, dropped = [], []
    for name in names:
        values = as_numbers(frame[name])
        check_finite(name, values, Rows([name], timestamps, rows.bounds))
        if np.isnan(values).all():
            dropped.append(name)
            continue
        series.append(Series(item_id=name, start=timestamps[0], freq=alias, target=values[None]))
    report_dropped(dropped, len(names))
    return series
