"""Past forecasts against what happened: coverage and error by group, and whether the model has gone stale."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from pandas.tseries.frequencies import to_offset

from chronomoe.data.checks import as_numbers, as_timestamps, check_columns
from chronomoe.data.frames import tidy, to_long
from chronomoe.data.frequency import default_seasonality
from chronomoe.data.intake import Wish
from chronomoe.data.series import ITEM_ID, TIMESTAMP
from chronomoe.errors import InputError
from chronomoe.evaluation.metrics import WindowScores, aggregate, percentiles, resampled_sums, score_windows

ALL = "all"
GROUPS = ("domain", "expert")
"""Columns of forecasts or actual values by which rows are grouped, where they are there."""
METRICS = ("WQL", "coverage80", "bias")
FEWEST = 200
"""Values before and after the cut below which nothing is said."""
WORSE, APART = 1.1, 0.05
"""The bounds of a verdict: see :func:`verdict`."""
BLOCK = 24
"""Steps that are drawn together: errors of neighbours are alike."""
Verdict = Literal["keep", "recalibrate", "distil again", "too few values"]


class Found(NamedTuple):
    """How the forecasts of one group did."""

    column: str
    """What rows are grouped by; "all" for all of them."""
    group: str
    values: int
    """Forecast steps whose value has arrived."""
    series: int
    before: Mapping[str, float]
    """``METRICS`` of the reference."""
    after: Mapping[str, float]
    """Of what is judged."""
    ratio: float
    """Loss relative to how far values lie from those a season earlier, of what is judged over that of the reference."""
    ratio_interval: tuple[float, float]
    coverage_interval: tuple[float, float]
    """Of ``coverage80`` of what is judged."""
    verdict: Verdict


def verdict(
    *, before: int, after: int, ratio: tuple[float, float], coverage: tuple[float, float], nominal: float = 0.8
) -> Verdict:
    """Say what to do, from the numbers of values and 95 % intervals.

    - "distil again": the loss has risen by more than 10 % against that of repeating the last season, that is, the
      interval of its ratio lies above 1.1. Series that became harder for both do not count;
    - else "recalibrate": the interval of the coverage lies more than 5 points above or below that of the band;
    - else "keep".

    A rise of the error comes first, because new bands around a median that is wrong only hide it.
    """
    if min(before, after) < FEWEST or not np.isfinite([*ratio, *coverage]).all():
        return "too few values"
    if ratio[0] > WORSE:
        return "distil again"
    return "recalibrate" if coverage[1] < nominal - APART or coverage[0] > nominal + APART else "keep"


def monitor(
    forecasts: pd.DataFrame,
    actuals: pd.DataFrame,
    *,
    target: Sequence[str] = ("target",),
    since: pd.Timestamp | None = None,
    seasonality: int | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> list[Found]:
    """Score forecasts whose values have arrived, those from ``since`` on against those before.

    A step may have been forecast several times. Columns ``domain`` and ``expert`` of either frame group its rows, one
    value an item. Intervals are of 95 %, by a bootstrap over series, the same before and after, and over blocks of
    ``BLOCK`` consecutive steps within them.

    Args:
        forecasts: as ``chronomoe predict`` writes them, levels 0.1, 0.5 and 0.9 among the columns.
        actuals: long or wide, with the same item ids.
        target: columns of ``actuals`` that were forecast.
        since: the first time that is judged; by default half of the values come before.
        seasonality: steps of the main period, by default the usual one. ``actuals`` must reach back as far.
        draws: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        InputError: columns are missing, or no forecast step has a value.
    """
    rows = _joined(tidy(forecasts), actuals, target, seasonality)
    names = [name for name in rows.columns if _is_level(name)]
    rows = rows.sort_values(TIMESTAMP, kind="stable", ignore_index=True)
    series = pd.factorize(pd.MultiIndex.from_frame(rows[[ITEM_ID, "target_name"]]))[0]
    scores = score_windows(
        np.stack([as_numbers(rows[name]) for name in names], axis=1)[:, :, None],
        rows["value"].to_numpy()[:, None],
        levels=[float(name) for name in names],
        seasonal_error=np.full(len(rows), np.nan),
        series=series,
    )
    times = rows[TIMESTAMP]
    late = (times >= (times.sort_values().iloc[len(times) // 2] if since is None else since)).to_numpy()
    found = []
    for column in (ALL, *(name for name in GROUPS if name in rows)):
        labels = pd.Series(ALL, rows.index) if column == ALL else rows[column].astype(str)
        for label in sorted(labels.unique()):
            inside = (labels == label).to_numpy()
            part = WindowScores(*(values[inside] for values in scores))
            usual = rows["usual"].to_numpy()[inside]
            found.append(_judge(column, label, part, usual, late[inside], draws=draws, seed=seed))
    return found


def _judge(
    column: str, group: str, scores: WindowScores, usual: np.ndarray, late: np.ndarray, *, draws: int, seed: int
) -> Found:
    before, after = (WindowScores(*(values[side] for values in scores)) for side in (~late, late))
    loss = np.where(np.isnan(usual), 0.0, scores.quantile_loss)
    sums = np.stack([part * side for side in (~late, late) for part in (loss, np.nan_to_num(usual))])
    columns = np.concatenate([sums, np.stack([scores.inside80 * late, scores.observed * late])])
    nth = pd.Series(scores.series).groupby(scores.series).cumcount().to_numpy()
    blocks, block = np.unique(np.stack([scores.series, nth // BLOCK]), axis=1, return_inverse=True)
    whole = np.stack([np.bincount(block.ravel(), weights=column) for column in columns])
    drawn = resampled_sums(whole, blocks[0], draws=draws, rng=np.random.default_rng(seed))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios, coverages = (drawn[2] / drawn[3]) / (drawn[0] / drawn[1]), drawn[4] / drawn[5]
    ratio, coverage = _interval(ratios), _interval(coverages)
    known = ~np.isnan(usual)
    whole_ratio = (sums[2].sum() / sums[3].sum()) / (sums[0].sum() / sums[1].sum()) if known.any() else np.nan
    parts = [{name: aggregate(part)[name] for name in METRICS} for part in (before, after)]
    return Found(
        column=column,
        group=group,
        values=len(late),
        series=len(np.unique(scores.series)),
        before=parts[0],
        after=parts[1],
        ratio=float(whole_ratio),
        ratio_interval=ratio,
        coverage_interval=coverage,
        verdict=verdict(
            before=int((known & ~late).sum()), after=int((known & late).sum()), ratio=ratio, coverage=coverage
        ),
    )


def _interval(draws: Float[np.ndarray, " draw"]) -> tuple[float, float]:
    return percentiles(draws) if np.isfinite(draws).all() else (float("nan"), float("nan"))


def _is_level(name: str) -> bool:
    try:
        return 0 < float(name) < 1
    except ValueError:
        return False


def _joined(
    forecasts: pd.DataFrame, actuals: pd.DataFrame, target: Sequence[str], seasonality: int | None
) -> pd.DataFrame:
    """Return the forecast steps whose value is there.

    They have ``value``, ``usual`` (its distance from the value a season of rows earlier) and the groups of their item.
    """
    check_columns([ITEM_ID, TIMESTAMP, "0.1", "0.5", "0.9"], list(forecasts.columns))
    if "target_name" not in forecasts:
        forecasts = forecasts.assign(target_name=target[0])
    if seasonality is not None and seasonality < 1:
        raise InputError(f"seasonality must be at least 1 step, got {seasonality}")
    actuals = to_long(actuals, Wish.of(list(target), (), None))
    groups = [name for name in GROUPS if name in actuals and name not in forecasts]
    long = actuals.melt([ITEM_ID, TIMESTAMP, *groups], list(target), "target_name", "value")
    sides = [
        side.assign(item_id=side[ITEM_ID].astype(str), timestamp=as_timestamps(side[TIMESTAMP]))
        for side in (forecasts, long)
    ]
    twice = sides[1].duplicated([ITEM_ID, TIMESTAMP, "target_name"])
    if twice.any():
        one = sides[1][twice].iloc[0]
        raise InputError(f"actual values must be given once a step, item {one[ITEM_ID]!r} has {one[TIMESTAMP]} twice")
    sides[1] = sides[1].assign(value=as_numbers(sides[1]["value"])).sort_values(TIMESTAMP)
    values = sides[1].groupby([ITEM_ID, "target_name"], sort=False)
    lag = _usual_season(sides[1]) if seasonality is None else seasonality
    sides[1] = sides[1].assign(usual=(sides[1]["value"] - values["value"].shift(lag)).abs())
    try:
        rows = sides[0].merge(sides[1], on=[ITEM_ID, TIMESTAMP, "target_name"])
    except ValueError as error:  # of one side alone, times have a zone
        raise InputError(f"times of forecasts and actual values do not compare: {error}") from None
    rows = rows.dropna(subset=["value"])
    if rows.empty:
        raise InputError(
            f"no forecast step has an actual value: forecasts are of items such as {sides[0][ITEM_ID].iloc[0]!r} from "
            f"{sides[0][TIMESTAMP].min()} to {sides[0][TIMESTAMP].max()}, values of items such as "
            f"{sides[1][ITEM_ID].iloc[0]!r} from {sides[1][TIMESTAMP].min()} to {sides[1][TIMESTAMP].max()}"
        )
    return rows


def _usual_season(values: pd.DataFrame) -> int:
    """Return the usual season of the most frequent step of sorted values; months and longer have none."""
    steps = values.groupby([ITEM_ID, "target_name"], sort=False)[TIMESTAMP].diff().mode()
    return 1 if steps.empty else default_seasonality(to_offset(steps.iloc[0]).freqstr)
