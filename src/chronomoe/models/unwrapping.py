"""Pipelines are taken wherever models are."""

from typing import Any

from chronos import BaseChronosPipeline
from chronos.chronos2 import Chronos2Model
from torch import nn

from chronomoe.errors import InputError
from chronomoe.models.chronos2 import use_exact_group_attention


def model_of(forecaster: Any) -> Any:
    """Return the model inside a pipeline, stock or ours; a model is returned as it is."""
    return forecaster.model if isinstance(forecaster, BaseChronosPipeline) else forecaster


def exact_model_of(forecaster: Any) -> Any:
    """Return the same, where a stock ``Chronos2Model`` has been given the faster forward pass."""
    model = model_of(forecaster)
    return use_exact_group_attention(model) if type(model) is Chronos2Model else model


def check_trainable(model: Any) -> None:
    """Refuse to fine-tune what was exported, and what has bands that were calibrated on its present weights."""
    if not isinstance(model, nn.Module):
        raise InputError("an exported model only forecasts; fine-tune the checkpoint it was made of, and export that")
    if getattr(model.config, "low_rank", None) is not None:
        raise InputError(
            "low-rank experts only forecast; fine-tune the mixture that was compressed and compress the result, or "
            "add an expert with chronomoe grow"
        )
    if getattr(model, "bands", None) is not None:
        raise InputError(
            "the bands of this model were recalibrated, which would not fit the new weights; fine-tune the checkpoint "
            "from before, or set pipeline.model.bands = None, and recalibrate the result"
        )
