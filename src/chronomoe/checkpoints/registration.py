"""Making our checkpoints known to ``chronos``: the one place where this package changes another."""

from functools import wraps
from typing import Any

import chronos.chronos2
from chronos.chronos2 import Chronos2Pipeline
from transformers import AutoConfig

from chronomoe.checkpoints.finding import named_architecture
from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.models.sparse.insertion import MoEEnhancedChronos2
from chronomoe.models.sparse.upcycling import Chronos2MoEModel
from chronomoe.pipeline import ChronoMoEPipeline

OURS = (DistilledMoE, Chronos2MoEModel, MoEEnhancedChronos2)
_STOCK: Any = Chronos2Pipeline.from_pretrained.__func__


@wraps(_STOCK)
def _from_pretrained(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
    if cls is Chronos2Pipeline and named_architecture(name, kwargs) in {model.__name__ for model in OURS}:
        return ChronoMoEPipeline.from_pretrained(name, *args, **kwargs)
    return _STOCK(cls, name, *args, **kwargs)


def register() -> None:
    """Let the stock entry points return our pipeline for checkpoints of our architectures.

    ``BaseChronosPipeline.from_pretrained`` finds it by the ``chronos_pipeline_class`` in ``config.json``.
    ``Chronos2Pipeline.from_pretrained`` would wrap any model in itself, which has neither our promises nor a ``fit``
    for our models, so it is replaced by one that looks at ``architectures`` first. All other checkpoints, and
    subclasses of the stock pipeline, get the stock one's behaviour. Registering twice changes nothing.
    """
    for model in OURS:
        AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        setattr(chronos.chronos2, model.__name__, model)
    Chronos2Pipeline.from_pretrained = classmethod(_from_pretrained)
