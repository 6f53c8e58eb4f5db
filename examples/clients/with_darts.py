"""Forecast, backtest and fine-tune with Darts."""

from importlib.resources import files

import pandas as pd
from darts import TimeSeries
from darts.utils.likelihood_models.torch import QuantileRegression

from chronomoe.integrations.darts import ChronoMoEModel


def main(epochs: int = 1) -> None:
    wide = pd.read_parquet(str(files("chronomoe") / "assets/demo/pedestrians.parquet")).iloc[-600:, :3]
    series = TimeSeries.from_dataframe(wide, time_col="timestamp", freq="h").astype("float32")
    weekend = series.time_index.dayofweek > 4
    known = TimeSeries.from_times_and_values(series.time_index, weekend[:, None].astype("float32"))

    options = {"input_chunk_length": 336, "output_chunk_length": 24, "likelihood": QuantileRegression([0.1, 0.5, 0.9])}
    options |= {"model_path": "tiny", "pl_trainer_kwargs": {"accelerator": "cpu", "enable_progress_bar": False}}
    model = ChronoMoEModel(**options)
    model.fit(series[:-24], future_covariates=known)
    print(model.predict(24, predict_likelihood_parameters=True).to_dataframe().head())

    tuned = ChronoMoEModel(**options, enable_finetuning=True, n_epochs=epochs, optimizer_kwargs={"lr": 1e-5})
    tuned.fit(series[:-24], future_covariates=known, max_samples_per_ts=32)
    windows = tuned.historical_forecasts(
        series, future_covariates=known, start=-48, forecast_horizon=24, stride=24, retrain=False, num_samples=20
    )
    print(f"forecasts of {len(windows)} steps, the last {windows.end_time()}")


if __name__ == "__main__":
    main()
