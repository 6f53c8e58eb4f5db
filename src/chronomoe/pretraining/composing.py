"""Series composed on the fly from what real ones are made of: calendar profiles, levels, noise and measurement.

The generators of synforecast cover processes; these cover habits: a day that repeats with its own shape, weekends,
holidays, slow change, bursts, counts and sensors that clip or round. One series takes a fraction of a millisecond, so
each is drawn when it is needed and never twice.
"""

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.signal import lfilter

Values = Float[np.ndarray, " time"]

DAYS = (24, 24, 24, 24, 48, 96, 144, 288)
"""Steps of a day at the usual intraday frequencies."""
DAYS_OF_WEEK = 7
SHORT_CYCLES = (7, 7, 12, 52, 4)
"""Main periods of daily, monthly, weekly and quarterly series."""
YEAR_OF_DAYS = 365.25


def compose(rng: np.random.Generator, steps: int) -> Values:
    """Draw one series of about unit spread."""
    kind = rng.random()
    if kind >= 0.92:
        return walk(rng, steps).astype(np.float32)
    if kind < 0.66:
        season = _calendar(rng, steps)
    elif kind < 0.83:
        season = _cycle(rng, steps, period=float(rng.choice(SHORT_CYCLES)))
    else:
        season = _cycle(rng, steps, period=float(np.exp(rng.uniform(np.log(3), np.log(700)))))
    season = _unit(season)
    quiet = rng.random() < 0.3  # strongly periodic and clean
    loudness = np.exp(rng.uniform(np.log(0.01), np.log(0.15)) if quiet else rng.uniform(np.log(0.1), np.log(2.0)))
    noise = loudness * _noise(rng, steps)
    drift = np.exp(rng.uniform(np.log(0.02), np.log(2.0))) * level(rng, steps) if rng.random() < 0.7 else 0.0
    if rng.random() < 0.4:  # multiplicative: swings grow with the level
        depth = rng.uniform(0.2, 1.0)
        values = np.exp(np.clip(depth * (season + noise) + 0.5 * np.clip(drift, -4, 4), -6, 6))
    else:
        values = season + noise + drift
    return _measure(rng, values).astype(np.float32)


def walk(rng: np.random.Generator, steps: int) -> Values:
    """Draw a series that has no level to return to, such as a price or an exchange rate, of unit spread.

    Its next value is best guessed by its last one: steps are almost independent, often with heavy tails and with calm
    and wild times, here and there with a drift or the trace of a week.
    """
    shock = rng.standard_t(float(rng.choice([3, 4, 6])), size=steps) if rng.random() < 0.5 else rng.normal(size=steps)
    if rng.random() < 0.5:  # stochastic volatility
        memory = 1 - np.exp(rng.uniform(np.log(0.005), np.log(0.2)))
        calm = lfilter([np.sqrt(1 - memory**2)], [1, -memory], rng.normal(size=steps))
        shock = shock * np.exp(rng.uniform(0.3, 1.0) * calm)
    if rng.random() < 0.3:  # steps that lean on the one before
        shock = lfilter([1], [1, -rng.uniform(-0.3, 0.5)], shock)
    if rng.random() < 0.3:  # days without trade
        shock = shock * (rng.random(steps) < rng.uniform(0.3, 0.95))
    shock = shock / max(shock.std(), 1e-9)
    values = np.cumsum(shock) + rng.normal(scale=0.02) * np.arange(steps)
    if rng.random() < 0.15:
        values = values + rng.uniform(0.1, 1.0) * _cycle(rng, steps, period=float(rng.choice([5, 7, 12, 24])))
    if rng.random() < 0.5:  # geometric: steps in proportion to the level
        values = np.exp(rng.uniform(0.1, 1.0) * _unit(values))
    if rng.random() < 0.2:
        values = np.round(_unit(values) * np.exp(rng.uniform(np.log(5), np.log(100))))
    return _unit(values)


