"""Letting the teacher forecast series that are unlike all that a mixture's router learned from."""

import copy

import torch
from chronos.chronos2 import Chronos2Model
from chronos.chronos2.config import Chronos2CoreConfig

from chronomoe.errors import InputError
from chronomoe.models.chronos2 import cast_parameters
from chronomoe.models.mixture.cores import check_same_task, core_fields
from chronomoe.models.mixture.familiarity import Familiarity
from chronomoe.models.mixture.low_rank import make_experts
from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.models.mixture.router import pool_groups
from chronomoe.training.routing import ExpertForecasts, domain_of_groups

TEACHER = "teacher"
"""What it is called among the experts."""
PATCH_EMBEDDING = (
    "a teacher for unfamiliar series needs a router that reads features alone, not an expert's patch embedding; "
    "set use_patch_embedding to false"
)


@torch.no_grad()
def add_teacher(
    mixture: DistilledMoE,
    teacher: Chronos2Model,
    train: ExpertForecasts,
    validation: ExpertForecasts,
    *,
    familiar: float = 0.98,
    name: str = TEACHER,
) -> None:
    """Let a teacher forecast, in place, the series that are far from all that the router learned from.

    Args:
        mixture: its experts and router stay as they are.
        teacher: a dense model of the experts' quantile levels, patch size, horizon and context.
        train: the windows that the router learned from.
        validation: windows of the same domains, which say how far a familiar series may be.
        familiar: the share of them that is to stay with the experts.
        name: what the teacher is called among the experts.

    Raises:
        InputError: there is a teacher already, its name is taken, its forecasts cannot stand beside the experts', or
            the router reads a patch embedding.
    """
    if mixture.teacher is not None:
        raise InputError(f"this mixture has a teacher for unfamiliar series already: {mixture.config.expert_names[-1]}")
    if mixture.moe.router.use_patch_embedding:
        raise InputError(PATCH_EMBEDDING)
    names = [*mixture.config.expert_names, name]
    cores = [
        Chronos2CoreConfig(**copy.deepcopy(core)) for core in (*mixture.config.experts, core_fields(teacher.config))
    ]
    check_same_task(cores, names)
    own: Chronos2Model = make_experts(cores[-1:], rank=None)[0]
    own.load_state_dict(teacher.state_dict())
    familiarity = Familiarity.of(train.features, domain_of_groups(train)[train.member])
    distance = pool_groups(
        familiarity(validation.features)[:, None], group=validation.member, observed=validation.observed
    )
    familiarity.limit.copy_(distance[:, 0].quantile(familiar))
    mixture.config.unfamiliar = {
        "core": core_fields(teacher.config),
        "domains": len(familiarity.mean),
        "familiar": familiar,
    }
    mixture.config.expert_names = names
    cast_parameters(own, mixture.dtype)
    mixture.teacher = own.to(mixture.device).eval()  # type: ignore[assignment]
    mixture.familiarity = familiarity.to(mixture.device)
