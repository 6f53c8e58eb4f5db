"""Distil Chronos-2 into small experts and run them as one Mixture-of-Experts forecaster.

Importing makes our checkpoints known to ``chronos`` (see :mod:`chronomoe.checkpoints.registration`) and does nothing
else.
"""

import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = version("chronomoe")

__all__ = [
    "BalanceConfig",
    "Chronos2DistillationTrainer",
    "Chronos2MoEDistillationTrainer",
    "Chronos2MoELayer",
    "Chronos2MoEModel",
    "ChronoMoEPipeline",
    "DistilledMoE",
    "DistilConfig",
    "InputError",
    "MixtureConfig",
    "MoEConfig",
    "MoEEnhancedChronos2",
    "MoEInsertionConfig",
    "RouterConfig",
    "RoutingConfig",
    "StudentConfig",
    "__version__",
    "build_mixture",
    "create_student_model",
    "fit_router",
    "load_model",
    "load_teacher",
    "upcycle",
    "use_exact_group_attention",
]


def _is_command_line() -> bool:
    """Whether this process was started as ``chronomoe`` or ``python -m chronomoe``.

    Its commands register when they run, so that ``chronomoe --help`` answers without importing torch.
    """
    started = sys.orig_argv
    module = started[started.index("-m") + 1 :][:1] if "-m" in started else []
    return module == ["chronomoe"] or Path(sys.argv[0]).stem == "chronomoe"


if TYPE_CHECKING or not _is_command_line():
    from chronomoe.checkpoints.registration import register
    from chronomoe.errors import InputError
    from chronomoe.models.balancing import BalanceConfig
    from chronomoe.models.chronos2 import use_exact_group_attention
    from chronomoe.models.mixture.config import MixtureConfig
    from chronomoe.models.mixture.mixture import DistilledMoE, build_mixture
    from chronomoe.models.mixture.router import RouterConfig, RoutingConfig
    from chronomoe.models.sparse.config import MoEConfig
    from chronomoe.models.sparse.insertion import MoEEnhancedChronos2, MoEInsertionConfig
    from chronomoe.models.sparse.layer import Chronos2MoELayer
    from chronomoe.models.sparse.upcycling import Chronos2MoEModel, upcycle
    from chronomoe.models.student import StudentConfig, create_student_model
    from chronomoe.pipeline import ChronoMoEPipeline, load_model, load_teacher

    register()

TRAINING = {
    "Chronos2DistillationTrainer": "trainer",
    "Chronos2MoEDistillationTrainer": "trainer",
    "DistilConfig": "arguments",
    "fit_router": "routing",
}
"""Names that bring in ``transformers.Trainer``, which is slow to import: only when they are asked for."""
if TYPE_CHECKING:
    from chronomoe.training.arguments import DistilConfig
    from chronomoe.training.routing import fit_router
    from chronomoe.training.trainer import Chronos2DistillationTrainer, Chronos2MoEDistillationTrainer


def __getattr__(name: str) -> Any:
    if name in TRAINING:
        return getattr(import_module(f"chronomoe.training.{TRAINING[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
