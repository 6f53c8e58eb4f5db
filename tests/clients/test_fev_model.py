import importlib.util
import json
from pathlib import Path

import datasets
import pandas as pd
import pytest

from client_data import HORIZON, LEVELS

fev = pytest.importorskip("fev", reason="fev is not installed; run make clients")
FOLDER = Path(__file__).parents[2] / "examples" / "clients" / "fev_models" / "chronomoe"


@pytest.fixture(scope="module")
def task(promotions, tmp_path_factory):
    rows = []
    for item, part in promotions[0].groupby("item_id"):
        columns = {"timestamp": part["timestamp"].to_numpy(), "target": part["target"], "promo": part["promo"]}
        rows.append({"id": item} | {name: list(values) for name, values in columns.items()})
    path = tmp_path_factory.mktemp("fev") / "data.parquet"
    datasets.Dataset.from_pandas(pd.DataFrame(rows)).to_parquet(path)
    return fev.Task(
        dataset_path=str(path),
        horizon=HORIZON,
        num_windows=2,
        quantile_levels=LEVELS,
        eval_metric="WQL",
        known_dynamic_columns=["promo"],
    )


def adapter():
    """Import the folder as the leaderboard's ``models/evaluate.py`` does."""
    spec = importlib.util.spec_from_file_location("models.chronomoe", FOLDER / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return fev.ForecastingModel.get_model_cls(FOLDER.name)


def test_the_adapter_folder_is_found_by_its_name_and_scored(task, mixture_folder):
    model = adapter()(**json.loads(json.dumps({"model_path": str(mixture_folder), "trained_on": ["m5_1D"]})))
    predictions = model.fit_predict(task)
    summary = task.evaluation_summary(predictions, "chronomoe", inference_time_s=model.inference_time)
    assert len(predictions) == 2
    assert summary["test_error"] > 0
    assert model.inference_time > 0
    assert model.training_time == 0
    assert model.trained_on_datasets == ["m5_1D"]
    assert (FOLDER / "requirements.txt").read_text().startswith("chronomoe[fev]==")


def test_known_covariates_count_and_fine_tuning_takes_training_time(task, mixture_folder, tmp_path):
    def predict(**options):
        model = adapter()(mixture_folder, **options)
        return model.fit_predict(task)[0]["target"]["predictions"], model.training_time

    plain, _ = predict()
    assert predict(as_univariate=True)[0] != plain
    tuned, seconds = predict(finetune={"num_steps": 2, "learning_rate": 1e-2, "output_dir": tmp_path})
    assert tuned != plain
    assert seconds > 0
