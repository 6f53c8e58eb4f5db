"""Models that are not ours, on the same windows: any that gives quantiles, and the classical ones of statsforecast."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import pandas as pd
from jaxtyping import Float
from transformers import PreTrainedModel

from chronomoe.errors import InputError, extra
from chronomoe.evaluation.baselines import seasonal_naive
from chronomoe.evaluation.comparison import EXTERNAL, NAIVE, Comparison, Row
from chronomoe.evaluation.metrics import WindowScores
from chronomoe.evaluation.tasks import Task, forecast, score

Classical = Literal["AutoETS", "AutoTheta"]


@runtime_checkable
class Forecaster(Protocol):
    """Anything that gives quantiles: a statistical model, another project's, a service behind a client."""

    def __call__(self, task: Task, levels: Sequence[float]) -> Float[np.ndarray, "row quantile horizon"]:
        """Forecast every row of a task, one for each target variate of each window, from what the windows hold."""
        ...


def own_forecaster(model: PreTrainedModel) -> Forecaster:
    """Return a forecaster of one of our models or of Chronos-2, at some of its own levels."""
    own = [round(level, 6) for level in model.chronos_config.quantiles]

    def call(task: Task, levels: Sequence[float]) -> Float[np.ndarray, "row quantile horizon"]:
        unknown = [level for level in levels if round(level, 6) not in own]
        if unknown:
            raise InputError(f"the model forecasts at levels {own}, not at {unknown}; compare at levels that both have")
        return forecast(model, task)[:, [own.index(round(level, 6)) for level in levels]]

    return call


def classical(name: Classical) -> Forecaster:
    """Return a model of statsforecast, fitted to each context alone, with normal intervals.

    AutoETS: Hyndman et al., 2002, https://doi.org/10.1016/S0169-2070(01)00110-8. AutoTheta: Fiorucci et al., 2016,
    https://doi.org/10.1016/j.ijforecast.2016.02.005. Gaps are filled by straight lines; covariates are not used; where
    no model can be fitted the seasonal naive forecast stands in, as the library's fallback.

    Raises:
        InputError: statsforecast is not installed.
    """
    with extra("baselines"):
        from statsforecast import StatsForecast, models

    def call(task: Task, levels: Sequence[float]) -> Float[np.ndarray, "row quantile horizon"]:
        season = task.domain.seasonality
        fallback = models.SeasonalNaive(season_length=season)
        fitted = StatsForecast([getattr(models, name)(season_length=season)], freq=1, fallback_model=fallback)
        widths = sorted({width for level in levels if (width := _width(level))})
        found = fitted.forecast(df=_long(task), h=task.horizon, level=widths)
        columns = [_column(name, level) for level in levels]
        stacked = found.sort_values(["unique_id", "ds"])[columns].to_numpy().reshape(-1, task.horizon, len(levels))
        return np.sort(stacked.transpose(0, 2, 1), axis=1)

    return call


def _width(level: float) -> float:
    """Return the width in percent of the central interval that a quantile level bounds; 0 for the median."""
    return round(abs(200 * level - 100), 6)


def _column(name: str, level: float) -> str:
    return f"{name}-{'lo' if level < 0.5 else 'hi'}-{_width(level)}" if _width(level) else name


def _long(task: Task) -> pd.DataFrame:
    """Return the context of every row as a series of its own, without gaps: 0 throughout where nothing was observed."""
    parts = []
    for row, context in enumerate(task.contexts):
        past = pd.Series(context.astype(np.float64))
        past = past.loc[past.first_valid_index() :].interpolate(limit_direction="both").fillna(0.0)
        parts.append(pd.DataFrame({"unique_id": row, "ds": np.arange(len(past)), "y": past.to_numpy()}))
    return pd.concat(parts, ignore_index=True)


def compare_forecasters(
    forecasters: Mapping[str, Forecaster], tasks: Mapping[str, Task], *, levels: Sequence[float]
) -> tuple[Comparison, dict[str, float]]:
    """Score forecasters beside the seasonal naive forecast; return also the seconds that each took for a window."""
    every = {NAIVE: lambda task, levels: seasonal_naive(task, levels=levels), **forecasters}
    comparison, seconds = Comparison({}, tasks, levels), {}
    for name, call in every.items():
        row = comparison.rows[name] = Row("naive" if name == NAIVE else EXTERNAL, ())
        begin = time.perf_counter()
        for domain, task in tasks.items():
            row.test[domain] = score(task, call(task, levels), levels=list(levels))
        seconds[name] = (time.perf_counter() - begin) / sum(len(task.windows) for task in tasks.values())
    return comparison, seconds


def compare_on_sample(
    comparison: Comparison, forecasters: Mapping[str, Forecaster], *, limit: int
) -> tuple[Comparison, dict[str, float]]:
    """Score forecasters that are too slow for all windows on a sample, and every row of a comparison on the same.

    Args:
        comparison: whose test windows the sample is taken from, evenly spread.
        forecasters: by name.
        limit: windows of each domain, at most.
    """
    kept = {
        domain: np.unique(np.linspace(0, len(task.windows) - 1, min(limit, len(task.windows))).round().astype(int))
        for domain, task in comparison.tasks.items()
    }
    tasks = {domain: _part(task, kept[domain]) for domain, task in comparison.tasks.items()}
    found, seconds = compare_forecasters(forecasters, tasks, levels=comparison.levels)
    for name, row in comparison.rows.items():
        test = {domain: _rows(scores, comparison.tasks[domain], kept[domain]) for domain, scores in row.test.items()}
        found.rows[name] = Row(row.kind, row.needs, test=test)
    return found, seconds


def _part(task: Task, windows: np.ndarray) -> Task:
    rows = np.isin(task.window, windows)
    return replace(
        task,
        windows=[task.windows[window] for window in windows],
        places=[task.places[window] for window in windows],
        target=task.target[rows],
        scale=task.scale[rows],
        series=task.series[rows],
        window=np.searchsorted(windows, task.window[rows]),
    )


def _rows(scores: WindowScores, task: Task, windows: np.ndarray) -> WindowScores:
    rows = np.isin(task.window, windows)
    return WindowScores(*(column[rows] for column in scores))
