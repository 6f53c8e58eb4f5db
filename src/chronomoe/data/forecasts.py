"""Series into a pipeline, its forecasts out of it as a long frame: what ``predict_df`` and the command share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from chronos.chronos2.dataset import PreparedInput
from numpy.typing import NDArray

from chronomoe.data.checks import as_numbers, as_timestamps, check_columns, check_finite, check_names
from chronomoe.data.frames import DATE, ONLY_ITEM, frame_to_rows, tidy, to_long
from chronomoe.data.frequency import Rows
from chronomoe.data.intake import Wish, take_in
from chronomoe.data.series import ITEM_ID, TIMESTAMP
from chronomoe.data.table import SeriesTable
from chronomoe.errors import InputError

Ahead = Mapping[str, NDArray[np.floating[Any]]]
"""Known covariates of the forecast steps by name, ``(series, horizon)``."""
_DIGITS = 2.0**10  # of float32's 2 ** 24 steps, a row that varies less than 1 in this many of its level keeps too few
_TOGETHER = 1 << 20  # values that are scaled at once
_SAFE = 40  # powers of two that float32 squares and sums without loss


class Unit(NamedTuple):
    """How rows became float32: ``(values - level) / size``. The size is a power of two, so dividing is exact."""

    level: NDArray[np.float64]
    size: NDArray[np.float64]


def check_asked(horizon: int, levels: Sequence[float], context_length: int | None = None) -> None:
    """Refuse numbers of steps below 1, and quantile levels that do not lie between 0 and 1, each given once."""
    for name, steps in (("horizon", horizon), ("context_length", context_length)):
        if steps is not None and steps < 1:
            raise InputError(f"{name} must be at least 1 step, got {steps}")
    if not all(0 < level < 1 for level in levels) or len(set(levels)) < len(levels):
        raise InputError(f"quantile levels must lie between 0 and 1, each given once, got {list(levels)}")


def find_unit(rows: NDArray[np.floating[Any]]) -> Unit:
    """Return the unit in which float32 loses no digits that matter; 0 and 1 for most rows.

    Forecasts do not depend on level and size of a series, but float32 has seven digits and its squares end at 1e38.
    """
    low = np.fmin.reduce(rows, axis=1, dtype=np.float64, initial=np.nan)
    high = np.fmax.reduce(rows, axis=1, dtype=np.float64, initial=np.nan)
    low, high = np.nan_to_num(low), np.nan_to_num(high)
    level = np.where(np.maximum(np.abs(low), np.abs(high)) > _DIGITS * (high - low), low, 0.0)
    exponent = np.frexp(np.maximum(np.abs(low - level), np.abs(high - level)))[1]
    return Unit(level, np.where(np.abs(exponent) > _SAFE, np.exp2(exponent), 1.0))


def in_units(
    past: NDArray[np.floating[Any]], future: NDArray[np.floating[Any]]
) -> tuple[Unit, torch.Tensor, torch.Tensor]:
    """Return the units of the rows of series, ``(series, row)``, and their steps in these, in float32.

    ``past`` and ``future`` are ``(series, row, time)``; what is known of the future counts for a row's unit too.
    """
    steps = np.concatenate([past, future], axis=2)
    unit = Unit(*(part.reshape(past.shape[:2]) for part in find_unit(steps.reshape(-1, steps.shape[2]))))
    level, size = (column[..., None] for column in unit)
    known, ahead = (torch.from_numpy(((values - level) / size).astype(np.float32)) for values in (past, future))
    return unit, known, ahead


def forecast(
    predict_quantiles: Callable[..., Any],
    table: SeriesTable,
    *,
    horizon: int,
    levels: Sequence[float],
    ahead: Ahead | None = None,
    context_length: int,
    routing: Callable[..., list[dict[str, float]]] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Forecast series and return a row for each step: ids, times, ``target_name``, ``predictions`` and each level.

    ``predict_quantiles`` is that of ``Chronos2Pipeline``, and ``options`` are its. ``routing``, that of
    ``ChronoMoEPipeline``, adds the column ``expert``: the one with the largest gate.
    """
    times = table.layout.clock.show(table.horizon(horizon))
    inputs, unit = _prepare(table, ahead or {}, horizon=horizon, context_length=context_length)
    quantiles, medians = predict_quantiles(
        inputs,
        prediction_length=horizon,
        quantile_levels=list(levels),
        limit_prediction_length=False,
        context_length=context_length,
        **options,
    )
    values = np.concatenate([torch.stack(medians).numpy()[..., None], torch.stack(quantiles).numpy()], axis=-1)
    size, level = (column[..., None, None] for column in (unit.size, unit.level))
    found = values * size + level  # series, variate, step, median and levels
    names = table.layout.names
    steps = np.arange(len(times)).reshape(len(table), 1, horizon).repeat(len(names), axis=1).ravel()
    each = horizon * len(names)
    chosen = [] if routing is None else [next(iter(gates)) for gates in routing(inputs, context_length=context_length)]
    return pd.DataFrame(
        {
            ITEM_ID: table.facts.item_ids.repeat(each),
            TIMESTAMP: times[steps],
            "target_name": np.tile(np.array(names, dtype=object).repeat(horizon), len(table)),
            **dict(zip(["predictions", *map(str, levels)], found.reshape(len(steps), -1).T, strict=True)),
            **({"expert": np.array(chosen, dtype=object).repeat(each)} if chosen else {}),
        }
    )


