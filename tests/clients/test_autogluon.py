import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from chronomoe import ChronoMoEPipeline
from client_data import HORIZON, LEVELS

pytest.importorskip("autogluon.timeseries", reason="AutoGluon is not installed; run make clients")

from autogluon.timeseries import TimeSeriesDataFrame, TimeSeriesPredictor  # noqa: E402

from chronomoe.integrations.autogluon import ChronoMoEModel  # noqa: E402

TUNING = {"fine_tune": True, "fine_tune_steps": 2, "fine_tune_lr": 1e-2, "fine_tune_batch_size": 4}
RELOAD = """
import json, sys
import pandas as pd
assert not any(name.startswith("chronomoe") for name in sys.modules)
from autogluon.timeseries import TimeSeriesDataFrame, TimeSeriesPredictor

folder, past, ahead = sys.argv[1:]
predictor = TimeSeriesPredictor.load(folder)
past, ahead = (TimeSeriesDataFrame.from_data_frame(pd.read_parquet(path)) for path in (past, ahead))
found = {name: predictor.predict(past, ahead, model=name)["mean"].tolist() for name in predictor.model_names()}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def data(promotions):
    frame, past = promotions
    ahead = frame[~frame["timestamp"].isin(past["timestamp"])].drop(columns="target")
    return tuple(TimeSeriesDataFrame.from_data_frame(one) for one in (past, ahead))


@pytest.fixture(scope="module")
def predictor(data, mixture_folder, tmp_path_factory):
    """Zero-shot, both ways of fine-tuning, a baseline, and their ensemble."""
    own = {"model_path": str(mixture_folder)}
    return TimeSeriesPredictor(
        prediction_length=HORIZON,
        known_covariates_names=["promo"],
        quantile_levels=LEVELS,
        freq="D",
        path=str(tmp_path_factory.mktemp("autogluon") / "predictor"),
        verbosity=0,
    ).fit(
        data[0],
        hyperparameters={
            ChronoMoEModel: [
                own | {"ag_args": {"name_suffix": "Plain"}},
                own | TUNING | {"ag_args": {"name_suffix": "Lora"}},
                own | TUNING | {"fine_tune_mode": "full", "ag_args": {"name_suffix": "Full"}},
            ],
            "SeasonalNaive": {},
        },
    )


def test_every_model_and_the_ensemble_are_trained(predictor):
    names = predictor.model_names()
    assert {"ChronoMoEPlain", "ChronoMoELora", "ChronoMoEFull", "SeasonalNaive", "WeightedEnsemble"} <= set(names)
    assert set(predictor.leaderboard()["model"]) == set(names)


def test_forecasts_with_known_covariates_are_the_pipeline_s(predictor, data, mixture_folder):
    past, ahead = data
    found = predictor.predict(past, ahead, model="ChronoMoEPlain")
    pipeline = ChronoMoEPipeline.from_pretrained(mixture_folder)
    frames = [one.reset_index() for one in data]
    options = {"prediction_length": HORIZON, "quantile_levels": LEVELS, "cross_learning": True}
    expected = pipeline.predict_df(pd.DataFrame(frames[0]), pd.DataFrame(frames[1]), **options)
    names = [str(level) for level in LEVELS]
    np.testing.assert_allclose(found[names].to_numpy(), expected[names].to_numpy(), rtol=1e-4)
    other = ahead.assign(promo=1 - ahead["promo"])
    assert not np.allclose(predictor.predict(past, other, model="ChronoMoEPlain")["mean"], found["mean"])


def test_fine_tuned_models_differ(predictor, data):
    plain, lora, full = (
        predictor.predict(*data, model=f"ChronoMoE{name}")["mean"].to_numpy() for name in ("Plain", "Lora", "Full")
    )
    assert not np.allclose(plain, lora)
    assert not np.allclose(plain, full)


def test_a_process_that_never_imported_this_package_loads_the_predictor(predictor, data, tmp_path):
    paths = [str(tmp_path / name) for name in ("past.parquet", "ahead.parquet")]
    for one, path in zip(data, paths, strict=True):
        pd.DataFrame(one.reset_index()).to_parquet(path)
    command = [sys.executable, "-W", "ignore", "-c", RELOAD, predictor.path, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name in predictor.model_names():
        np.testing.assert_allclose(found[name], predictor.predict(*data, model=name)["mean"], rtol=1e-3)


def test_a_tuned_model_is_exported_whole(predictor, data, tmp_path):
    loaded = ChronoMoEPipeline.from_pretrained(predictor.export_model(tmp_path / "whole", model="ChronoMoELora"))
    assert (tmp_path / "whole" / "model.safetensors").is_file()
    assert type(loaded.model).__name__ == "DistilledMoE"


def test_the_name_stands_for_the_class(data, mixture_folder, tmp_path):
    predictor = TimeSeriesPredictor(prediction_length=HORIZON, freq="D", path=str(tmp_path / "p"), verbosity=0)
    predictor.fit(data[0], hyperparameters={"ChronoMoE": {"model_path": str(mixture_folder)}}, enable_ensemble=False)
    assert predictor.model_names() == ["ChronoMoE"]
