import pickle

import numpy as np
import pandas as pd
import pytest

from chronomoe import ChronoMoEPipeline, InputError
from client_data import HORIZON, LEVELS

pytest.importorskip("sktime", reason="sktime is not installed; run make clients")

from sktime.utils.estimator_checks import check_estimator  # noqa: E402

from chronomoe.integrations.sktime import ChronoMoEForecaster  # noqa: E402

FH = list(range(1, HORIZON + 1))


@pytest.fixture
def make(mixture_folder):
    def build(**options):
        return ChronoMoEForecaster(str(mixture_folder), **options)

    return build


@pytest.fixture
def panel(promotions):
    """Targets and covariates of three series, the past and what is known ahead."""
    frame, past = (one.set_index(["item_id", "timestamp"]) for one in promotions)
    ahead = frame.loc[~frame.index.isin(past.index), ["promo"]]
    return past[["target"]], past[["promo"]], ahead


def one(frame, item="s0"):
    return frame.loc[item].asfreq("D")


def expected(folder, y, X=None, ahead=None):
    entry = {"target": y["target"].to_numpy(np.float32)}
    if X is not None:
        entry["past_covariates"] = {"promo": X["promo"].to_numpy(np.float32)}
    if ahead is not None:
        entry["future_covariates"] = {"promo": ahead["promo"].to_numpy(np.float32)}
    pipeline = ChronoMoEPipeline.from_pretrained(folder)
    return pipeline.predict_quantiles([entry], prediction_length=HORIZON, quantile_levels=LEVELS)[0][0][0].numpy()


def test_quantiles_and_median_are_the_pipeline_s(make, panel, mixture_folder):
    y, X, ahead = (one(frame) for frame in panel)
    for past, future in ((None, None), (X, None), (X, ahead)):
        forecaster = make().fit(y, X=past)
        quantiles = forecaster.predict_quantiles(FH, X=future, alpha=LEVELS)
        values = expected(mixture_folder, y, past, future)
        assert quantiles.columns.tolist() == [("target", level) for level in LEVELS]
        np.testing.assert_allclose(quantiles.to_numpy(), values, rtol=1e-4, atol=1e-4)
        found = forecaster.predict(FH, X=future)
        assert found.index.equals(ahead.index)
        np.testing.assert_allclose(found["target"], values[:, 1], rtol=1e-4, atol=1e-4)


def test_a_panel_is_its_series(make, panel):
    y, X, ahead = panel
    found = make().fit(y, X=X).predict([2, 5], X=ahead)
    for item in ("s0", "s1", "s2"):
        alone = make().fit(one(y, item), X=one(X, item)).predict([2, 5], X=one(ahead, item))
        np.testing.assert_allclose(found.loc[item]["target"], alone["target"], rtol=1e-4, atol=1e-4)
        assert found.loc[item].index.equals(alone.index)


def test_intervals_come_from_the_quantiles(make, panel):
    y = one(panel[0])
    interval = make().fit(y).predict_interval(FH, coverage=0.8)
    quantiles = make().fit(y).predict_quantiles(FH, alpha=[0.1, 0.9])
    np.testing.assert_allclose(interval.to_numpy(), quantiles.to_numpy())


def test_a_fitted_forecaster_is_pickled(make, panel):
    forecaster = make().fit(one(panel[0]))
    loaded = pickle.loads(pickle.dumps(forecaster))
    pd.testing.assert_frame_equal(loaded.predict(FH), forecaster.predict(FH))


def test_an_update_lengthens_the_context(make, panel, mixture_folder):
    y = one(panel[0])
    forecaster = make().set_config(remember_data=False).fit(y[:60])
    found = forecaster.update(y[60:]).predict_quantiles(FH, alpha=LEVELS)
    np.testing.assert_allclose(found.to_numpy(), expected(mixture_folder, y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_fine_tuning_changes_the_forecast(make, panel, tmp_path, mode):
    y, X, ahead = panel
    options = {"num_steps": 2, "learning_rate": 1e-2, "output_dir": str(tmp_path), "finetune_mode": mode}
    tuned = make(fine_tune=options).fit(y, X=X, fh=FH).predict(X=ahead)
    assert not np.allclose(tuned, make().fit(y, X=X).predict(FH, X=ahead))


def test_what_is_missing_is_refused(make, panel):
    y, X, ahead = (one(frame) for frame in panel)
    with pytest.raises(InputError, match="fine-tuning needs a horizon: pass fh to fit"):
        make(fine_tune={}).fit(y)
    with pytest.raises(InputError, match="X was given to predict and not to fit"):
        make().fit(y).predict(FH, X=ahead)


def test_sktime_s_own_checks_pass():
    """Not that of the constructor, whose signature the checking of types hides here."""
    names = ["clone", "set_params", "persistence_via_pickle", "fit_idempotent", "predict_quantiles", "predict_interval"]
    checks = [f"test_{name}" for name in (*names, "predict_time_index_with_X", "update_predict_single")]
    assert check_estimator(ChronoMoEForecaster, tests_to_run=checks, raise_exceptions=True, verbose=False)
