"""Scores of windows, the metrics that follow from them, and how sure one can be of a difference.

Every metric here is a sum over windows divided by another sum over windows. What a window adds to each sum is computed
once; metrics of any set of windows, and of thousands of resampled ones, are then additions.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from chronomoe.errors import InputError, nearest
from chronomoe.training.losses import quantile_loss

METRICS = {
    "WQL": ("quantile_loss", "abs_target"),
    "MASE": ("scaled_abs_error", "scaled_observed"),
    "SQL": ("scaled_quantile_loss", "scaled_observed"),
    "MAE": ("abs_error", "observed"),
    "MSE": ("squared_error", "observed"),
    "MAPE": ("ape", "ape_observed"),
    "coverage80": ("inside80", "observed"),
    "bias": ("error", "abs_target"),
}
"""The two fields of :class:`WindowScores` that each metric divides, summed over windows."""
ERRORS = tuple(name for name in METRICS if name not in ("coverage80", "bias"))
"""Metrics of which less is better, so that a ratio of two of them means something."""

MEDIAN, LOWER80, UPPER80 = 0.5, 0.1, 0.9
GATHERED_AT_ONCE = 2_000_000  # windows of a bootstrap held in memory


class WindowScores(NamedTuple):
    """What each window adds to the sums that metrics are made of.

    Errors are those of the median. Steps whose target is NaN count nowhere; a NaN forecast of an observed step makes
    its window's sums NaN rather than go unnoticed (fev would leave the step out).
    """

    error: Float[np.ndarray, " window"]
    """Forecast minus target: above 0 where the forecast is too high."""
    abs_error: Float[np.ndarray, " window"]
    squared_error: Float[np.ndarray, " window"]
    ape: Float[np.ndarray, " window"]
    """Absolute percentage errors as fractions, over steps whose target is neither NaN nor 0."""
    ape_observed: Float[np.ndarray, " window"]
    """Number of those steps."""
    quantile_loss: Float[np.ndarray, " window"]
    """Twice the pinball loss, summed over steps, mean over levels."""
    abs_target: Float[np.ndarray, " window"]
    scaled_abs_error: Float[np.ndarray, " window"]
    """``abs_error`` over the seasonal error; 0 where that is not defined."""
    scaled_quantile_loss: Float[np.ndarray, " window"]
    """``quantile_loss`` over the seasonal error; 0 where that is not defined."""
    scaled_observed: Float[np.ndarray, " window"]
    """``observed`` where the seasonal error is defined, else 0: fev leaves such windows out too."""
    inside80: Float[np.ndarray, " window"]
    """Steps whose target lies between the 0.1 and the 0.9 quantile, bounds included."""
    observed: Float[np.ndarray, " window"]
    """Number of steps whose target is not NaN."""
    series: Int[np.ndarray, " window"]
    """Which series the window was cut from, any numbering."""


class Interval(NamedTuple):
    """A ratio and the bounds of its confidence interval."""

    ratio: float
    low: float
    high: float


def seasonal_error(context: Float[np.ndarray, "*window time"], *, seasonality: int) -> Float[np.ndarray, "*window"]:
    """Mean absolute error of the seasonal naive forecast inside a context, as fev's MASE and SQL divide by.

    Pairs with a NaN are left out; NaN when no pair is left, so that the window is left out of MASE and SQL. GluonTS
    instead falls back to a lag of 1 when a context is no longer than ``seasonality``.
    """
    if seasonality < 1:
        raise InputError(f"seasonality must be at least 1, got {seasonality}")
    context = np.asarray(context, dtype=np.float64)
    gap = np.abs(context[..., seasonality:] - context[..., :-seasonality])
    pairs = (~np.isnan(gap)).sum(axis=-1)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.nansum(gap, axis=-1) / np.where(pairs > 0, pairs, np.nan))


def score_windows(
    quantiles: Float[np.ndarray, "window quantile horizon"],
    target: Float[np.ndarray, "window horizon"],
    *,
    levels: Sequence[float],
    seasonal_error: Float[np.ndarray, " window"],
    series: Int[np.ndarray, " window"],
) -> WindowScores:
    """Score forecasts; ``target`` is NaN where nothing is to be counted.

    ``levels`` must hold 0.1, 0.5 and 0.9. The quantile loss is a mean over the levels given: fev's default tasks have
    the nine deciles, Chronos-2 has 21 levels, and the two are not comparable. The seasonal error of a window whose
    context repeats exactly is 0: it counts as not defined, as in fev.
    """
    place = {round(level, 6): index for index, level in enumerate(levels)}
    missing = [level for level in (LOWER80, MEDIAN, UPPER80) if level not in place]
    if missing or len(levels) != quantiles.shape[1]:
        raise InputError(
            f"scores need one forecast per quantile level and the levels 0.1, 0.5 and 0.9, got {quantiles.shape[1]} "
            f"forecasts for levels {list(levels)}; forecast at more levels"
        )
    quantiles, target = np.asarray(quantiles, dtype=np.float64), np.asarray(target, dtype=np.float64)
    seen = ~np.isnan(target)
    lower, median, upper = (quantiles[:, place[level]] for level in (LOWER80, MEDIAN, UPPER80))

    numbers = torch.tensor(levels, dtype=torch.float64)
    by_step = quantile_loss(torch.from_numpy(quantiles), torch.from_numpy(target), levels=numbers).numpy()
    loss = by_step.sum(axis=-1, where=seen)

    error = np.abs(target - median)
    abs_error = error.sum(axis=-1, where=seen)
    nonzero = seen & (target != 0)
    observed = seen.sum(axis=-1).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        ape = (error / np.abs(target)).sum(axis=-1, where=nonzero)
        scalable = np.isfinite(seasonal_error) & (seasonal_error > 0)
        scale = np.where(scalable, seasonal_error, np.inf)
    return WindowScores(
        error=(median - target).sum(axis=-1, where=seen),
        abs_error=abs_error,
        squared_error=(error**2).sum(axis=-1, where=seen),
        ape=ape,
        ape_observed=nonzero.sum(axis=-1).astype(np.float64),
        quantile_loss=loss,
        abs_target=np.abs(target).sum(axis=-1, where=seen),
        scaled_abs_error=abs_error / scale,
        scaled_quantile_loss=loss / scale,
        scaled_observed=np.where(scalable, observed, 0.0),
        inside80=((lower <= target) & (target <= upper)).sum(axis=-1, where=seen).astype(np.float64),
        observed=observed,
        series=np.asarray(series, dtype=np.int64),
    )


def concatenate(parts: Iterable[WindowScores]) -> WindowScores:
    """Join scores of batches of windows; their ``series`` must be numbered alike."""
    return WindowScores(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def aggregate(scores: WindowScores) -> dict[str, float]:
    """Return every metric of :data:`METRICS` over all windows together; NaN where nothing counts.

    Equal to fev's classes of the same names on one evaluation window of a univariate task. Where fev averages (the
    evaluation windows of a task, the dimensions of a multivariate one), all windows and rows are pooled here instead:
    the same for MAE, MSE and MASE when each has as many observed steps, a different weighting for WQL. fev has no
    ``coverage80`` and no ``bias``.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            name: float(getattr(scores, top).sum() / getattr(scores, bottom).sum())
            for name, (top, bottom) in METRICS.items()
        }


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean of values that are not negative; NaN if one of them is."""
    array = np.asarray(list(values), dtype=np.float64)
    if not len(array) or (array < 0).any():
        raise InputError(f"a geometric mean needs at least one value and none below 0, got {array.tolist()}")
    with np.errstate(divide="ignore"):
        return float(np.exp(np.log(array).mean()))


def relative(model: Mapping[str, WindowScores], reference: Mapping[str, WindowScores], metric: str) -> float:
    """Geometric mean over domains of a metric of ``model`` divided by that of ``reference``, on the same windows."""
    top = _paired(model, reference, metric)
    with np.errstate(divide="ignore", invalid="ignore"):
        return geometric_mean(getattr(model[name], top).sum() / getattr(reference[name], top).sum() for name in model)


def bootstrap_relative(
    model: Mapping[str, WindowScores],
    reference: Mapping[str, WindowScores],
    metric: str,
    *,
    draws: int = 1000,
    confidence: float = 0.95,
    seed: int,
) -> Interval:
    """Percentile interval of :func:`relative`, from :func:`relative_draws`."""
    ratio = relative_draws(model, reference, metric, draws=draws, seed=seed)
    return Interval(relative(model, reference, metric), *percentiles(ratio, confidence=confidence))


def percentiles(draws: Float[np.ndarray, " draw"], *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the bounds that leave equal shares of the draws outside."""
    if not 0 < confidence < 1:
        raise InputError(f"confidence must be between 0 and 1, got {confidence}")
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def relative_draws(
    model: Mapping[str, WindowScores], reference: Mapping[str, WindowScores], metric: str, *, draws: int, seed: int
) -> Float[np.ndarray, " draw"]:
    """Redraw :func:`relative` by a paired bootstrap within each domain.

    A draw takes as many series as a domain has, with replacement, and from each of them as many windows as it has, with
    replacement; both models are scored on the same windows. A domain of one series resamples windows alone. Windows are
    drawn one by one, not in blocks of neighbours: windows that overlap are treated as if they did not, so cut windows
    at least a horizon apart. Domains are the ones given: nothing is said about domains that were not.
    """
    if draws < 1:
        raise InputError(f"draws must be at least 1, got {draws}")
    top = _paired(model, reference, metric)
    rng = np.random.default_rng(seed)
    total = np.zeros(draws)
    for name in model:
        columns = np.stack([getattr(model[name], top), getattr(reference[name], top)])
        drawn = resampled_sums(columns, model[name].series, draws=draws, rng=rng)
        with np.errstate(divide="ignore", invalid="ignore"):
            total += np.log(drawn[0] / drawn[1])
    ratio: Float[np.ndarray, " draw"] = np.exp(total / len(model))
    return ratio


