"""Frames to forecast, in the one form that every way in shares: plain ids, times without zone, float32 numbers.

Whoever calls ``predict_df`` gets what the command line gives, since both come through here.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.api import types

from chronomoe.data.checks import (
    Clock,
    as_doubles,
    check_columns,
    check_known,
    listed,
    read_times,
    refuse_text,
    report_dropped,
    similar,
)
from chronomoe.data.conversion import DATE, is_wide, tidy, wide_to_long
from chronomoe.data.frequency import Rows, check_regular, infer_offset, parse_freq
from chronomoe.data.series import ITEM_ID, TARGET, TIMESTAMP
from chronomoe.errors import InputError

MOST_LEVEL = 1e3
"""Levels above this many times the spread of a series lose digits in float32."""
SPREADS = (1e-6, 1e6)
"""Spreads whose squares float32 holds with room to spare."""


class ForecastFrames(NamedTuple):
    """What is forecast, and what is needed to write the answer as the caller wrote the question."""

    past: pd.DataFrame
    """Rows of an item together, items in order of appearance, each in order of time."""
    future: pd.DataFrame | None
    """The known covariates of the steps to forecast, in the same order."""
    times: pd.DatetimeIndex
    """Of the steps to forecast, item after item, on the caller's clock."""
    item_ids: NDArray[Any]
    """One an item."""
    level: NDArray[np.float64]
    """Taken off each item's targets before they became float32, ``(item, target)``."""
    unit: NDArray[np.float64]
    """Which each item's targets were divided by after that."""

    def answer(
        self,
        forecast: NDArray[np.float32],
        *,
        targets: Sequence[str],
        levels: Sequence[float],
        names: tuple[str, str] = (ITEM_ID, TIMESTAMP),
    ) -> pd.DataFrame:
        """Return a forecast as one long frame.

        Args:
            forecast: the median and the quantiles, ``(item, target, horizon, 1 + level)``.
            targets: the columns that are forecast.
            levels: the quantile levels.
            names: of the item and of the time.
        """
        items, variates, horizon, _ = forecast.shape
        values: NDArray[Any] = forecast
        if (self.level != 0).any() or (self.unit != 1).any():
            values = forecast.astype(np.float64) * self.unit[:, :, None, None] + self.level[:, :, None, None]
        step = np.arange(items * horizon).reshape(items, 1, horizon).repeat(variates, axis=1).ravel()
        columns: dict[str, Any] = {
            names[0]: np.repeat(self.item_ids, variates * horizon),
            names[1]: self.times[step],
            "target_name": np.tile(np.repeat(np.array(targets, dtype=object), horizon), items),
        }
        columns |= dict(zip(["predictions", *map(str, levels)], values.reshape(len(step), -1).T, strict=True))
        return pd.DataFrame(columns)


def frames_to_forecast(
    past: pd.DataFrame,
    future: pd.DataFrame | None,
    *,
    targets: Sequence[str] = (TARGET,),
    horizon: int,
    freq: str | None = None,
    id_column: str = ITEM_ID,
    timestamp_column: str = TIMESTAMP,
    strict: bool = False,
) -> ForecastFrames:
    """Check frames and bring them into the one form.

    Ids may be text, numbers or categories; a past of one series needs none. Times may carry a zone. Booleans are 0 and
    1; columns of text stay categories. A series of large or small values, or of small changes on a high level, is
    shifted and scaled, which changes no forecast, before float32 takes its digits.

    Args:
        past: long or wide, see ``frame_to_series``; rows may come in any order.
        future: ``horizon`` rows an item of covariates that are columns of ``past``, too.
        targets: columns to forecast.
        horizon: steps to forecast.
        freq: pandas alias of one step; inferred when None.
        id_column: what the caller calls ``item_id``.
        timestamp_column: what the caller calls ``timestamp``.
        strict: check that times follow a ``freq`` that is given, and leave out items without any value, with a warning.

    Raises:
        InputError: a frame breaks a rule; the message names it.
    """
    past = _named(past, id_column, timestamp_column)
    if list(targets) == [TARGET] and is_wide(past):
        past = wide_to_long(past)
    past, future = _with_ids(past, None if future is None else _named(future, id_column, timestamp_column))
    check_columns([ITEM_ID, TIMESTAMP, *targets], list(past.columns))
    past, rows, clock, item_ids = _in_order(past, None)
    if strict:
        observed = past[list(targets)].notna().any(axis=1).groupby(rows.item()).any()
        report_dropped([rows.item_ids[item] for item in np.flatnonzero(~observed).tolist()], len(observed))
        if not observed.all():
            past, rows, clock, item_ids = _in_order(past[observed.to_numpy()[rows.item()]], None)
    times = _ahead(rows, freq=freq, horizon=horizon, check=freq is None or strict)
    covariates = [str(name) for name in past.columns if name not in {ITEM_ID, TIMESTAMP, *targets}]
    if future is not None:
        future = _check_future(future, rows, item_ids, times, covariates=covariates, horizon=horizon)
    columns = {name: past[name] for name in (*targets, *covariates)}
    levels, units = [], []
    for name, column in columns.items():
        ahead = None if future is None or name not in future else future[name]
        if name not in targets and not _is_number(column):
            _check_categories(column)
            continue
        values, known, level, unit = _float32(name, column, ahead, rows=rows, horizon=horizon)
        past[name] = values
        if future is not None and known is not None:
            future[name] = known
        if name in targets:
            levels.append(level)
            units.append(unit)
    return ForecastFrames(
        past=past.rename(columns={ITEM_ID: id_column, TIMESTAMP: timestamp_column}),
        future=None if future is None else future.rename(columns={ITEM_ID: id_column, TIMESTAMP: timestamp_column}),
        times=clock.write(times),
        item_ids=item_ids,
        level=np.stack(levels, axis=1),
        unit=np.stack(units, axis=1),
    )


