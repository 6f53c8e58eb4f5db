import numpy as np
import pytest

from chronomoe.pretraining.grouping import (
    SIMPLE,
    Driving,
    couple,
    covariate_window,
    delay,
    multivariate_window,
    spread_events,
    unit,
    without_covariates,
)

LENGTH, HORIZON = 200, 40
KNOWN = Driving(known_share=1.0)


def generator(seed):
    return np.random.default_rng([1, seed])


def walks(seed, size, steps=LENGTH + HORIZON):
    return np.random.default_rng([2, seed]).normal(size=(size, steps)).cumsum(axis=1)


def noise(seed, steps=LENGTH + HORIZON):
    rng = np.random.default_rng([3, seed])
    return lambda: rng.normal(size=steps)


def explained(target, rows):
    """Share of the target's variance that is linear in the rows and their last twelve values."""
    late = [delay(row, lag) for row in rows for lag in range(13)]
    features = np.stack([*late, *(np.maximum(row, 0) for row in rows), np.ones_like(target)], axis=1)[12:]
    residual = target[12:] - features @ np.linalg.lstsq(features, target[12:], rcond=None)[0]
    return 1 - residual.var() / target[12:].var()


def test_coupled_rows_tell_more_of_each_other_than_rows_that_are_not():
    def told(rows):
        strongest = []
        for row in range(1, len(rows)):
            lagged = [
                np.corrcoef(rows[row][48:], delay(rows[other], lag)[48:])[0, 1]
                for other in range(row)
                for lag in range(48)
            ]
            strongest.append(np.abs(lagged).max())
        return max(strongest)

    rows = [np.random.default_rng([4, seed]).normal(size=(3, 400)) for seed in range(40)]
    apart = [told(row) for row in rows]
    together = [told(couple(generator(seed), row)) for seed, row in enumerate(rows)]
    assert max(apart) < 0.25
    assert np.mean(np.array(together) > 0.4) > 0.6


def test_coupled_rows_keep_their_number_and_are_finite_where_rows_are_missing_or_constant():
    rows = walks(0, 4)
    rows[1, 20:90] = np.nan
    rows[2] = 3.0
    for seed in range(20):
        coupled = couple(generator(seed), rows)
        assert coupled.shape == rows.shape
        assert np.isfinite(coupled).all()
    assert np.isnan(rows[1, 20:90]).all()  # what was passed in is left alone
    np.testing.assert_array_equal(rows[2], 3.0)


def test_all_rows_of_a_multivariate_window_are_targets():
    rows = walks(0, 3)
    rows[1, 5] = rows[2, LENGTH + 3] = np.nan
    window = multivariate_window(rows, length=LENGTH)
    np.testing.assert_array_equal(np.concatenate([window.context, window.target], axis=1), rows.astype(np.float32))
    assert np.isnan(window.known).all()
    assert window.known.shape == window.target.shape == (3, HORIZON)


def test_a_window_does_not_share_memory_with_its_rows():
    rows = np.ones((1, LENGTH + HORIZON), dtype=np.float32)
    rows.setflags(write=False)  # as those of a corpus on disk
    window = multivariate_window(rows, length=LENGTH)
    window.context[:] = 0
    assert (rows == 1).all()


@pytest.mark.parametrize("num_covariates", [1, 2, 5])
@pytest.mark.parametrize("known_share", [0.0, 0.5, 1.0])
def test_a_covariate_window_has_one_target_then_past_only_then_known_rows(num_covariates, known_share):
    counts = []
    for seed in range(30):
        window = covariate_window(
            generator(seed),
            noise(seed),
            num_covariates=num_covariates,
            length=LENGTH,
            driving=Driving(known_share=known_share),
        )
        assert window.context.shape == (1 + num_covariates, LENGTH)
        assert np.isfinite(window.context).all()
        assert np.isfinite(window.target[0]).all()
        assert np.isnan(window.target[1:]).all()  # no loss is taken on covariates
        assert np.isnan(window.known[0]).all()  # the target is not given away
        known = np.isfinite(window.known)
        np.testing.assert_array_equal(known.any(axis=1), known.all(axis=1))
        assert (np.diff(known.all(axis=1).astype(int)) >= 0).all()
        counts.append(known.all(axis=1).sum())
    share = np.mean(counts) / num_covariates
    assert share == known_share if known_share in (0, 1) else abs(share - known_share) < 0.2


