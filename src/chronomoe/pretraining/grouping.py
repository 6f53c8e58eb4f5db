"""Groups of related rows: coupled series, and targets that covariates drive."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from chronomoe.data.windows import Window

Values = Float[np.ndarray, " time"]
DrawRow = Callable[[], Values]
"""Draws one row of context and horizon."""

KNOWN, PAST_ONLY = "known", "past-only"


@dataclass(frozen=True, kw_only=True)
class Driving:
    """How covariates drive a target; shares are probabilities."""

    known_share: float = 0.75
    """Covariates known into the future; the others are known in the past alone."""
    drive_share: float = 0.75
    """Covariates with an effect."""
    linear_share: float = 0.0
    """Effects that are always proportional to the covariate; the others are of any kind, including that one."""
    strength: tuple[float, float] = (0.3, 6.0)
    """Spread of all effects together, in spreads of the target without them; drawn evenly on a log scale."""


ANY = Driving()
SIMPLE = Driving(known_share=1.0, drive_share=0.85, linear_share=0.5, strength=(1.0, 8.0))
"""Strong, mostly proportional and known: what a model can learn first."""


def couple(rng: np.random.Generator, rows: Float[np.ndarray, "row time"]) -> Float[np.ndarray, "row time"]:
    """Couple independent rows: linear mixtures of each other, and late, noisy copies of earlier rows.

    The recipe of synforecast's ``Multivariatizer`` (after Chronos-2, https://arxiv.org/abs/2510.15821), on any rows.
    """
    rows = unit(rows)
    size, steps = rows.shape
    if rng.random() < 0.7:
        mixing = rng.normal(size=(size, size)) * (rng.random((size, size)) < rng.uniform(0.2, 1.0))
        np.fill_diagonal(mixing, rng.uniform(0.5, 1.5))
        rows = unit(mixing @ rows)
    for late in range(1, size):
        if rng.random() < 0.4:
            lag = int(rng.integers(0, min(48, steps // 4)))
            copy = rng.choice([-1.0, 1.0, 1.0]) * delay(rows[int(rng.integers(0, late))], lag)
            rows[late] = copy + np.exp(rng.uniform(np.log(0.01), np.log(0.5))) * rows[late]
    return rows


def multivariate_window(rows: Float[np.ndarray, "row time"], *, length: int) -> Window:
    """Make every row a target."""
    unknown = np.full((len(rows), rows.shape[1] - length), np.nan, dtype=np.float32)
    return Window(_float32(rows[:, :length]), _float32(rows[:, length:]), unknown, 0)


def covariate_window(
    rng: np.random.Generator,
    draw: DrawRow,
    *,
    num_covariates: int,
    length: int,
    driving: Driving = ANY,
    positive_share: float = 0.8,
) -> Window:
    """Draw a target that covariates drive, each known into the future or in the past alone; some drive nothing.

    Effects of either sign alike give a model that ignores covariates no hint which way to go; when most are positive,
    following a covariate pays at once, and telling the others is learned after that. Weak effects of many kinds teach
    as little at first: ``SIMPLE`` ones begin it.
    """
    base = unit(draw())
    covariates = [_covariate(rng, draw, len(base)) for _ in range(num_covariates)]
    roles = np.where(rng.random(num_covariates) < driving.known_share, KNOWN, PAST_ONLY)
    order = np.argsort(roles == KNOWN, kind="stable")  # past-only ones first, as windows have them
    covariates, roles = [covariates[place] for place in order], roles[order]
    drives = rng.random(num_covariates) < driving.drive_share
    total = np.zeros_like(base)
    for covariate in (row for row, used in zip(covariates, drives, strict=True) if used):
        sign = 1.0 if rng.random() < positive_share else -1.0
        linear = rng.random() < driving.linear_share
        effect = covariate if linear else _effect(rng, covariate, covariates, base)
        total += rng.uniform(0.3, 1.0) * sign * unit(effect)
    strength = np.exp(rng.uniform(*np.log(driving.strength)))
    target = base + strength * unit(total)
    rows = np.stack([target, *covariates])
    past, future = rows[:, :length], rows[:, length:]
    is_known = np.array([False, *(roles == KNOWN)])[:, None]
    is_target = np.arange(len(rows))[:, None] == 0
    return Window(
        _float32(past), _float32(np.where(is_target, future, np.nan)), _float32(np.where(is_known, future, np.nan)), 0
    )


def without_covariates(window: Window) -> Window:
    """Keep the target of a window of one target and covariates, alone."""
    return Window(window.context[:1], window.target[:1], np.full_like(window.known[:1], np.nan), window.index)


def _covariate(rng: np.random.Generator, draw: DrawRow, steps: int) -> Values:
    kind = rng.choice(5, p=[0.45, 0.2, 0.1, 0.15, 0.1])
    if kind == 0:  # any series, such as a temperature
        return unit(draw())
    if kind == 1:  # events that last a while, such as promotions
        return spread_events(rng, steps, chance=np.exp(rng.uniform(np.log(0.005), np.log(0.15))))
    if kind == 2:  # a day of the calendar
        period, offset = int(rng.choice([7, 24, 48, 96, 12])), int(rng.integers(0, 96))
        return ((np.arange(steps) + offset) % period < rng.integers(1, max(2, period // 3))).astype(np.float64)
    if kind == 3:  # stays, then jumps, such as a price
        jump = rng.random(steps) < rng.uniform(0.005, 0.1)
        return np.round(rng.normal(size=steps), 1)[np.maximum.accumulate(np.where(jump, np.arange(steps), 0))]
    return rng.normal(size=steps)


def spread_events(rng: np.random.Generator, steps: int, *, chance: float) -> Values:
    """Draw 0 and 1: events begin at random and last the same few steps; there is at least one."""
    begin = rng.random(steps) < chance
    begin[int(rng.integers(0, steps))] = True
    lasting = np.ones(int(rng.choice([1, 1, 2, 3, 7, 12])))
    return np.asarray(np.minimum(1, np.convolve(begin, lasting)[:steps]))


def _effect(rng: np.random.Generator, covariate: Values, others: list[Values], base: Values) -> Values:
    """Turn a covariate into what it does to the target."""
    kind = rng.choice(7, p=[0.35, 0.2, 0.12, 0.1, 0.08, 0.08, 0.07])
    if kind == 0:
        return covariate
    if kind == 1:
        return delay(covariate, int(rng.integers(1, 13)))
    if kind == 2:  # only beyond a threshold
        return np.asarray(np.maximum(0, covariate - np.quantile(covariate, rng.uniform(0.2, 0.8))))
    if kind == 3:  # both ways, as heating and cooling
        return np.asarray(np.abs(covariate - np.quantile(covariate, rng.uniform(0.2, 0.8))))
    if kind == 4:  # an interaction
        return np.asarray(covariate * others[int(rng.integers(0, len(others)))])
    if kind == 5:  # larger where the target is large
        return covariate * (1.5 + base)
    return np.convolve(covariate, np.exp(-np.arange(12) / rng.uniform(1, 6)))[: len(covariate)]  # fades slowly


def delay(values: Values, lag: int) -> Values:
    """Return values ``lag`` steps later; the first ones repeat the oldest."""
    return values if lag == 0 else np.concatenate([np.full(lag, values[0]), values[:-lag]])


def unit(values: Float[np.ndarray, "*row time"]) -> Float[np.ndarray, "*row time"]:
    """Centre and scale rows to unit spread, missing steps filled with 0; constants become 0."""
    values = np.asarray(values, dtype=np.float64)
    seen = np.isfinite(values)
    if not seen.all():
        centre = np.where(seen, values, 0).sum(axis=-1, keepdims=True) / np.maximum(1, seen.sum(axis=-1, keepdims=True))
        values = np.where(seen, values, centre)
    spread = values.std(axis=-1, keepdims=True)
    return np.asarray((values - values.mean(axis=-1, keepdims=True)) / np.where(spread > 1e-9, spread, 1.0))


def _float32(values: Float[np.ndarray, "row time"]) -> Float[np.ndarray, "row time"]:
    return np.array(values, dtype=np.float32, order="C")  # a copy: corpora on disk are read-only