def _named(frame: pd.DataFrame, id_column: str, timestamp_column: str) -> pd.DataFrame:
    """Return a copy with our names for the item and the time."""
    frame = tidy(frame, also=(id_column, timestamp_column))
    return frame.rename(columns={id_column: ITEM_ID, timestamp_column: TIMESTAMP})


def _with_ids(past: pd.DataFrame, future: pd.DataFrame | None) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """Add the item id that a frame of one series may lack, taken from the other frame where that has one."""
    frames = [frame for frame in (past, future) if frame is not None]
    found = {item for frame in frames if ITEM_ID in frame for item in frame[ITEM_ID].dropna().unique()}
    filled = []
    for frame in frames:
        if ITEM_ID not in frame:
            if similar(ITEM_ID, frame.columns) or len(found) > 1:
                check_columns([ITEM_ID], list(frame.columns))
            if TIMESTAMP not in frame and DATE in frame:
                frame = frame.rename(columns={DATE: TIMESTAMP})
            frame = frame.assign(**{ITEM_ID: next(iter(found), "series")})
        filled.append(frame)
    return filled[0], filled[1] if future is not None else None


def _in_order(frame: pd.DataFrame, items: NDArray[Any] | None) -> tuple[pd.DataFrame, Rows, Clock, NDArray[Any]]:
    """Return a frame whose rows stand in order of item and time, those rows, the clock and the items."""
    ids = frame[ITEM_ID]
    plain = ids.astype(ids.dtype.categories.dtype) if isinstance(ids.dtype, pd.CategoricalDtype) else ids
    codes, uniques = pd.factorize(plain) if items is None else (pd.Index(items).get_indexer(plain), items)
    nameless = np.flatnonzero(plain.isna().to_numpy() | plain.eq("").to_numpy(dtype=bool, na_value=False))
    if len(nameless):
        raise InputError(
            f"column {ITEM_ID!r} must name an item in every row, row {nameless[0]} (counted from 0) is empty"
        )
    if (codes < 0).any():
        raise InputError(
            f"future values are for items that have a past, got {listed(map(str, plain[codes < 0].unique()))}"
        )
    times, clock = read_times(frame[TIMESTAMP])
    order = np.lexsort([times.asi8, codes])
    frame = frame.copy(deep=False)
    frame[ITEM_ID], frame[TIMESTAMP] = plain.to_numpy(), times
    frame = frame.iloc[order].reset_index(drop=True)
    bounds = np.concatenate([[0], np.cumsum(np.bincount(codes, minlength=len(uniques)))])
    return frame, Rows([str(item) for item in uniques], times[order], bounds), clock, np.asarray(uniques)


def _ahead(rows: Rows, *, freq: str | None, horizon: int, check: bool) -> pd.DatetimeIndex:
    """Return the times of the steps to forecast, item after item."""
    twice = np.flatnonzero((np.diff(rows.timestamps.asi8) == 0) & rows.follows())
    if len(twice):
        raise InputError(
            f"duplicated timestamp: {rows.place(int(twice[0]) + 1)}; keep one row for each time of an item, "
            f"for example frame.drop_duplicates(['{ITEM_ID}', '{TIMESTAMP}'])"
        )
    offset: Any = infer_offset(rows) if freq is None else parse_freq(freq)
    if check:
        check_regular(rows, offset, given=freq is not None)
    last = rows.timestamps[rows.bounds[1:] - 1]
    if isinstance(offset, pd.offsets.Week):
        offset = pd.Timedelta(weeks=offset.n)  # items may have their own weekdays
    try:
        ahead = {time: _steps(time, offset, horizon) for time in last.unique()}
    except (OverflowError, pd.errors.OutOfBoundsDatetime):
        raise InputError(
            f"times must lie between the years 1678 and 2262, which {horizon} steps of {freq or offset} after "
            f"{last.max()} leave; take a shorter horizon"
        ) from None
    return pd.DatetimeIndex(np.concatenate([ahead[time] for time in last]))


