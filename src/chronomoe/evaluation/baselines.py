"""What a mixture is compared with, besides trained models: naive, average and oracle forecasts."""

import copy
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from jaxtyping import Float

from chronomoe.evaluation.metrics import WindowScores
from chronomoe.evaluation.tasks import Task
from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.models.mixture.router import RoutingConfig

NEARLY_EQUAL = 1e9
"""A temperature that leaves nothing of the router's preferences."""


def seasonal_naive(task: Task, *, levels: Sequence[float]) -> Float[np.ndarray, "row quantile horizon"]:
    """Repeat the last season, with normal quantiles from the spread of seasonal differences in the context.

    The spread grows with the square root of the number of seasons ahead; Hyndman and Athanasopoulos, Forecasting:
    principles and practice, 3rd ed., section 5.5. A missing value falls back to the season before, then to the last
    value.
    """
    season, horizon = task.domain.seasonality, task.horizon
    score = np.array([NormalDist().inv_cdf(level) for level in levels])[:, None]
    seen_rows: dict[int, int] = {}
    rows = []
    for window in task.window:
        place = seen_rows.get(int(window), 0)
        seen_rows[int(window)] = place + 1
        past = task.windows[window].context[place].astype(np.float64)
        last = _last_season(past, season)
        ahead = np.arange(horizon)
        gap = past[season:] - past[:-season] if len(past) > season else np.diff(past)
        spread = np.nanstd(gap) if np.isfinite(gap).any() else 0.0
        rows.append(last[ahead % season][None] + score * spread * np.sqrt(ahead // season + 1)[None])
    return np.stack(rows)


def _last_season(past: Float[np.ndarray, " time"], season: int) -> Float[np.ndarray, " season"]:
    seen = past[np.isfinite(past)]
    latest = seen[-1] if len(seen) else 0.0
    padded = np.concatenate([np.full(-len(past) % season, np.nan), past]).reshape(-1, season)
    values = padded[-1].copy()
    for earlier in padded[-2::-1]:
        values = np.where(np.isnan(values), earlier, values)
    return np.where(np.isnan(values), latest, values)


def equal_average(mixture: DistilledMoE) -> DistilledMoE:
    """Return a copy of a mixture that averages all its experts with equal gates, whatever the series."""
    average: DistilledMoE = copy.deepcopy(mixture)
    average.set_routing(RoutingConfig(top_k=len(mixture.experts), temperature=NEARLY_EQUAL))
    average.eval()
    return average


def oracle(experts: Sequence[WindowScores]) -> WindowScores:
    """Scores of the best expert of each window by quantile loss: what perfect routing at K = 1 would give."""
    best = np.argmin(np.stack([scores.quantile_loss for scores in experts]), axis=0)
    rows = np.arange(len(best))
    return WindowScores(*(np.stack(columns)[best, rows] for columns in zip(*experts, strict=True)))


def average_scores(models: Sequence[WindowScores]) -> WindowScores:
    """Average the errors of several models window by window: the error to expect of one of them picked blindly."""
    parts = {
        name: np.mean([getattr(scores, name) for scores in models], axis=0)
        for name in WindowScores._fields
        if name != "series"
    }
    return WindowScores(**parts, series=models[0].series)