def test_known_covariates_drive_the_target_and_other_series_do_not():
    """The target itself is white noise: what can be told about its future, the covariates told."""
    own, others = [], []
    for seed in range(60):
        window = covariate_window(generator(seed), noise(seed), num_covariates=1, length=LENGTH, driving=KNOWN)
        covariate = np.concatenate([window.context[1:], window.known[1:]], axis=1).astype(np.float64)
        target = np.concatenate([window.context[0], window.target[0]]).astype(np.float64)
        own.append(explained(target, covariate))
        others.append(explained(target, np.random.default_rng([5, seed]).normal(size=covariate.shape)))
    assert np.median(others) < 0.2
    assert np.mean(np.array(own) > 0.3) > 0.5
    assert np.mean(np.array(own) < 0.2) > 0.05  # some drive nothing, so that a model learns to leave them alone


def test_the_future_of_a_known_covariate_matters_to_the_future_of_the_target():
    gains = []
    for seed in range(40):
        window = covariate_window(generator(seed), noise(seed), num_covariates=1, length=LENGTH, driving=KNOWN)
        whole = np.concatenate([window.context[1], window.known[1]]).astype(np.float64)
        past, future = np.vander(whole[:LENGTH], 3), np.vander(whole[LENGTH:], 3)
        fitted = future @ np.linalg.lstsq(past, window.context[0].astype(np.float64), rcond=None)[0]
        gains.append(1 - np.square(window.target[0] - fitted).mean() / np.square(window.target[0]).mean())
    assert np.mean(np.array(gains) > 0.3) > 0.3


def test_the_same_seed_draws_the_same_covariate_window():
    first, second = (covariate_window(generator(3), noise(3), num_covariates=3, length=LENGTH) for _ in range(2))
    for left, right in zip(first, second, strict=True):
        np.testing.assert_array_equal(left, right)


def test_a_window_without_its_covariates_keeps_the_target_alone():
    window = covariate_window(generator(0), noise(0), num_covariates=2, length=LENGTH, driving=KNOWN)
    alone = without_covariates(window)
    np.testing.assert_array_equal(alone.context, window.context[:1])
    np.testing.assert_array_equal(alone.target, window.target[:1])
    assert alone.known.shape == (1, HORIZON)
    assert np.isnan(alone.known).all()


def test_a_delayed_row_repeats_its_oldest_value():
    np.testing.assert_array_equal(delay(np.array([5.0, 6.0, 7.0, 8.0]), 2), [5, 5, 5, 6])
    np.testing.assert_array_equal(delay(np.array([5.0, 6.0]), 0), [5, 6])


def test_unit_rows_have_zero_mean_and_unit_spread_and_missing_steps_at_the_mean():
    rows = np.array([[0.0, 2.0, 0.0, 2.0], [1.0, np.nan, 3.0, np.nan], [7.0, 7.0, 7.0, 7.0]])
    scale = np.sqrt(0.5)  # of 1 2 3 2
    np.testing.assert_allclose(unit(rows), [[-1, 1, -1, 1], [-1 / scale, 0, 1 / scale, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("chance", [0.0, 0.05])
def test_events_are_0_or_1_and_there_is_at_least_one(chance):
    for seed in range(30):
        events = spread_events(generator(seed), 60, chance=chance)
        assert events.shape == (60,)
        assert set(np.unique(events)) <= {0.0, 1.0}
        assert events.any()


@pytest.mark.parametrize(("positive_share", "sign"), [(1.0, 1), (0.0, -1)])
def test_effects_have_the_sign_that_is_asked_for(positive_share, sign):
    slopes = []
    for seed in range(40):
        window = covariate_window(
            generator(seed),
            noise(seed),
            num_covariates=1,
            length=LENGTH,
            driving=KNOWN,
            positive_share=positive_share,
        )
        target, covariate = unit(window.context)
        slopes.append((target * covariate).mean())
    assert sign * np.mean(slopes) > 0.1


def test_simple_effects_explain_more_of_the_target():
    shares = {}
    for driving in (KNOWN, SIMPLE):
        shares[driving] = []
        for seed in range(60):
            window = covariate_window(generator(seed), noise(seed), num_covariates=1, length=LENGTH, driving=driving)
            target, covariate = unit(window.context)
            shares[driving].append((target * covariate).mean() ** 2)
    assert np.mean(shares[SIMPLE]) > 1.3 * np.mean(shares[KNOWN])
