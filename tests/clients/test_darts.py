import numpy as np
import pytest

from chronomoe import ChronoMoEPipeline, InputError
from client_data import HORIZON, LEVELS

pytest.importorskip("darts", reason="Darts is not installed; run make clients")

from darts import TimeSeries  # noqa: E402
from darts.utils.likelihood_models.torch import QuantileRegression  # noqa: E402

from chronomoe.integrations.darts import ChronoMoEModel  # noqa: E402

CONTEXT = 64
TRAINER = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "enable_model_summary": False}


@pytest.fixture
def make(mixture_folder, tmp_path):
    def build(**options):
        defaults = {"likelihood": QuantileRegression(LEVELS), "work_dir": str(tmp_path), "model_name": "moe"}
        defaults |= {"force_reset": True, "pl_trainer_kwargs": TRAINER, "model_path": str(mixture_folder)}
        return ChronoMoEModel(CONTEXT, HORIZON, **defaults | options)

    return build


@pytest.fixture
def series(promotions):
    """Targets that end before the horizon, and the covariate that is known over it."""
    frame, past = promotions
    options = {"time_col": "timestamp", "freq": "D"}
    pairs = []
    for item in ("s0", "s1", "s2"):
        target = TimeSeries.from_dataframe(past[past["item_id"] == item], value_cols="target", **options)
        promo = TimeSeries.from_dataframe(frame[frame["item_id"] == item], value_cols="promo", **options)
        pairs.append((target.astype(np.float32), promo.astype(np.float32)))
    return [list(part) for part in zip(*pairs, strict=True)]


def quantiles(forecasts):
    return np.stack([one.values() for one in forecasts])


def expected(folder, targets, promos):
    inputs = [
        {
            "target": target.values()[:, 0],
            "past_covariates": {"promo": promo.values()[:-HORIZON, 0]},
            "future_covariates": {"promo": promo.values()[-HORIZON:, 0]},
        }
        for target, promo in zip(targets, promos, strict=True)
    ]
    pipeline = ChronoMoEPipeline.from_pretrained(folder)
    options = {"prediction_length": HORIZON, "quantile_levels": LEVELS, "context_length": CONTEXT}
    found, _ = pipeline.predict_quantiles(inputs, **options)
    return np.stack([one[0].numpy() for one in found])


def test_quantiles_with_known_covariates_are_the_pipeline_s(make, series, mixture_folder):
    targets, promos = series
    model = make()
    model.fit(targets, future_covariates=promos)
    options = {"series": targets, "future_covariates": promos, "predict_likelihood_parameters": True}
    found = quantiles(model.predict(HORIZON, **options))
    np.testing.assert_allclose(found, expected(mixture_folder, targets, promos), rtol=1e-4, atol=1e-4)


def test_a_past_covariate_is_not_a_known_one(make, series):
    targets, promos = series
    options = {"series": targets, "predict_likelihood_parameters": True}
    plain, past, future = make(), make(), make()
    found = [
        plain.fit(targets).predict(HORIZON, **options),
        past.fit(targets, past_covariates=promos).predict(HORIZON, past_covariates=promos, **options),
        future.fit(targets, future_covariates=promos).predict(HORIZON, future_covariates=promos, **options),
    ]
    assert not np.allclose(quantiles(found[0]), quantiles(found[1]))
    assert not np.allclose(quantiles(found[1]), quantiles(found[2]))


def test_the_median_samples_backtests_and_float64(make, series):
    targets, _ = series
    model = make(likelihood=None)
    model.fit(targets)
    assert model.predict(HORIZON, series=targets[0]).n_components == 1
    wide = make(likelihood=None)
    wide.fit([one.astype(np.float64) for one in targets])
    found, other = model.predict(HORIZON, series=targets[0]), wide.predict(HORIZON, series=targets[0].astype(float))
    np.testing.assert_allclose(found.values(), other.values(), rtol=1e-3)
    sampled = make()
    sampled.fit(targets)
    assert sampled.predict(HORIZON, series=targets[0], num_samples=5).n_samples == 5
    whole = sampled.predict(HORIZON + 4, series=targets[0], num_samples=2)
    assert len(whole) == HORIZON + 4
    long = targets[0].append_values(targets[0].values()[:30])
    windows = model.historical_forecasts(long, forecast_horizon=4, retrain=False, stride=4, start=0.8)
    assert len(windows) > 1


def test_a_saved_model_is_loaded_and_fine_tuning_is_kept(make, series, tmp_path):
    targets, promos = series
    options = {"series": targets, "future_covariates": promos, "predict_likelihood_parameters": True}
    plain, tuned = make(), make(enable_finetuning=True, n_epochs=1, optimizer_kwargs={"lr": 1e-3}, batch_size=16)
    for model in (plain, tuned):
        model.fit(targets, future_covariates=promos)
    before = quantiles(plain.predict(HORIZON, **options))
    after = quantiles(tuned.predict(HORIZON, **options))
    assert not np.allclose(before, after)
    tuned.save(str(tmp_path / "tuned.pt"))
    loaded = ChronoMoEModel.load(str(tmp_path / "tuned.pt"), pl_trainer_kwargs=TRAINER)
    np.testing.assert_allclose(quantiles(loaded.predict(HORIZON, **options)), after, rtol=1e-5)


def test_levels_that_the_model_does_not_have_are_refused(make, series):
    with pytest.raises(InputError, match=r"quantiles must be some of \[0.1, .*, got \[0.05, 0.5, 0.95\]"):
        make(likelihood=QuantileRegression([0.05, 0.5, 0.95])).fit(series[0])
    with pytest.raises(InputError, match="likelihood must be a QuantileRegression or None, got a str"):
        make(likelihood="quantiles")
