"""Long and wide frames as Arrow tables of one row a series."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pyarrow as pa

from chronomoe.data.checks import as_numbers, as_timestamps, check_columns, check_known, check_names, listed, similar
from chronomoe.data.intake import Wish, take_in
from chronomoe.data.series import ITEM_ID, TARGET, TIMESTAMP
from chronomoe.data.table import SeriesTable
from chronomoe.errors import InputError

DATE = "date"
"""What wide files of the long-horizon benchmarks call ``timestamp``."""
ONLY_ITEM = "series"
"""The ``item_id`` of a frame that has a target column and no ``item_id``."""
_NAMELESS = r"Unnamed: \d+(_level_\d+)?(\.\d+)?|__index_level_\d+__|\s*"


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


def to_long(frame: pd.DataFrame, wish: Wish) -> pd.DataFrame:
    """Return a long frame with times parsed: a wide one is turned, a frame of one series gets its ``item_id``."""
    frame = tidy(frame)
    wide = wish.target == (TARGET,) and is_wide(frame)
    if wide and wish.known:
        raise InputError(
            f"a wide frame has no covariates, got known_covariates {listed(wish.known)}; "
            "name the target column with target=, then the others are covariates"
        )
    if ITEM_ID not in frame and similar(ITEM_ID, frame.columns):  # a long frame with misnamed columns
        check_columns([ITEM_ID], list(frame.columns))
    if wide:
        return _turned(frame)
    if ITEM_ID not in frame:
        frame = frame.rename(columns={} if TIMESTAMP in frame else {DATE: TIMESTAMP})
        check_columns([TIMESTAMP, *wish.target], list(frame.columns))
        frame = frame.assign(**{ITEM_ID: ONLY_ITEM})
    check_columns([ITEM_ID, TIMESTAMP, *wish.target], list(frame.columns))
    return frame.assign(**{TIMESTAMP: as_timestamps(frame[TIMESTAMP])})


def _turned(wide: pd.DataFrame) -> pd.DataFrame:
    time = TIMESTAMP if TIMESTAMP in wide else DATE
    names = [name for name in wide.columns if name != time]
    if not names:
        raise InputError(f"a wide frame needs a column of values beside {time!r}, got none")
    times = as_timestamps(wide[time])
    return pd.DataFrame(
        {
            ITEM_ID: np.repeat(np.array(names, dtype=object), len(wide)),
            TIMESTAMP: times[np.tile(np.arange(len(wide)), len(names))],
            TARGET: np.concatenate([as_numbers(wide[name]) for name in names]),
        }
    )


def frame_to_rows(frame: pd.DataFrame, wish: Wish) -> pa.Table:
    """Return a long or wide frame as an Arrow table with one row a series, in order of first appearance."""
    frame = to_long(frame, wish)
    names = [name for name in frame.columns if name not in {ITEM_ID, TIMESTAMP}]
    check_known(wish.known, [name for name in names if name not in wish.target])
    codes, uniques = pd.factorize(frame[ITEM_ID])
    item_ids = [str(item_id) for item_id in uniques]
    nameless = np.flatnonzero(codes == (item_ids.index("") if "" in item_ids else -1))
    if len(nameless):
        raise InputError(
            f"column {ITEM_ID!r} must name an item in every row, row {nameless[0]} (counted from 0) is empty"
        )
    if len(set(item_ids)) < len(item_ids):
        raise InputError(f"column {ITEM_ID!r} must hold names or numbers, not both")
    order = np.lexsort([frame[TIMESTAMP].array.asi8, codes])
    bounds = pa.array(np.concatenate([[0], np.cumsum(np.bincount(codes))]), type=pa.int64())
    columns = {TIMESTAMP: pa.Array.from_pandas(frame[TIMESTAMP].take(order))}
    columns |= {name: pa.array(as_numbers(frame[name])[order]) for name in names}
    lists = {name: pa.LargeListArray.from_arrays(bounds, values) for name, values in columns.items()}
    return pa.table({ITEM_ID: pa.array(item_ids, type=pa.string())} | lists)


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a frame with named index levels as columns, names as text, each once, and no column that has none."""
    if set(frame.index.names) & {ITEM_ID, TIMESTAMP, DATE}:
        frame = frame.reset_index()
    if frame.empty:
        raise InputError(f"the frame is empty, it has {len(frame)} rows and {len(frame.columns)} columns")
    frame = frame.set_axis([str(name) for name in frame.columns], axis="columns")
    frame = frame.loc[:, ~frame.columns.str.fullmatch(_NAMELESS)]
    check_names(list(frame.columns))
    return frame