def _steps(last: pd.Timestamp, offset: Any, horizon: int) -> NDArray[Any]:
    first = last + offset
    return np.asarray(pd.date_range(first, periods=horizon, freq=offset).as_unit("ns").to_numpy())


def _check_future(
    future: pd.DataFrame,
    rows: Rows,
    item_ids: NDArray[Any],
    times: pd.DatetimeIndex,
    *,
    covariates: Sequence[str],
    horizon: int,
) -> pd.DataFrame:
    """Return the rows of the steps to forecast, in their order; refuse a frame that lacks some of them."""
    check_columns([TIMESTAMP], list(future.columns))
    names = [str(name) for name in future.columns if name not in {ITEM_ID, TIMESTAMP}]
    if not names:
        raise InputError("the frame of future values needs a column for at least one known covariate, got none")
    check_known(names, covariates)
    future, ahead, _, _ = _in_order(future, item_ids)
    wanted = pd.DataFrame({ITEM_ID: np.repeat(np.arange(len(item_ids)), horizon), TIMESTAMP: times})
    given = pd.DataFrame({ITEM_ID: ahead.item(), TIMESTAMP: ahead.timestamps, "row": np.arange(len(future))})
    found = wanted.merge(given.drop_duplicates([ITEM_ID, TIMESTAMP]), how="left")["row"]
    if found.isna().any():
        item = int(np.flatnonzero(found.isna())[0]) // horizon
        own = ahead.timestamps[ahead.bounds[item] : ahead.bounds[item + 1]]
        span = times[item * horizon : (item + 1) * horizon]
        got = "none" if len(own) == 0 else f"{len(own)} steps from {own[0]} to {own[-1]}"
        raise InputError(
            f"future values must cover the {horizon} steps from {span[0]} to {span[-1]} of item "
            f"{rows.item_ids[item]!r}, got {got}"
        )
    return future.iloc[found.astype(int)].reset_index(drop=True)


def _is_number(column: pd.Series) -> bool:
    """Return whether a covariate is numbers: booleans are, text that spells numbers is, categories of text are not."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        return bool(types.is_numeric_dtype(column.dtype.categories.dtype))
    if types.is_numeric_dtype(column.dtype):
        return True
    return bool(pd.to_numeric(column, errors="coerce").notna().eq(column.notna()).all())


def _check_categories(column: pd.Series) -> None:
    """Refuse text that is a number in another notation."""
    for value in column.dropna().unique()[:10]:
        if isinstance(value, str) and "decimal" in str(error := refuse_text(str(column.name), value)):
            raise error


def _float32(
    name: str, past: pd.Series, future: pd.Series | None, *, rows: Rows, horizon: int
) -> tuple[NDArray[Any], NDArray[Any] | None, NDArray[Any], NDArray[Any]]:
    """Return a column's past and future as float32, and each item's level and unit, 0 and 1 where nothing was lost."""
    values = as_doubles(past)
    known = None if future is None else as_doubles(future)
    everything = values if known is None else np.concatenate([values, known])
    wrong = np.flatnonzero(np.isinf(everything))
    if len(wrong):
        row = int(wrong[0])
        place = rows.place(row) if row < len(values) else f"row {row - len(values)} of the future"
        raise InputError(
            f"column {name!r} must hold finite numbers or NaN for missing ones, got {everything[row]} for {place}; "
            "replace it, for example by NaN"
        )
    low, high = (how.reduceat(values, rows.bounds[:-1]) for how in (np.fmin, np.fmax))
    if known is not None:
        low = np.fmin(low, np.fmin.reduceat(known, np.arange(0, len(known), horizon)))
        high = np.fmax(high, np.fmax.reduceat(known, np.arange(0, len(known), horizon)))
    spread, middle = (high - low) / 2, low / 2 + high / 2
    lossy = (np.abs(middle) > MOST_LEVEL * spread) | ((spread > 0) & ((spread < SPREADS[0]) | (spread > SPREADS[1])))
    level = np.where(lossy & np.isfinite(middle), middle, 0.0)
    unit = np.where(lossy & (spread > 0), spread, 1.0)
    item = rows.item()
    values = ((values - level[item]) / unit[item]).astype(np.float32)
    if known is not None:
        known = ((known - np.repeat(level, horizon)) / np.repeat(unit, horizon)).astype(np.float32)
    return values, known, level, unit
