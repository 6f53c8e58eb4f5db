"""What a mixture is compared with, besides trained models: naive, average, hindsight and ensemble forecasts."""

import copy
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np
from jaxtyping import Float

from chronomoe.evaluation.metrics import WindowScores, aggregate
from chronomoe.evaluation.tasks import Task, score
from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.models.mixture.router import RoutingConfig

NEARLY_EQUAL = 1e9
"""A temperature that leaves nothing of the router's preferences."""
MOST_MEMBERS = 8
"""Of a greedy portfolio, repeated ones counted."""


def seasonal_naive(task: Task, *, levels: Sequence[float]) -> Float[np.ndarray, "row quantile horizon"]:
    """Repeat the last season, with normal quantiles from the spread of seasonal differences in the context.

    The spread grows with the square root of the number of seasons ahead; Hyndman and Athanasopoulos, Forecasting:
    principles and practice, 3rd ed., section 5.5. A missing value falls back to the season before, then to the last
    value.
    """
    season, horizon = task.domain.seasonality, task.horizon
    normal = np.array([NormalDist().inv_cdf(level) for level in levels])[:, None]
    rows, ahead = [], np.arange(horizon)
    for past in (context.astype(np.float64) for context in task.contexts):
        last = last_season(past, season)
        gap = past[season:] - past[:-season] if len(past) > season else np.diff(past)
        spread = np.nanstd(gap) if np.isfinite(gap).any() else 0.0
        rows.append(last[ahead % season][None] + normal * spread * np.sqrt(ahead // season + 1)[None])
    return np.stack(rows)


def last_season(past: Float[np.ndarray, " time"], season: int) -> Float[np.ndarray, " season"]:
    """Return the last season of a series; a missing value falls back a season, then to the last value."""
    seen = past[np.isfinite(past)]
    latest = seen[-1] if len(seen) else 0.0
    padded = np.concatenate([np.full(-len(past) % season, np.nan), past]).reshape(-1, season)
    values = padded[-1].copy()
    for earlier in padded[-2::-1]:
        values = np.where(np.isnan(values), earlier, values)
    return np.where(np.isnan(values), latest, values)


def rerouted(mixture: DistilledMoE, routing: RoutingConfig) -> DistilledMoE:
    """Return the same mixture, weights shared, with another way from scores to choices."""
    twin: DistilledMoE = copy.copy(mixture)
    twin.config = copy.deepcopy(mixture.config)
    twin.set_routing(routing)
    twin.eval()
    return twin


def equal_average(mixture: DistilledMoE) -> DistilledMoE:
    """Return the same mixture, weights shared, that averages all its experts with equal gates, whatever the series."""
    routing = RoutingConfig(top_k=len(mixture.experts), temperature=NEARLY_EQUAL, threshold=None)
    twin = rerouted(mixture, routing)
    twin.diverts = False
    return twin


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


def greedy_portfolio(
    forecasts: Mapping[str, Float[np.ndarray, "row quantile horizon"]], task: Task, *, levels: Sequence[float]
) -> list[str]:
    """Choose members of an ensemble on the windows of a task, one by one, each time the one that lowers WQL most.

    Forward selection with replacement (Caruana et al., 2004, https://doi.org/10.1145/1015330.1015432), by which Chroma
    (https://arxiv.org/abs/2510.06419) combines small specialists. A forecast is the mean of the members' quantiles, a
    member that was chosen twice counting twice; it ends when no further member helps, or after ``MOST_MEMBERS``.
    """

    def loss(members: Sequence[str]) -> float:
        return aggregate(score(task, ensemble(forecasts, members), levels=list(levels)))["WQL"]

    chosen: list[str] = []
    reached = float("inf")
    while len(chosen) < MOST_MEMBERS:
        losses = {name: loss([*chosen, name]) for name in forecasts}
        best = min(losses, key=lambda name: losses[name])
        if not losses[best] < reached:
            break
        chosen, reached = [*chosen, best], losses[best]
    return chosen or list(forecasts)[:1]


def ensemble(
    forecasts: Mapping[str, Float[np.ndarray, "row quantile horizon"]], members: Sequence[str]
) -> Float[np.ndarray, "row quantile horizon"]:
    """Average the quantiles of members, level by level."""
    mean: Float[np.ndarray, "row quantile horizon"] = np.mean([forecasts[name] for name in members], axis=0)
    return mean