def profile(rng: np.random.Generator, period: int) -> Float[np.ndarray, " phase"]:
    """Draw the shape of one cycle, ``period`` steps long."""
    phase = np.arange(period) / period
    kind = rng.choice(5, p=[0.35, 0.3, 0.1, 0.1, 0.15])
    if kind == 0:  # smooth: a few harmonics of falling strength
        count = int(rng.integers(1, max(2, min(8, period // 2 + 1))))
        order = np.arange(1, count + 1)
        weight = rng.normal(size=(2, count)) / order ** rng.uniform(0.3, 2.0)
        angle = 2 * np.pi * order[:, None] * phase
        shape = weight[0] @ np.sin(angle) + weight[1] @ np.cos(angle)
    elif kind == 1:  # peaks, such as rush hours
        shape = np.zeros(period)
        for _ in range(int(rng.integers(1, 5))):
            distance = np.abs((phase - rng.random() + 0.5) % 1 - 0.5)
            shape += rng.uniform(0.3, 1.0) * np.exp(-0.5 * (distance / np.exp(rng.uniform(-4.0, -1.6))) ** 2)
    elif kind == 2:  # open and closed
        edges = np.sort(rng.random(int(rng.integers(2, 5))))
        heights = rng.normal(size=len(edges) + 1)
        heights[-1] = heights[0]
        shape = heights[np.searchsorted(edges, phase)]
    elif kind == 3:  # no rule at all
        shape = rng.normal(size=period)
    else:  # day and night
        shape = np.maximum(0, np.sin(2 * np.pi * (phase - rng.random())) + rng.uniform(-0.4, 0.6))
        shape = shape ** rng.uniform(0.7, 2.0)
    return _unit(shape)


def level(rng: np.random.Generator, steps: int) -> Values:
    """Draw slow change of unit spread: a trend, a bent trend, a random walk, steps, or a long smooth wave."""
    kind = rng.choice(5, p=[0.2, 0.15, 0.3, 0.15, 0.2])
    time = np.linspace(0, 1, steps)
    if kind == 0:
        return _unit(time * rng.choice([-1.0, 1.0]))
    if kind == 1:
        bends = rng.random(int(rng.integers(1, 4)))
        return _unit(
            rng.normal() * time + np.maximum(0, time - bends[:, None]).T @ rng.normal(scale=2, size=len(bends))
        )
    if kind == 2:
        return _unit(np.cumsum(rng.normal(size=steps)))
    if kind == 3:
        jumps = rng.random(int(rng.integers(1, 5)))
        return _unit((time > jumps[:, None]).T @ rng.normal(size=len(jumps)))
    waves = rng.uniform(0.3, 3.0, size=3)
    return _unit(np.sin(2 * np.pi * (np.outer(time, waves) + rng.random(3))) @ rng.normal(size=3))


def _calendar(rng: np.random.Generator, steps: int) -> Values:
    """Days that repeat, with weekends, and sometimes holidays and a year behind them."""
    day = int(rng.choice(DAYS))
    first = int(rng.integers(0, DAYS_OF_WEEK * day))
    step = first + np.arange(steps)
    hour, number = step % day, step // day
    weekday = number % DAYS_OF_WEEK
    working = profile(rng, day)
    week = rng.choice(4, p=[0.3, 0.25, 0.25, 0.2])
    if week == 0:  # all days alike
        values = working[hour]
    elif week == 1:  # weekends have a shape of their own
        other = rng.uniform(0, 1) * working + rng.uniform(0, 1) * profile(rng, day) + rng.normal(scale=0.5)
        values = np.where(_is_weekend(rng, number), other[hour], working[hour])
    elif week == 2:  # weekdays differ in size and level
        size, shift = 1 + rng.uniform(0, 0.5) * rng.normal(size=7), rng.uniform(0, 0.8) * rng.normal(size=7)
        values = size[weekday] * working[hour] + shift[weekday]
    else:  # a week without equal days
        other = np.stack([profile(rng, day) for _ in range(DAYS_OF_WEEK)])
        values = working[hour] + rng.uniform(0.1, 0.8) * other[weekday, hour]
    if rng.random() < 0.3:  # the size of days wanders
        wander = level(rng, int(number[-1] - number[0]) + 2)[number - number[0]]
        values = values * np.clip(1 + rng.uniform(0.05, 0.4) * wander, 0.1, 3)
    return values


def _is_weekend(rng: np.random.Generator, number: Int[np.ndarray, " time"]) -> Bool[np.ndarray, " time"]:
    """Mark days of rest: the last one or two of the week, and a few holidays."""
    rest = number % DAYS_OF_WEEK >= DAYS_OF_WEEK - int(rng.choice([1, 2, 2, 2]))
    if rng.random() < 0.2:
        span = int(number[-1] - number[0]) + 1
        holiday = rng.random(span) < rng.uniform(0, 0.05)
        rest = rest | holiday[number - number[0]]
    return np.asarray(rest)


def _cycle(rng: np.random.Generator, steps: int, *, period: float) -> Values:
    """One cycle of any period, read off a finely drawn shape where the period is not whole; maybe a slower one."""
    time = np.arange(steps) + rng.uniform(0, period)
    values = _read(profile(rng, max(4, round(period))), time / period)
    slower = period * float(rng.choice([2, 4, 7, 12, YEAR_OF_DAYS / 7]))
    if rng.random() < 0.4 and slower < steps:
        values = values + rng.uniform(0.1, 1.5) * _read(profile(rng, max(4, min(64, round(slower)))), time / slower)
    return values


def _read(shape: Float[np.ndarray, " phase"], cycles: Values) -> Values:
    """Read off a shape, drawn at equal steps of one cycle, at any place."""
    place = (cycles % 1) * len(shape)
    return np.asarray(np.interp(place, np.arange(len(shape) + 1), np.append(shape, shape[0])))


def _noise(rng: np.random.Generator, steps: int) -> Values:
    """Unit noise: white or autocorrelated, sometimes with heavy tails or changing strength."""
    shock = rng.standard_t(3, size=steps) / 1.7 if rng.random() < 0.25 else rng.normal(size=steps)
    memory = float(rng.choice([0.0, rng.uniform(0, 0.9), 1 - np.exp(rng.uniform(-5, -2))], p=[0.25, 0.4, 0.35]))
    if memory:
        shock = lfilter([np.sqrt(1 - memory**2)], [1, -memory], shock)
        if rng.random() < 0.2:  # smoother than a random walk, such as temperature
            shock = _unit(lfilter([1], [1, -rng.uniform(0.5, 0.95)], shock))
    if rng.random() < 0.2:
        shock = shock * np.exp(0.6 * level(rng, steps))
    return shock


def _measure(rng: np.random.Generator, values: Values) -> Values:
    """Turn values into meter readings: unchanged, clipped, rounded, counted, mostly 0, or with outliers."""
    kind = rng.random()
    values = _unit(values)
    if kind < 0.6:
        return values
    if kind < 0.7:  # clipped below or above
        low, high = np.quantile(values, [rng.uniform(0, 0.4), rng.uniform(0.85, 1.0)])
        return np.asarray(np.clip(values, low, high))
    if kind < 0.8:  # counts
        rate = np.exp(rng.uniform(-2, 4)) * np.maximum(0.02, values - np.quantile(values, rng.uniform(0, 0.1)))
        return np.asarray(rng.poisson(rate), dtype=np.float64)
    if kind < 0.87:  # rarely not 0
        often = rng.uniform(0.05, 0.7) * np.clip(1 + 0.5 * values, 0.1, 2)
        size = np.exp(rng.uniform(0, 1.0) * rng.normal(size=len(values))) * np.maximum(0.1, 1 + 0.3 * values)
        return np.round(3 * size + 0.5) * (rng.random(len(values)) < often)
    if kind < 0.93:  # rounded
        return np.round(values * rng.uniform(1, 10))
    spikes = rng.random(len(values)) < rng.uniform(0.001, 0.02)
    return np.asarray(values + spikes * rng.choice([-1, 1, 1]) * rng.exponential(4, size=len(values)))


def _unit(values: Values) -> Values:
    """Centre and scale to unit spread; constants become 0."""
    spread = values.std()
    return np.asarray((values - values.mean()) / (spread if spread > 1e-9 else 1.0))
