from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest
import torch

from chronomoe.data.domains import Domain
from chronomoe.data.series import Series
from chronomoe.data.split import Split
from chronomoe.data.windows import WindowConfig
from chronomoe.evaluation.baselines import average_scores, equal_average, oracle, seasonal_naive
from chronomoe.evaluation.metrics import WindowScores, score_windows
from chronomoe.evaluation.tasks import make_task

LEVELS = [0.1, 0.5, 0.9]


def naive(past, *, season, horizon):
    """Forecast what follows ``past``."""
    past = np.atleast_2d(np.asarray(past, dtype=np.float32))
    rows = np.concatenate([past, np.ones((len(past), horizon), dtype=np.float32)], axis=1)
    names = tuple(f"y{variate}" for variate in range(len(rows)))
    series = Series(item_id="s", start=pd.Timestamp("2024-01-01"), freq="h", target=rows, target_names=names)
    length = past.shape[1]
    cutoffs = Split(stops=(length, length, length + horizon))
    domain = Domain(name="d", series=[series], seasonality=season, cutoffs=cutoffs)
    config = WindowConfig(context_length=length, horizon=horizon, min_context_length=length)
    return seasonal_naive(make_task(domain, config), levels=LEVELS)


PERIODIC = [1, 2, 3, 4] * 10


def test_a_series_that_repeats_is_continued_without_spread():
    quantiles = naive(PERIODIC, season=4, horizon=6)
    np.testing.assert_array_equal(quantiles[0], [[1, 2, 3, 4, 1, 2]] * 3)


def test_the_last_season_is_repeated_from_any_phase():
    assert naive([*PERIODIC, 1, 2], season=4, horizon=4)[0, 1].tolist() == [3, 4, 1, 2]


def test_every_variate_repeats_its_own_season():
    median = naive([PERIODIC, [10 * value for value in PERIODIC]], season=4, horizon=4)[:, 1]
    assert median.tolist() == [[1, 2, 3, 4], [10, 20, 30, 40]]


def test_the_spread_is_that_of_seasonal_differences_and_grows_with_seasons_ahead():
    past = np.array([0.0, 0, 2, 2, 1, 1, 5, 5])
    quantiles = naive(past, season=2, horizon=4)[0]
    spread = np.std([2, 2, -1, -1, 4, 4])
    normal = NormalDist().inv_cdf(0.9)
    np.testing.assert_allclose(quantiles[1], [5, 5, 5, 5])
    np.testing.assert_allclose(quantiles[2] - 5, normal * spread * np.sqrt([1, 1, 2, 2]), rtol=1e-6)
    np.testing.assert_allclose(quantiles[0] - 5, 5 - quantiles[2], rtol=1e-6)


def test_a_missing_value_falls_back_a_season_and_then_to_the_last_value():
    nan = np.nan
    past = [1, nan, 3, 4] + [5, nan, nan, 8] + [nan, nan, nan, 9]
    assert naive(past, season=4, horizon=4)[0, 1].tolist() == [5, 9, 3, 9]


def test_a_context_shorter_than_a_season_still_gives_finite_forecasts():
    quantiles = naive([1, 2, 4], season=24, horizon=2)
    assert np.isfinite(quantiles).all()
    assert quantiles[0, 1].tolist() == [4, 4]


@pytest.fixture
def batch(make_context):
    return make_context(6, 64)


def test_the_equal_average_is_the_mean_of_the_experts_in_normalised_space(make_mixture, batch):
    mixture = make_mixture(routing={"top_k": 1})
    with torch.no_grad():
        found = equal_average(mixture)(batch, num_output_patches=2).normalized_preds
        slow = torch.stack([expert(batch, num_output_patches=2).normalized_preds for expert in mixture.experts])
    torch.testing.assert_close(found, slow.mean(dim=0), rtol=1e-4, atol=1e-4)


def test_the_equal_average_leaves_the_mixture_as_it_was(make_mixture, batch):
    mixture = make_mixture(routing={"top_k": 1})
    with torch.no_grad():
        before = mixture(batch, num_output_patches=1).quantile_preds
        equal_average(mixture)
        torch.testing.assert_close(mixture(batch, num_output_patches=1).quantile_preds, before, rtol=0, atol=0)
    assert mixture.top_k == 1


@pytest.fixture
def scores():
    """Scores of three models on the same ten windows."""
    rng = np.random.default_rng(0)
    target = rng.standard_normal((10, 5)) + 3
    return [
        score_windows(
            np.sort(target[:, None] + rng.standard_normal((10, 3, 5)), axis=1),
            target,
            levels=LEVELS,
            seasonal_error=np.ones(10),
            series=np.arange(10) // 2,
        )
        for _ in range(3)
    ]


def test_the_oracle_is_never_worse_than_any_expert_in_any_window(scores):
    best = oracle(scores)
    for one in scores:
        assert (best.quantile_loss <= one.quantile_loss).all()
    assert best.quantile_loss.sum() < min(one.quantile_loss.sum() for one in scores)


def test_the_oracle_takes_all_scores_of_a_window_from_one_expert(scores):
    best = oracle(scores)
    for window in range(10):
        chosen = min(scores, key=lambda one: one.quantile_loss[window])
        for name in WindowScores._fields:
            assert getattr(best, name)[window] == getattr(chosen, name)[window]


def test_the_oracle_of_one_expert_is_that_expert(scores):
    for found, expected in zip(oracle(scores[:1]), scores[0], strict=True):
        np.testing.assert_array_equal(found, expected)


def test_average_scores_are_means_window_by_window(scores):
    average = average_scores(scores)
    np.testing.assert_allclose(average.abs_error, sum(one.abs_error for one in scores) / 3)
    np.testing.assert_array_equal(average.series, scores[0].series)
    np.testing.assert_array_equal(average.observed, scores[0].observed)
