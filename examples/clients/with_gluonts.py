"""Score ChronoMoE with GluonTS on the last day of a data set, then save and load the predictor."""

import tempfile
from importlib.resources import files
from pathlib import Path

import pandas as pd
from gluonts.dataset.pandas import PandasDataset
from gluonts.dataset.split import split
from gluonts.ev.metrics import MASE, MeanWeightedSumQuantileLoss
from gluonts.model import evaluate_model
from gluonts.model.predictor import Predictor

from chronomoe.integrations.gluonts import ChronoMoEPredictor


def main() -> None:
    wide = pd.read_parquet(str(files("chronomoe") / "assets/demo/pedestrians.parquet")).iloc[-1000:, :4]
    frame = wide.melt("timestamp", var_name="item_id", value_name="target")
    data = PandasDataset.from_long_dataframe(frame, item_id="item_id", timestamp="timestamp", freq="h")
    _, template = split(data, offset=-24)
    test = template.generate_instances(prediction_length=24)

    predictor = ChronoMoEPredictor(prediction_length=24, model_path="tiny")
    metrics = [MASE(), MeanWeightedSumQuantileLoss([0.1, 0.5, 0.9])]
    print(evaluate_model(predictor, test_data=test, metrics=metrics, seasonality=24))
    with tempfile.TemporaryDirectory() as folder:
        predictor.serialize(Path(folder))
        forecast = next(iter(Predictor.deserialize(Path(folder)).predict(test.input)))
    print(forecast.item_id, forecast.start_date, forecast.quantile(0.9)[:3])


if __name__ == "__main__":
    main()
