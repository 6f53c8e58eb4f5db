"""Making our checkpoints known to ``chronos``: the one place where this package changes another."""

from functools import wraps
from typing import Any

import chronos.chronos2
from chronos.base import PipelineRegistry
from chronos.chronos2 import Chronos2Pipeline
from transformers import AutoConfig

from chronomoe.checkpoints.finding import named_architecture
from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.models.sparse.insertion import MoEEnhancedChronos2
from chronomoe.models.sparse.upcycling import Chronos2MoEModel
from chronomoe.pipeline import ChronoMoEPipeline

OURS = (DistilledMoE, Chronos2MoEModel, MoEEnhancedChronos2)
_STOCK: Any = Chronos2Pipeline.from_pretrained.__func__


class _Ours:
    """Our pipeline as the stock entry points load it."""

    @staticmethod
    def from_pretrained(name: Any, *args: Any, **kwargs: Any) -> ChronoMoEPipeline:
        """Load; ``dtype="auto"``, which ``BaseChronosPipeline`` passes unless told otherwise, asks for no trial."""
        kwargs = {key: value for key, value in kwargs.items() if key not in ("dtype", "torch_dtype") or value != "auto"}
        return ChronoMoEPipeline.from_pretrained(name, *args, **kwargs)


@wraps(_STOCK)
def _from_pretrained(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
    if cls is Chronos2Pipeline and named_architecture(name, kwargs) in {model.__name__ for model in OURS}:
        return _Ours.from_pretrained(name, *args, **kwargs)
    return _STOCK(cls, name, *args, **kwargs)


def register() -> None:
    """Let the stock entry points return our pipeline for checkpoints of our architectures.

    ``BaseChronosPipeline.from_pretrained`` finds it by the ``chronos_pipeline_class`` in ``config.json``; its "auto"
    is the default of a caller who asked for nothing, and gives the same numbers each time.
    ``Chronos2Pipeline.from_pretrained`` would wrap any model in itself, which has neither our promises nor a ``fit``
    for our models, so it is replaced by one that looks at ``architectures`` first. All other checkpoints, and
    subclasses of the stock pipeline, get the stock one's behaviour. Registering twice changes nothing.
    """
    for model in OURS:
        AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        setattr(chronos.chronos2, model.__name__, model)
    PipelineRegistry.REGISTRY[ChronoMoEPipeline.__name__] = _Ours
    Chronos2Pipeline.from_pretrained = classmethod(_from_pretrained)
