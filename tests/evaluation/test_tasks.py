import numpy as np
import pandas as pd
import pytest

from chronomoe import ChronoMoEPipeline
from chronomoe.data.domains import Domain
from chronomoe.data.series import Series
from chronomoe.data.windows import WindowConfig
from chronomoe.errors import InputError
from chronomoe.evaluation.metrics import aggregate
from chronomoe.evaluation.tasks import forecast, make_task, pipeline_input, score

WINDOWS = WindowConfig(context_length=64, horizon=8, min_context_length=8)
LEVELS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


def make_domain(*targets, covariates=None, known=(), seasonality=4):
    series = [
        Series(
            item_id=f"s{index}",
            start=pd.Timestamp("2024-01-01"),
            freq="h",
            target=np.asarray(target, dtype=np.float32),
            target_names=tuple(f"y{variate}" for variate in range(len(target))),
            covariates={name: np.asarray(values, np.float32) for name, values in (covariates or {}).items()},
            known=known,
        )
        for index, target in enumerate(targets)
    ]
    return Domain(name="d", series=series, seasonality=seasonality)


@pytest.fixture
def values():
    """Two variates of 120 steps, of unlike levels."""
    time = np.arange(120)
    rng = np.random.default_rng(0)
    return np.stack([np.sin(time / 2) + 5, np.cos(time / 3) * 40 - 100]) + 0.1 * rng.standard_normal((2, 120))


@pytest.fixture
def covariates(values):
    time = np.arange(120)
    return {"past": np.sin(time / 5), "promo": (time % 7 == 0).astype(float)}


def test_rows_are_the_variates_of_each_window_in_order(values):
    task = make_task(make_domain(values, values + 1), WINDOWS)
    np.testing.assert_array_equal(task.window, np.repeat(np.arange(6), 2))
    np.testing.assert_array_equal(task.series, [0, 1] * 3 + [2, 3] * 3)
    assert [cutoff for _, cutoff in task.places] == [96, 104, 112] * 2
    for row, (owner, series) in enumerate(zip(task.window, task.series, strict=True)):
        place, cutoff = task.places[owner]
        source = task.domain.series[place].target[series % 2]
        np.testing.assert_array_equal(task.target[row], source[cutoff : cutoff + 8])


def test_a_row_is_scaled_by_the_seasonal_error_of_its_own_context(values):
    task = make_task(make_domain(values), WINDOWS)
    context = values[1, 96 - 64 : 96].astype(np.float32).astype(np.float64)
    assert task.scale[1] == pytest.approx(np.abs(context[4:] - context[:-4]).mean())


def test_limit_keeps_windows_spread_over_the_part(values):
    assert [cutoff for _, cutoff in make_task(make_domain(values), WINDOWS, limit=2).places] == [96, 112]


def test_windows_without_a_seen_past_or_future_are_left_out(values):
    values[:, 104:112] = np.nan
    task = make_task(make_domain(values), WINDOWS)
    assert [cutoff for _, cutoff in task.places] == [96, 112]


def test_a_domain_in_which_nothing_was_seen_is_refused(values):
    values[:, 96:] = np.nan
    with pytest.raises(InputError, match="no test window of domain 'd' has observed values both before and after"):
        make_task(make_domain(values), WINDOWS)


def test_a_window_keeps_past_and_known_covariates_apart(values, covariates):
    task = make_task(make_domain(values, covariates=covariates, known=("promo",)), WINDOWS)
    entry = pipeline_input(task.windows[0], task.domain.series[0])
    assert entry["target"].shape == (2, 64)
    assert list(entry["past_covariates"]) == ["past", "promo"]
    assert list(entry["future_covariates"]) == ["promo"]
    np.testing.assert_array_equal(entry["future_covariates"]["promo"], covariates["promo"][96:104])


def test_a_window_whose_known_future_is_missing_is_forecast_beside_the_others(teacher, values, covariates):
    covariates["promo"][104:112] = np.nan
    task = make_task(make_domain(values, covariates=covariates, known=("promo",)), WINDOWS)
    assert forecast(teacher, task).shape == (6, 9, 8)


def test_forecasts_line_up_with_rows(teacher, values, covariates):
    """Each row as the pipeline forecasts its window alone: the same horizon, variates and covariates."""
    task = make_task(make_domain(values, values[::-1] * 2, covariates=covariates, known=("promo",)), WINDOWS)
    quantiles = forecast(teacher, task)
    assert quantiles.shape == (12, 9, 8)
    pipeline = ChronoMoEPipeline(teacher)
    for owner in (0, 2, 5):
        place, cutoff = task.places[owner]
        source = task.domain.series[place]
        past = {name: column[cutoff - 64 : cutoff] for name, column in source.covariates.items()}
        entry = {
            "target": source.target[:, cutoff - 64 : cutoff],
            "past_covariates": past,
            "future_covariates": {"promo": source.covariates["promo"][cutoff : cutoff + 8]},
        }
        alone = pipeline.predict([entry], prediction_length=8)[0].numpy()
        np.testing.assert_allclose(quantiles[task.window == owner], alone, rtol=1e-4, atol=1e-3)


def test_a_variate_whose_future_is_unknown_is_still_a_target(teacher, values):
    values[1, 104:112] = np.nan
    task = make_task(make_domain(values), WINDOWS)
    whole = make_task(make_domain(np.nan_to_num(values)), WINDOWS)
    quantiles = forecast(teacher, task)
    assert quantiles.shape == (6, 9, 8)
    np.testing.assert_allclose(quantiles[2:4], forecast(teacher, whole)[2:4], rtol=1e-4, atol=1e-3)
    assert score(task, quantiles, levels=LEVELS).observed.tolist() == [8, 8, 8, 0, 8, 8]


def test_a_horizon_beyond_one_pass_is_unrolled(teacher):
    wave = np.sin(np.arange(400) / 3)[None]
    config = WindowConfig(context_length=64, horizon=70, min_context_length=8)
    with pytest.warns(UserWarning, match="We recommend keeping prediction length <= 64"):
        assert np.isfinite(forecast(teacher, make_task(make_domain(wave), config))).all()


def test_a_perfect_forecast_scores_zero(values):
    task = make_task(make_domain(values), WINDOWS)
    perfect = np.repeat(task.target[:, None], 9, axis=1)
    assert aggregate(score(task, perfect, levels=LEVELS))["WQL"] == 0