def resampled_sums(
    columns: Float[np.ndarray, "column window"],
    series: Int[np.ndarray, " window"],
    *,
    draws: int,
    rng: np.random.Generator,
) -> Float[np.ndarray, "column draw"]:
    """Sum each column over windows drawn within drawn series, once per draw."""
    columns = columns[:, np.argsort(series, kind="stable")]
    _, size = np.unique(series, return_counts=True)
    first = np.cumsum(size) - size
    at_once = max(1, GATHERED_AT_ONCE // columns.shape[1])
    sums = []
    for start in range(0, draws, at_once):
        chosen = rng.integers(len(size), size=(min(at_once, draws - start), len(size)))
        windows_of_draw = size[chosen].sum(axis=1)
        slot = np.repeat(chosen.ravel(), size[chosen].ravel())
        window = first[slot] + (rng.random(len(slot)) * size[slot]).astype(np.int64)
        sums.append(np.add.reduceat(columns[:, window], np.cumsum(windows_of_draw) - windows_of_draw, axis=1))
    return np.concatenate(sums, axis=1)


def _paired(model: Mapping[str, WindowScores], reference: Mapping[str, WindowScores], metric: str) -> str:
    """Return the field to compare; on the same windows the fields that metrics divide by are equal and cancel."""
    if metric not in ERRORS:
        raise InputError(
            f"Unknown metric {metric!r} for a ratio. Available: {', '.join(ERRORS)}.{nearest(metric, ERRORS)}"
        )
    if not model or set(model) != set(reference):
        raise InputError(f"a ratio needs the same domains on both sides, got {sorted(model)} and {sorted(reference)}")
    for name in model:
        for field in ("series", "observed", "abs_target", "scaled_observed"):
            one, other = getattr(model[name], field), getattr(reference[name], field)
            if one.shape != other.shape or not np.allclose(one, other, equal_nan=True):
                raise InputError(
                    f"a ratio needs both models scored on the same windows in the same order; {field} differs in "
                    f"domain {name!r}; score both in one pass"
                )
    return METRICS[metric][0]
