"""Evaluation tasks: the test windows of a domain, forecasts of them, and their scores."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from transformers import PreTrainedModel

from chronomoe.data.domains import Domain
from chronomoe.data.series import Series
from chronomoe.data.split import Part
from chronomoe.data.windows import EvaluationWindows, Window, WindowConfig
from chronomoe.errors import InputError
from chronomoe.evaluation.metrics import WindowScores, score_windows, seasonal_error
from chronomoe.pipeline import ChronoMoEPipeline


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """Windows of one domain, a horizon apart, and what happened in them; one row for each target variate."""

    domain: Domain
    """Where they were cut."""
    windows: list[Window]
    """Contexts, covariates and targets."""
    target: Float[np.ndarray, "row horizon"]
    """What happened; NaN where unknown."""
    scale: Float[np.ndarray, " row"]
    """Seasonal error of each context."""
    series: Int[np.ndarray, " row"]
    """Which series (and variate) each row belongs to."""
    window: Int[np.ndarray, " row"]
    """Which window each row belongs to."""
    places: list[tuple[int, int]]
    """Series and cutoff of each window."""

    @property
    def variate(self) -> Int[np.ndarray, " row"]:
        """Which target variate of its window each row is."""
        return np.arange(len(self.window)) - np.searchsorted(self.window, self.window)

    @property
    def contexts(self) -> list[Float[np.ndarray, " time"]]:
        """Past values of each row."""
        return [self.windows[place].context[own] for place, own in zip(self.window, self.variate, strict=True)]

    @property
    def horizon(self) -> int:
        """Future steps."""
        return int(self.target.shape[1])


def make_task(
    domain: Domain,
    config: WindowConfig,
    *,
    part: Part = "test",
    limit: int | None = None,
    half: int | None = None,
    stride: int | None = None,
) -> Task:
    """Cut the windows of a part of a domain, less those in which nothing was observed before or after the cutoff.

    Cutoffs are ``stride`` steps apart, by default a horizon.
    Where a ``half`` of them holds nothing observed, all are taken.

    Raises:
        InputError: no series is long enough, or nothing was observed in any window.
    """
    found = EvaluationWindows(domain, config, part=part, limit=limit, half=half, stride=stride)
    windows: list[Window] = []
    places: list[tuple[int, int]] = []
    target, scale, series, owner = [], [], [], []
    for index, (place, cutoff) in enumerate(found.places):
        window = found[index]
        variates = len(domain.series[place].target)
        if not (np.isfinite(window.target[:variates]).any() and np.isfinite(window.context[:variates]).any()):
            continue
        for variate in range(variates):
            target.append(window.target[variate])
            scale.append(seasonal_error(window.context[variate], seasonality=domain.seasonality))
            series.append(place * variates + variate)
            owner.append(len(windows))
        windows.append(window)
        places.append((place, cutoff))
    if not windows and half is not None:
        return make_task(domain, config, part=part, limit=limit, stride=stride)
    if not windows:
        raise InputError(
            f"no {part} window of domain {domain.name!r} has observed values both before and after its cutoff; "
            "pass series with fewer missing values"
        )
    return Task(
        domain=domain,
        windows=windows,
        target=np.stack(target),
        scale=np.array(scale),
        series=np.array(series),
        window=np.array(owner),
        places=places,
    )


def pipeline_input(window: Window, source: Series) -> dict[str, Any]:
    """Return a window of a series as ``Chronos2Pipeline.predict`` takes it.

    Which covariates are known is the series' to say, not the values': a window whose known future happens to be all NaN
    has the same columns as its neighbours.
    """
    variates = len(source.target)
    past_only = [name for name in source.covariates if name not in source.known]
    rows = dict(enumerate((*past_only, *source.known), start=variates))  # as cut_window stacks them
    entry: dict[str, Any] = {"target": window.context[:variates]}
    if rows:
        entry["past_covariates"] = {name: window.context[row] for row, name in rows.items()}
        entry["future_covariates"] = {name: window.known[row] for row, name in rows.items() if name in source.known}
    return entry


def forecast(
    model: PreTrainedModel | ChronoMoEPipeline, task: Task, *, batch_size: int = 256
) -> Float[np.ndarray, "row quantile horizon"]:
    """Forecast all windows of a task, through the pipeline, so that any horizon and covariates work."""
    pipeline = model if isinstance(model, ChronoMoEPipeline) else ChronoMoEPipeline(model)
    pipeline.model.eval()
    sources = [task.domain.series[place] for place, _ in task.places]
    inputs = [pipeline_input(window, source) for window, source in zip(task.windows, sources, strict=True)]
    predictions = pipeline.predict(inputs, prediction_length=task.horizon, batch_size=batch_size)
    return np.concatenate([prediction.numpy() for prediction in predictions])


def score(task: Task, quantiles: Float[np.ndarray, "row quantile horizon"], *, levels: list[float]) -> WindowScores:
    """Score forecasts of a task."""
    return score_windows(quantiles, task.target, levels=levels, seasonal_error=task.scale, series=task.series)
