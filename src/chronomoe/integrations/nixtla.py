"""Forecasts and cross-validation with the arguments and the columns of Nixtla's ``statsforecast``."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from chronomoe.errors import InputError
from chronomoe.pipeline import ChronoMoEPipeline


class ChronoMoEForecast:
    """Forecast frames of ``unique_id``, ``ds`` and ``y``, all series of a frame at once.

    What it returns has the columns of ``StatsForecast``: the median under ``alias``, and the bounds of a central
    interval of 80 % as ``alias-lo-80`` and ``alias-hi-80`` for a ``level`` of 80. Further columns are covariates.

    Args:
        model: a pipeline, or what ``ChronoMoEPipeline.from_pretrained`` takes.
        freq: pandas' name of the step; read off the frame when None.
        alias: column of the forecast.
        batch_size: rows of a batch: variates and covariates count.
    """

    def __init__(
        self,
        model: ChronoMoEPipeline | str | Path = "tiny",
        *,
        freq: str | None = None,
        alias: str = "ChronoMoE",
        batch_size: int = 256,
    ) -> None:
        self.pipeline = model if isinstance(model, ChronoMoEPipeline) else ChronoMoEPipeline.from_pretrained(model)
        self.freq, self.alias, self.batch_size = freq, alias, batch_size

    def forecast(
        self,
        df: pd.DataFrame,
        h: int,
        *,
        X_df: pd.DataFrame | None = None,
        level: Sequence[float] | None = None,
        id_col: str = "unique_id",
        time_col: str = "ds",
        target_col: str = "y",
    ) -> pd.DataFrame:
        """Forecast ``h`` steps of each series, which come in ascending order of their ids.

        Covariates are known ahead where ``X_df`` holds them; the others end with ``df``.

        Raises:
            InputError: a level is not between 0 and 100, or ``predict_df`` refuses a frame.
        """
        bounds = self._bounds(level or ())
        found = self.pipeline.predict_df(
            df,
            future_df=X_df,
            id_column=id_col,
            timestamp_column=time_col,
            target=target_col,
            prediction_length=h,
            quantile_levels=sorted({*bounds.values(), 0.5}),
            batch_size=self.batch_size,
            freq=self.freq,
        )
        forecasts = {self.alias: found["predictions"]} | {name: found[str(one)] for name, one in bounds.items()}
        return found[[id_col, time_col]].assign(**forecasts).sort_values(id_col, kind="stable", ignore_index=True)

    def cross_validation(
        self,
        df: pd.DataFrame,
        h: int,
        *,
        n_windows: int = 1,
        step_size: int = 1,
        level: Sequence[float] | None = None,
        id_col: str = "unique_id",
        time_col: str = "ds",
        target_col: str = "y",
    ) -> pd.DataFrame:
        """Forecast the last windows of each series, each from what came before it.

        All covariates count as known ahead, as in ``statsforecast``.

        Args:
            df: a row for every step.
            h: steps of a window.
            n_windows: how many, the last of them at the end of each series.
            step_size: steps from one window to the next.
            level: central intervals, in percent.
            id_col: column of ids.
            time_col: column of times.
            target_col: column to forecast.

        Returns:
            ``unique_id``, ``ds``, ``cutoff`` (the last time before the window), ``y`` and the columns of ``forecast``,
            by series and window.

        Raises:
            InputError: a series is too short, a number below 1, or ``forecast`` refuses what it gets.
        """
        for name, value in (("h", h), ("n_windows", n_windows), ("step_size", step_size)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        df = df.sort_values([id_col, time_col], ignore_index=True)
        needed = h + (n_windows - 1) * step_size + 1
        counts = df.groupby(id_col, observed=True).size()
        if not counts.empty and counts.min() < needed:
            raise InputError(
                f"{n_windows} windows of {h} steps, {step_size} apart, need series of at least {needed} steps; "
                f"{counts.idxmin()!r} has {counts.min()}; ask for less or leave it out"
            )
        names = {"id_col": id_col, "time_col": time_col, "target_col": target_col}
        to_end = df.groupby(id_col, observed=True).cumcount(ascending=False)
        has_covariates = set(df.columns) > {id_col, time_col, target_col}
        windows = []
        for window in reversed(range(n_windows)):
            end = window * step_size
            past, ahead = df[to_end >= end + h], df[to_end.between(end, end + h - 1)]
            known = ahead.drop(columns=target_col) if has_covariates else None
            cutoff = past.groupby(id_col, observed=True)[time_col].max().rename("cutoff")
            actual = ahead[[id_col, time_col, target_col]].join(cutoff, on=id_col)
            windows.append(
                actual.merge(self.forecast(past, h, X_df=known, level=level, **names), on=[id_col, time_col])
            )
        found = pd.concat(windows).sort_values([id_col, "cutoff"], kind="stable", ignore_index=True)
        return found[[id_col, time_col, "cutoff", target_col, *found.columns[4:]]]

    def _bounds(self, level: Sequence[float]) -> dict[str, float]:
        """Name the bounds of central intervals, the lower ones first, and their quantile levels."""
        if not all(0 < one < 100 for one in level):
            raise InputError(f"level must lie between 0 and 100 percent, got {list(level)}")
        sides = (("lo", -1), ("hi", 1))
        return {
            f"{self.alias}-{side}-{one:g}": round(0.5 + sign * one / 200, 6)
            for side, sign in sides
            for one in sorted(level)
        }
