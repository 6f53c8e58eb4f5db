import numpy as np
import pytest

from chronomoe.pretraining import composing
from chronomoe.pretraining.composing import compose, level, profile, walk

SEEDS = range(300)


def generator(seed):
    return np.random.default_rng([0, seed])


def correlation(values, lag):
    return np.corrcoef(values[lag:], values[:-lag])[0, 1]


@pytest.mark.parametrize("steps", [1, 2, 17, 300])
def test_a_series_of_any_length_is_finite(steps):
    for seed in SEEDS:
        values = compose(generator(seed), steps)
        assert values.shape == (steps,)
        assert values.dtype == np.float32
        assert np.isfinite(values).all()


def test_the_same_seed_composes_the_same_bits_and_another_one_other_series():
    series = [compose(generator(seed), 200) for seed in range(40)]
    for seed, values in enumerate(series):
        np.testing.assert_array_equal(compose(generator(seed), 200), values)
    assert len(np.unique(series, axis=0)) == len(series)


def test_hardly_any_series_is_constant_and_none_explodes():
    series = np.stack([compose(generator(seed), 400) for seed in SEEDS])
    assert (series.std(axis=1) > 0.1).mean() > 0.95
    centred = np.abs(series - series.mean(axis=1, keepdims=True))
    assert (centred.max(axis=1) <= 60 * np.maximum(series.std(axis=1), 0.1)).all()


@pytest.mark.parametrize("period", [2, 3, 7, 24, 288])
def test_a_profile_is_one_cycle_of_zero_mean_and_unit_spread(period):
    for seed in range(60):
        shape = profile(generator(seed), period)
        assert shape.shape == (period,)
        assert abs(shape.mean()) < 1e-9
        assert shape.std() == pytest.approx(1) or not shape.any()


@pytest.mark.parametrize("steps", [2, 300])
def test_a_level_has_zero_mean_and_unit_spread(steps):
    for seed in range(60):
        slow = level(generator(seed), steps)
        assert slow.shape == (steps,)
        assert abs(slow.mean()) < 1e-9
        assert slow.std() == pytest.approx(1) or not slow.any()


@pytest.mark.parametrize("steps", [1, 2, 400])
def test_a_walk_is_finite_and_of_unit_spread(steps):
    for seed in range(60):
        values = walk(generator(seed), steps)
        assert values.shape == (steps,)
        assert np.isfinite(values).all()
        assert values.std() == pytest.approx(1) or not values.any()


def test_the_next_value_of_a_walk_is_best_guessed_by_its_last_one():
    last, season = [], []
    for seed in range(100):
        values = walk(generator(seed), 1000)
        last.append(np.abs(values[1:] - values[:-1]).mean())
        season.append(np.abs(values[7:] - values[:-7]).mean())
    assert np.median(np.array(season) / np.array(last)) > 2  # of independent steps: the root of 7


def test_a_level_changes_slowly():
    steps = [np.abs(np.diff(level(generator(seed), 1000))) for seed in range(60)]
    assert np.median([np.median(step) for step in steps]) < 0.05


def test_calendar_series_repeat_after_a_week_and_some_after_a_day():
    """A week is up to 2016 steps long: some levels of the size of days make the repetition inexact."""
    weekly, daily = [], []
    for seed in range(60):
        rng = generator(seed)
        day = int(generator(seed).choice(composing.DAYS))
        season = composing._calendar(rng, 4 * composing.DAYS_OF_WEEK * day)
        weekly.append(correlation(season, composing.DAYS_OF_WEEK * day))
        daily.append(correlation(season, day))
    assert np.mean(np.array(weekly) > 0.999) > 0.4
    assert np.median(weekly) > 0.95
    assert 0.15 < np.mean(np.array(daily) > 0.999) < 0.6


@pytest.mark.parametrize("period", [7.0, 12.0, 52.0])
def test_a_cycle_repeats_after_its_period(period):
    for seed in range(30):
        rng = generator(seed)
        season = composing._cycle(rng, 2 * int(period), period=period)  # too short for a slower cycle as well
        np.testing.assert_allclose(season[int(period) :], season[: int(period)], atol=1e-9)


def test_a_cycle_of_a_period_that_is_not_whole_keeps_its_pace():
    for seed in range(10):
        season = composing._cycle(generator(seed), 42, period=20.5)
        np.testing.assert_allclose(season[-1], season[0], atol=1e-9)  # two periods later


def test_noise_has_unit_spread_on_average():
    spread = [composing._noise(generator(seed), 2000).std() for seed in range(200)]
    assert 0.7 < np.median(spread) < 1.3


def test_what_meters_say_has_counts_zeros_and_limits():
    kinds = {"whole": 0, "often 0": 0, "at a limit": 0}
    for seed in SEEDS:
        said = composing._measure(generator(seed), np.sin(np.arange(500.0)))
        whole = bool((said == np.round(said)).all())
        kinds["whole"] += whole
        kinds["often 0"] += whole and np.mean(said == 0) > 0.3
        kinds["at a limit"] += not whole and np.mean(said == said.min()) + np.mean(said == said.max()) > 0.1
    assert all(count >= 5 for count in kinds.values()), kinds
    assert kinds["whole"] < 0.4 * len(SEEDS)
