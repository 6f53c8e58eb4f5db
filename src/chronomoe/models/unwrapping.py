"""Pipelines are taken wherever models are."""

from typing import Any

from chronos import BaseChronosPipeline


def model_of(forecaster: Any) -> Any:
    """Return the model inside a pipeline, stock or ours; a model is returned as it is."""
    return forecaster.model if isinstance(forecaster, BaseChronosPipeline) else forecaster
