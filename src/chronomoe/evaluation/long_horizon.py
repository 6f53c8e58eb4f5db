"""The long-horizon protocol (Zhou et al., 2021, https://arxiv.org/abs/2012.07436): errors in the train rows' units."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from chronomoe.data.domains import Domain
from chronomoe.data.series import Series
from chronomoe.errors import InputError
from chronomoe.pipeline import ChronoMoEPipeline

HORIZONS = (96, 192, 336, 720)
"""Those that papers report."""


class LongHorizonScore(NamedTuple):
    """Errors of the median over all windows, steps and series of one horizon."""

    horizon: int
    mse: float
    mae: float
    windows: int
    """Of all series together."""


def long_horizon(
    model: PreTrainedModel | ChronoMoEPipeline,
    domain: Domain,
    *,
    horizons: Sequence[int] = HORIZONS,
    context_length: int = 512,
    stride: int = 1,
    batch_size: int = 256,
) -> list[LongHorizonScore]:
    """Score a model on the test rows of a domain, every variate z-scored by its train rows and forecast on its own.

    Windows start every ``stride`` rows, and none is left out at the end. Papers take a stride of 1; a longer one takes
    fewer windows of the same kind. Missing targets do not count.

    Raises:
        InputError: the test rows are shorter than a horizon, or a length is below 1.
    """
    for name, value in (("context_length", context_length), ("stride", stride), *(("horizon", h) for h in horizons)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    pipeline = model if isinstance(model, ChronoMoEPipeline) else ChronoMoEPipeline(model)
    pipeline.model.eval()
    rows = [(values, domain.split(series)) for series in domain.series for values in _z_scored(series, domain)]
    scores = []
    for horizon in horizons:
        cuts = [
            (values, cutoff)
            for values, stops in rows
            for cutoff in range(max(stops.validation, 1), stops.test - horizon + 1, stride)
        ]
        if not cuts:
            raise InputError(f"the test rows of {domain.name!r} are fewer than the horizon {horizon}; shorten it")
        error = np.concatenate(
            [
                _errors(pipeline, cuts[start : start + batch_size], context_length, horizon)
                for start in range(0, len(cuts), batch_size)
            ]
        )
        scores.append(LongHorizonScore(horizon, float(np.nanmean(error**2)), float(np.nanmean(abs(error))), len(cuts)))
    return scores


def _z_scored(series: Series, domain: Domain) -> list[NDArray[np.float32]]:
    train = series.target[:, domain.split(series).rows("train")].astype(np.float64)
    mean, spread = np.nanmean(train, axis=1, keepdims=True), np.nanstd(train, axis=1, keepdims=True)
    return list(((series.target - mean) / np.where(spread > 0, spread, 1.0)).astype(np.float32))


def _errors(
    pipeline: ChronoMoEPipeline, cuts: Sequence[tuple[NDArray[np.float32], int]], context_length: int, horizon: int
) -> NDArray[np.float64]:
    contexts = [values[max(0, cutoff - context_length) : cutoff] for values, cutoff in cuts]
    _, median = pipeline.predict_quantiles(contexts, prediction_length=horizon, batch_size=len(cuts))
    target = np.stack([values[cutoff : cutoff + horizon] for values, cutoff in cuts])
    return np.asarray(np.concatenate([one.numpy() for one in median]) - target, dtype=np.float64)
