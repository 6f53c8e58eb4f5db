"""ChronoMoE beside AutoGluon's own models: zero-shot, fine-tuned, and in an ensemble that is loaded again."""

import tempfile
from importlib.resources import files

import pandas as pd
from autogluon.timeseries import TimeSeriesDataFrame, TimeSeriesPredictor

from chronomoe.integrations.autogluon import ChronoMoEModel


def main(steps: int = 100) -> None:
    wide = pd.read_parquet(str(files("chronomoe") / "assets/demo/pedestrians.parquet")).iloc[-1000:, :4]
    frame = wide.melt("timestamp", var_name="item_id", value_name="target")
    frame["weekend"] = (frame["timestamp"].dt.dayofweek > 4).astype(float)
    train, test = TimeSeriesDataFrame.from_data_frame(frame).train_test_split(24)

    with tempfile.TemporaryDirectory() as folder:
        options = {"freq": "h", "known_covariates_names": ["weekend"], "path": folder, "verbosity": 0}
        predictor = TimeSeriesPredictor(prediction_length=24, **options)
        tuned = {"fine_tune": True, "fine_tune_steps": steps, "fine_tune_lr": 1e-4, "ag_args": {"name_suffix": "Tuned"}}
        predictor.fit(train, hyperparameters={ChronoMoEModel: [{"model_path": "tiny"}, tuned], "SeasonalNaive": {}})
        loaded = TimeSeriesPredictor.load(folder)
        print(loaded.leaderboard(test)[["model", "score_test", "score_val"]])
        print(loaded.predict(train, known_covariates=test.slice_by_timestep(-24, None)[["weekend"]]).head())


if __name__ == "__main__":
    main()
