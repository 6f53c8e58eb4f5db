"""Forecast a panel with sktime: medians, quantiles and an interval, all series at once."""

from importlib.resources import files

import pandas as pd

from chronomoe.integrations.sktime import ChronoMoEForecaster


def main() -> None:
    wide = pd.read_parquet(str(files("chronomoe") / "assets/demo/pedestrians.parquet")).iloc[-1000:, :4]
    long = wide.melt("timestamp", var_name="item_id", value_name="target")
    panel = long.set_index(["item_id", "timestamp"])
    weekend = pd.DataFrame({"weekend": panel.index.get_level_values(1).dayofweek > 4}, index=panel.index).astype(float)
    known = panel.index.get_level_values(1) >= wide["timestamp"].iloc[-24]

    forecaster = ChronoMoEForecaster("tiny").fit(panel[~known], X=weekend[~known])
    print(forecaster.predict(fh=range(1, 25), X=weekend[known]).head())
    print(forecaster.predict_quantiles(fh=range(1, 25), X=weekend[known], alpha=[0.1, 0.5, 0.9]).head())
    print(forecaster.predict_interval(fh=[1, 24], X=weekend[known], coverage=0.8))


if __name__ == "__main__":
    main()