def forecast_frame(
    predict_quantiles: Callable[..., Any],
    past: pd.DataFrame,
    future: pd.DataFrame | None,
    *,
    names: Mapping[str, str],
    target: str | list[str],
    freq: str | None,
    trusted: bool,
    horizon: int,
    **options: Any,
) -> pd.DataFrame:
    """Forecast frames whose columns have other ``names``, by those that they have here; ids keep their type.

    Raises:
        InputError: as ``take_in_frames``.
    """
    past = tidy(past).rename(columns=names)
    future = None if future is None else tidy(future).rename(columns=names)
    wish = Wish.of(target, () if future is None else known_names(future), freq, trusted=trusted)
    table, ahead = take_in_frames(past, future, wish, horizon=horizon)
    found = forecast(predict_quantiles, table, horizon=horizon, ahead=ahead, **options)
    if ITEM_ID in past:
        found = with_ids(found, past[ITEM_ID])
    return found.rename(columns={new: old for old, new in names.items()})


def _prepare(
    table: SeriesTable, ahead: Ahead, *, horizon: int, context_length: int
) -> tuple[list[PreparedInput], Unit]:
    """Return the pipeline's input of each series, and the units of the targets, ``(series, variate)``.

    Series of one length are scaled together.
    """
    names = [*(name for name in table.layout.covariates if name not in ahead), *ahead]
    pasts = []
    for place in range(len(table)):
        target, covariates = table.values(place)
        pasts.append(np.concatenate([target, *(covariates[name][None] for name in names)])[:, -context_length:])
    variates, rows = len(table.layout.names), len(table.layout.names) + len(names)
    future = np.full((len(table), rows, horizon), np.nan)
    if ahead:
        future[:, rows - len(ahead) :] = np.stack(list(ahead.values()), axis=1)
    unit = Unit(np.empty((len(table), rows)), np.empty((len(table), rows)))
    scaled: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    lengths = np.array([past.shape[1] for past in pasts])
    order = np.argsort(lengths, kind="stable")
    for alike in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1):
        count = max(1, _TOGETHER // (rows * (horizon + int(lengths[alike[0]]))))
        for places in (alike[first : first + count] for first in range(0, len(alike), count)):
            own, *parts = in_units(np.stack([pasts[place] for place in places]), future[places])
            for column, values in zip(unit, own, strict=True):
                column[places] = values
            scaled |= zip(places.tolist(), zip(*parts, strict=True), strict=True)
    inputs = [
        PreparedInput(
            context=context,
            future_covariates=known,
            n_targets=variates,
            n_covariates=len(names),
            n_future_covariates=len(ahead),
        )
        for context, known in (scaled[place] for place in range(len(table)))
    ]
    return inputs, Unit(*(column[:, :variates] for column in unit))


def known_names(frame: pd.DataFrame) -> tuple[str, ...]:
    """Return the known covariates that a frame of future values has."""
    return tuple(name for name in tidy(frame).columns if name not in (ITEM_ID, TIMESTAMP, DATE))


def read_future(frame: pd.DataFrame, *, only: str | None) -> pd.DataFrame:
    """Return a frame of future values with ``item_id`` as text and parsed ``timestamp``.

    ``only`` is the item where there is a single one, whose id may be missing on one of both sides.
    """
    frame = tidy(frame)
    frame = frame.rename(columns={} if TIMESTAMP in frame else {DATE: TIMESTAMP})
    if only is not None and (ITEM_ID not in frame or (only == ONLY_ITEM and frame[ITEM_ID].nunique() == 1)):
        frame = frame.assign(**{ITEM_ID: only})
    check_columns([ITEM_ID, TIMESTAMP], list(frame.columns))
    if len(frame.columns) < 3:
        raise InputError("a frame of future values needs a column for at least one known covariate, got none")
    return frame.assign(item_id=frame[ITEM_ID].astype(str), timestamp=as_timestamps(frame[TIMESTAMP]))


def values_ahead(future: pd.DataFrame, table: SeriesTable, *, horizon: int, trusted: bool = False) -> Ahead:
    """Return the known covariates of the forecast steps; rows of other times and items are ignored.

    Where the caller is ``trusted``, the first rows of each item are taken whatever their times and values.

    Raises:
        InputError: a step is missing, or given twice, or a value is not a finite number.
    """
    item_ids, steps = table.facts.item_ids, table.horizon(horizon)
    times = pd.Series(table.layout.clock.read(pd.DatetimeIndex(future[TIMESTAMP])), index=future.index)
    keys: tuple[Any, Any] = (steps, times)
    if trusted:
        keys = np.tile(np.arange(1, horizon + 1), len(table)), times.groupby(future[ITEM_ID]).rank(method="first")
    places = pd.MultiIndex.from_arrays([item_ids.repeat(horizon), keys[0]])
    place = places.get_indexer(pd.MultiIndex.from_arrays([future[ITEM_ID], keys[1]]))
    inside = np.flatnonzero(place >= 0)
    wrong = np.flatnonzero(np.bincount(place[inside], minlength=len(places)) != 1)
    if len(wrong):
        item = int(wrong[0]) // horizon
        own = times[future[ITEM_ID] == item_ids[item]]
        raise InputError(
            f"future values must cover the {horizon} steps from {steps[item * horizon]} to "
            f"{steps[(item + 1) * horizon - 1]} of item {item_ids[item]!r}, got "
            + (f"{len(own)} steps from {own.min()} to {own.max()}" if len(own) else "none")
        )
    rows = inside[np.argsort(place[inside])]
    found = {name: as_numbers(future[name])[rows] for name in table.layout.known}
    if not trusted:
        for name, values in found.items():
            check_finite(name, values, Rows(item_ids, steps, np.arange(len(table) + 1) * horizon))
    return {name: values.reshape(len(table), horizon) for name, values in found.items()}


def take_in_frames(
    past: pd.DataFrame, future: pd.DataFrame | None, wish: Wish, *, horizon: int
) -> tuple[SeriesTable, Ahead | None]:
    """Check frames of the past and of known covariates as a file is checked.

    Categories, which a file must not hold, are encoded as upstream does it. Booleans count as 0 and 1.

    Raises:
        InputError: the frames break a rule of ``frame_to_series`` or of ``values_ahead``.
    """
    past = to_long(past, wish)
    if future is not None:
        names = past[ITEM_ID].drop_duplicates()
        future = read_future(future, only=str(names.iloc[0]) if len(names) == 1 else None)
    for name in past.columns.difference([ITEM_ID, TIMESTAMP, *wish.target], sort=False):
        if is_category(past[name]):
            past, future = _encode(past, future, name, wish.target)
    table = take_in([frame_to_rows(past, wish)], wish)
    if future is None:
        return table, None
    return table, values_ahead(future, table, horizon=horizon, trusted=wish.trusted)


def is_category(column: pd.Series) -> bool:
    """Return whether a column holds categories: pandas' type of that name, or text that is no number."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        return not pd.api.types.is_bool_dtype(column.dtype.categories.dtype)
    if pd.api.types.is_numeric_dtype(column.dtype) or pd.api.types.is_datetime64_any_dtype(column.dtype):
        return False
    return bool((pd.to_numeric(column, errors="coerce").isna() & column.notna()).any())


def _encode(
    past: pd.DataFrame, future: pd.DataFrame | None, name: str, target: Sequence[str]
) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """Return both frames with numbers for a category, as ``chronos.chronos2.preprocess`` encodes it.

    With one target, it is the mean of the item's target where that category holds and of one more value, the item's
    mean: a category new to the item gets that. With several, it is the category's number, NaN where it is new. Missing
    is a category too.
    """
    sides = [past[[ITEM_ID, name, *target]]] + (
        [] if future is None or name not in future else [future[[ITEM_ID, name]]]
    )
    both = pd.concat(sides, ignore_index=True)
    item, label = both[ITEM_ID].astype(str), both[name].astype(str).where(both[name].notna())
    if len(target) == 1:
        values = pd.Series(as_numbers(both[target[0]]))
        own = values.groupby([item, label], dropna=False)
        mean = values.groupby(item).transform("mean").fillna(0)
        code = ((mean + own.transform("sum")) / (1 + own.transform("count"))).to_numpy()
    else:
        seen = sorted(label[: len(past)].dropna().unique())
        number = pd.Index(seen).get_indexer(label).astype(np.float64)
        code = np.where(label.isna(), len(seen), np.where(number < 0, np.nan, number))
    past = past.assign(**{name: code[: len(past)]})
    if future is not None and len(sides) == 2:
        future = future.assign(**{name: code[len(past) :]})
    return past, future


def with_ids(found: pd.DataFrame, given: pd.Series) -> pd.DataFrame:
    """Return forecasts with the item ids that a caller gave, in their type."""
    given = given.drop_duplicates()
    check_names([str(item_id) for item_id in given])
    places = pd.Index([str(item_id) for item_id in given]).get_indexer(pd.Index(found[ITEM_ID]))
    return found.assign(**{ITEM_ID: given.array.take(places)})
