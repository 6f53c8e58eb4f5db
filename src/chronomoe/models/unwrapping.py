"""Pipelines are taken wherever models are."""

from typing import Any

from chronos import BaseChronosPipeline
from chronos.chronos2 import Chronos2Model

from chronomoe.models.chronos2 import use_exact_group_attention


def model_of(forecaster: Any) -> Any:
    """Return the model inside a pipeline, stock or ours; a model is returned as it is."""
    return forecaster.model if isinstance(forecaster, BaseChronosPipeline) else forecaster


def exact_model_of(forecaster: Any) -> Any:
    """Return the same, where a stock ``Chronos2Model`` has been given the faster forward pass."""
    model = model_of(forecaster)
    return use_exact_group_attention(model) if type(model) is Chronos2Model else model
