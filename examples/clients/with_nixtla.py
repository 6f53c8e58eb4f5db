"""Forecast and cross-validate a frame with Nixtla's columns; ``utilsforecast`` scores what comes back."""

from importlib.resources import files

import pandas as pd

from chronomoe.integrations.nixtla import ChronoMoEForecast


def main() -> None:
    wide = pd.read_parquet(str(files("chronomoe") / "assets/demo/pedestrians.parquet")).iloc[-1000:, :4]
    frame = wide.rename(columns={"timestamp": "ds"}).melt("ds", var_name="unique_id", value_name="y")

    model = ChronoMoEForecast("tiny")
    print(model.forecast(frame, h=24, level=[80, 95]).head())
    windows = model.cross_validation(frame, h=24, n_windows=3, step_size=24, level=[80])
    inside = windows["y"].between(windows["ChronoMoE-lo-80"], windows["ChronoMoE-hi-80"]).mean()
    error = (windows["y"] - windows["ChronoMoE"]).abs().mean()
    print(f"{windows['cutoff'].nunique()} windows: mean absolute error {error:.1f}, {inside:.0%} inside 80 %")


if __name__ == "__main__":
    main()
