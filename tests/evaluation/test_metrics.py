import time

import fev.metrics
import numpy as np
import pytest

from chronomoe.errors import InputError
from chronomoe.evaluation.metrics import (
    ERRORS,
    WindowScores,
    aggregate,
    bootstrap_relative,
    concatenate,
    geometric_mean,
    relative,
    score_windows,
    seasonal_error,
)

LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9)
SEASONALITY = 5


def made_up(seed, *, windows=40, horizon=7, per_series=4, noise=1.0):
    """Contexts, targets with gaps and zeros, and unordered quantiles."""
    rng = np.random.default_rng(seed)
    context = rng.normal(size=(windows, 30)).cumsum(axis=1)
    context[rng.random(context.shape) < 0.1] = np.nan
    context[0] = 3.0  # constant: the seasonal error is 0
    context[1, 2:] = np.nan  # no pair left
    target = rng.normal(size=(windows, horizon)) * 10
    target[rng.random(target.shape) < 0.1] = np.nan
    target[rng.random(target.shape) < 0.1] = 0.0
    target[2, 3] = 0.0
    quantiles = target[:, None] + noise * rng.normal(size=(windows, len(LEVELS), horizon))
    quantiles = np.where(np.isnan(quantiles), 0.0, quantiles)
    quantiles[2, :, 3] = 0.0  # no error where the target is 0
    return context, target, quantiles, np.arange(windows) // per_series


def scored(seed, **options):
    context, target, quantiles, series = made_up(seed, **options)
    scale = seasonal_error(context, seasonality=SEASONALITY)
    return score_windows(quantiles, target, levels=LEVELS, seasonal_error=scale, series=series)


def rivals(seed, *, shift=0.0, noise=(1.0, 2.0), **options):
    """Return scores of two models on the same windows."""
    context, target, _, series = made_up(seed, **options)
    scale = seasonal_error(context, seasonality=SEASONALITY)
    rng = np.random.default_rng(seed + 1)
    return [
        score_windows(
            np.nan_to_num(target[:, None] + shift + spread * rng.normal(size=(len(target), len(LEVELS), 1))),
            target,
            levels=LEVELS,
            seasonal_error=scale,
            series=series,
        )
        for spread in noise
    ]


