import numpy as np
import pandas as pd
import pytest

from chronomoe import ChronoMoEPipeline, InputError
from client_data import HORIZON, LEVELS

pytest.importorskip("gluonts", reason="GluonTS is not installed; run make clients")

from gluonts.dataset.common import ListDataset  # noqa: E402
from gluonts.dataset.split import split  # noqa: E402
from gluonts.ev.metrics import MeanWeightedSumQuantileLoss  # noqa: E402
from gluonts.model import evaluate_model  # noqa: E402
from gluonts.model.predictor import Predictor  # noqa: E402

from chronomoe.integrations.gluonts import ChronoMoEPredictor  # noqa: E402


@pytest.fixture(scope="module")
def predictor(mixture_folder):
    return ChronoMoEPredictor(prediction_length=HORIZON, model_path=str(mixture_folder), quantile_levels=LEVELS)


@pytest.fixture(scope="module")
def entries(promotions):
    parts = promotions[0].groupby("item_id")
    return [
        {
            "item_id": item,
            "start": pd.Period("2024-01-01", freq="D"),
            "target": part["target"].to_numpy(np.float32)[:-HORIZON],
            "feat_dynamic_real": part[["promo"]].to_numpy(np.float32).T,
        }
        for item, part in parts
    ]


def test_forecasts_are_the_pipeline_s(predictor, entries, mixture_folder):
    found = list(predictor.predict(entries))
    inputs = [
        {
            "target": entry["target"],
            "past_covariates": {"promo": entry["feat_dynamic_real"][0, :-HORIZON]},
            "future_covariates": {"promo": entry["feat_dynamic_real"][0, -HORIZON:]},
        }
        for entry in entries
    ]
    pipeline = ChronoMoEPipeline.from_pretrained(mixture_folder)
    expected, _ = pipeline.predict_quantiles(inputs, prediction_length=HORIZON, quantile_levels=LEVELS)
    for forecast, entry, values in zip(found, entries, expected, strict=True):
        assert forecast.item_id == entry["item_id"]
        assert forecast.start_date == pd.Period("2024-01-01", freq="D") + 96
        for place, level in enumerate(LEVELS):
            np.testing.assert_allclose(forecast.quantile(level), values[0, :, place], rtol=1e-4, atol=1e-4)


def test_covariates_known_ahead_or_not_change_the_forecast(predictor, entries):
    plain = [{key: value for key, value in entry.items() if key != "feat_dynamic_real"} for entry in entries]
    past = [
        entry | {"past_feat_dynamic_real": full["feat_dynamic_real"][:, :-HORIZON]}
        for entry, full in zip(plain, entries, strict=True)
    ]
    medians = [np.stack([one.quantile(0.5) for one in predictor.predict(data)]) for data in (plain, past, entries)]
    assert not np.allclose(medians[0], medians[1])
    assert not np.allclose(medians[1], medians[2])


def test_a_serialized_predictor_forecasts_the_same(predictor, entries, tmp_path):
    predictor.serialize(tmp_path)
    loaded = Predictor.deserialize(tmp_path)
    assert loaded == predictor
    for one, other in zip(predictor.predict(entries), loaded.predict(entries), strict=True):
        np.testing.assert_array_equal(one.forecast_array, other.forecast_array)


def test_gluonts_scores_it(predictor, entries):
    data = ListDataset([{key: entry[key] for key in ("start", "target")} for entry in entries], freq="D")
    _, template = split(data, offset=-HORIZON)
    pairs = template.generate_instances(prediction_length=HORIZON)
    scores = evaluate_model(predictor, test_data=pairs, metrics=[MeanWeightedSumQuantileLoss(LEVELS)], axis=None)
    assert float(scores.iloc[0, 0]) > 0


def test_variates_are_forecast_jointly(predictor, entries):
    target = np.stack([entry["target"] for entry in entries])
    (forecast,) = predictor.predict([{"start": entries[0]["start"], "target": target}])
    assert forecast.forecast_array.shape == (len(LEVELS), HORIZON, 3)


def test_covariates_that_end_too_early_are_refused(predictor, entries):
    short = entries[0] | {"feat_dynamic_real": entries[0]["feat_dynamic_real"][:, :-1]}
    with pytest.raises(InputError, match=r"feat_dynamic_real must have the shape \(feature, 104\), .* got \(1, 103\)"):
        list(predictor.predict([short]))