@pytest.mark.parametrize("metric", ERRORS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # fev divides by 0 on the way
def test_metrics_equal_fevs(metric):
    context, target, quantiles, series = made_up(0)
    expected = fev.metrics.get_metric(metric).compute(
        y_true=target[..., None],
        y_pred=quantiles[:, LEVELS.index(0.5), :, None],
        y_past=context.reshape(-1, 1),
        y_past_lengths=np.full(len(context), context.shape[1]),
        q_pred=np.moveaxis(quantiles, 1, 2)[:, :, None],
        seasonality=SEASONALITY,
        quantile_levels=list(LEVELS),
    )
    scale = seasonal_error(context, seasonality=SEASONALITY)
    scores = score_windows(quantiles, target, levels=LEVELS, seasonal_error=scale, series=series)
    assert aggregate(scores)[metric] == pytest.approx(expected, rel=1e-12)


def test_coverage_counts_observed_steps_inside_the_outer_deciles():
    quantiles = np.tile(np.array([0.0, 1.0, 2.0])[None, :, None], (1, 1, 4))
    target = np.array([[0.0, 1.5, 3.0, np.nan]])
    scores = score_windows(
        quantiles, target, levels=(0.1, 0.5, 0.9), seasonal_error=np.ones(1), series=np.zeros(1, dtype=int)
    )
    assert aggregate(scores)["coverage80"] == pytest.approx(2 / 3)


def test_scores_of_one_window_by_hand():
    quantiles = np.array([[[1.0], [2.0], [4.0]]])
    scores = score_windows(
        quantiles, np.array([[3.0]]), levels=(0.1, 0.5, 0.9), seasonal_error=np.array([2.0]), series=np.array([0])
    )
    loss = 2 * (0.1 * 2 + 0.5 * 1 + 0.1 * 1) / 3
    errors = {"WQL": loss / 3, "MASE": 0.5, "SQL": loss / 2, "MAE": 1, "MSE": 1, "MAPE": 1 / 3}
    assert aggregate(scores) == pytest.approx(errors | {"coverage80": 1, "bias": -1 / 3})


def test_bias_is_above_zero_where_forecasts_are_too_high():
    target = np.array([[2.0, np.nan, 4.0]])
    quantiles = np.stack([np.nan_to_num(target[0]) + shift for shift in (0.0, 1.5, 3.0)])[None]
    scores = score_windows(
        quantiles, target, levels=(0.1, 0.5, 0.9), seasonal_error=np.ones(1), series=np.zeros(1, int)
    )
    assert aggregate(scores)["bias"] == pytest.approx(3.0 / 6.0)


def test_seasonal_error_by_hand():
    context = np.array([np.nan, 1.0, 2.0, 4.0, np.nan, 8.0])
    assert seasonal_error(context, seasonality=2) == pytest.approx((3 + 4) / 2)


def test_seasonal_error_of_a_short_context_is_not_a_number():
    assert np.isnan(seasonal_error(np.arange(3.0), seasonality=3))


def test_an_unobserved_window_adds_nothing():
    context, target, quantiles, series = made_up(3)
    scale = seasonal_error(context, seasonality=SEASONALITY)
    full = score_windows(quantiles[:-1], target[:-1], levels=LEVELS, seasonal_error=scale[:-1], series=series[:-1])
    target[-1] = np.nan
    with_empty = score_windows(quantiles, target, levels=LEVELS, seasonal_error=scale, series=series)
    assert aggregate(with_empty) == pytest.approx(aggregate(full))


def test_a_missing_forecast_is_noticed():
    context, target, quantiles, series = made_up(4)
    quantiles[5] = np.nan
    scale = seasonal_error(context, seasonality=SEASONALITY)
    scores = score_windows(quantiles, target, levels=LEVELS, seasonal_error=scale, series=series)
    assert np.isnan(aggregate(scores)["WQL"])
    assert np.isnan(aggregate(scores)["MAE"])


def test_joined_batches_score_as_one():
    whole = scored(5)
    parts = [WindowScores(*(column[rows] for column in whole)) for rows in (slice(0, 13), slice(13, None))]
    assert aggregate(concatenate(parts)) == pytest.approx(aggregate(whole))


def test_levels_without_the_median_are_refused():
    with pytest.raises(InputError, match=r"0\.1, 0\.5 and 0\.9"):
        score_windows(
            np.zeros((1, 2, 3)), np.zeros((1, 3)), levels=(0.1, 0.9), seasonal_error=np.ones(1), series=np.array([0])
        )


def test_geometric_mean_by_hand():
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert geometric_mean([0.0, 4.0]) == 0.0
    with pytest.raises(InputError, match="at least one value"):
        geometric_mean([])


@pytest.mark.parametrize("metric", ["WQL", "MASE", "MSE", "MAPE"])
def test_relative_is_the_geometric_mean_of_the_ratios(metric):
    pairs = {name: rivals(seed) for seed, name in enumerate("abc")}
    model, reference = ({name: pair[side] for name, pair in pairs.items()} for side in (0, 1))
    expected = np.prod([aggregate(model[name])[metric] / aggregate(reference[name])[metric] for name in "abc"]) ** (
        1 / 3
    )
    assert relative(model, reference, metric) == pytest.approx(expected)


def test_a_model_against_itself_is_one_in_every_draw():
    scores = {"a": scored(0), "b": scored(1, per_series=40)}
    assert bootstrap_relative(scores, scores, "WQL", draws=50, seed=0) == pytest.approx((1.0, 1.0, 1.0))


def test_the_interval_repeats_with_its_seed():
    model, reference = ({"a": side} for side in rivals(0))
    one, same, other = (bootstrap_relative(model, reference, "WQL", draws=100, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_resampling_agrees_with_a_plain_loop():
    model, reference = ({"a": side} for side in rivals(0, windows=60, per_series=7))
    top, bottom, series = model["a"].abs_error, reference["a"].abs_error, model["a"].series
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(3000):
        drawn: list[int] = []
        for number in rng.choice(np.unique(series), size=len(np.unique(series))):
            windows = np.flatnonzero(series == number)
            drawn.extend(rng.choice(windows, size=len(windows)))
        ratios.append(top[drawn].sum() / bottom[drawn].sum())
    interval = bootstrap_relative(model, reference, "MAE", draws=3000, seed=1)
    width = interval.high - interval.low
    assert (interval.low, interval.high) == pytest.approx(np.quantile(ratios, [0.025, 0.975]), abs=0.1 * width)


def test_windows_of_few_series_leave_more_doubt_than_windows_of_many():
    rng = np.random.default_rng(0)
    easier = np.repeat(rng.uniform(0.5, 1.5, size=8), 25)  # how well the model does differs by series
    error = rng.uniform(1, 2, size=200)
    wide, narrow = (
        bootstrap_relative(
            {"a": scored(0, windows=200)._replace(abs_error=easier * error, series=series)},
            {"a": scored(0, windows=200)._replace(abs_error=error, series=series)},
            "MAE",
            seed=0,
        )
        for series in (np.arange(200) // 25, np.arange(200))
    )
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    blank, hits = scored(0, windows=100, per_series=1), 0
    for seed in range(200):
        model = {"a": blank._replace(abs_error=0.8 * rng.gamma(4.0, size=100))}
        reference = {"a": blank._replace(abs_error=rng.gamma(4.0, size=100))}
        interval = bootstrap_relative(model, reference, "MAE", draws=300, seed=seed)
        hits += interval.low <= 0.8 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99


def test_thousands_of_windows_are_resampled_in_seconds():
    pairs = {name: rivals(seed, windows=1500, per_series=30) for seed, name in enumerate("abcd")}
    model, reference = ({name: pair[side] for name, pair in pairs.items()} for side in (0, 1))
    start = time.process_time()
    bootstrap_relative(model, reference, "WQL", draws=1000, seed=0)
    assert time.process_time() - start < 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scores: {"b": scores}, "same domains"),
        (lambda scores: {"a": scores._replace(series=scores.series[::-1])}, "same windows"),
        (lambda scores: {"a": scored(9)}, "same windows"),
    ],
)
def test_scores_of_other_windows_are_refused(change, message):
    scores = scored(0)
    with pytest.raises(InputError, match=message):
        relative({"a": scores}, change(scores), "WQL")


def test_an_unknown_metric_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'WQL'"):
        relative({"a": scored(0)}, {"a": scored(0)}, "wQL")
    with pytest.raises(InputError, match="Available: WQL"):
        relative({"a": scored(0)}, {"a": scored(0)}, "coverage80")
