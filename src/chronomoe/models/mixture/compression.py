"""Mixtures whose experts are low-rank changes of one model: made of whole ones, and back."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from chronomoe.errors import InputError
from chronomoe.models.mixture.cores import core_fields
from chronomoe.models.mixture.mixture import DistilledMoE


def compress(mixture: DistilledMoE, *, rank: int) -> DistilledMoE:
    """Return a mixture whose experts differ from one model by matrices of at most this rank; its router stays.

    That model is the expert named "generalist", or else the mean of all.

    Raises:
        InputError: the rank is below 1, or experts differ in shape.
    """
    if rank < 1:
        raise InputError(f"the rank of an expert must be at least 1, got {rank}")
    experts = dict(zip(mixture.config.expert_names, mixture.experts, strict=False))  # a teacher stays whole
    config = copy.deepcopy(mixture.config)
    config.low_rank = rank
    made: DistilledMoE = _like(mixture, config)
    kept: Any = made.experts
    kept.base.load_state_dict(_common_weights(experts))
    for index, expert in enumerate(experts.values()):
        kept.put(index, expert.state_dict())
    return made


def with_whole_experts(mixture: DistilledMoE) -> DistilledMoE:
    """Return a mixture with every expert in memory as a model of its own; one that has them already, as it is."""
    if mixture.config.low_rank is None:
        return mixture
    config = copy.deepcopy(mixture.config)
    config.low_rank = None
    made: DistilledMoE = _like(mixture, config)
    for own, expert in zip(made.experts, mixture.experts, strict=True):
        own.load_state_dict(expert.state_dict())
    made.bands = getattr(mixture, "bands", None)
    return made


def with_one_more(mixture: DistilledMoE, name: str, expert: nn.Module) -> DistilledMoE:
    """Return a mixture of low-rank experts with one more, cut to the rank, and an untrained router.

    What is kept of the others stays the same to the bit. A teacher for unfamiliar series is left out.
    """
    config: Any = copy.deepcopy(mixture.config)
    config.expert_names, config.unfamiliar = config.expert_names[: len(config.experts)], None
    config.experts = [*config.experts, core_fields(expert.config)]
    config.expert_names = [*config.expert_names, name]
    made: DistilledMoE = DistilledMoE(config).to(mixture.device).eval()
    _check_shapes({"the others": mixture.experts[0], name: expert})
    kept: Any = made.experts
    own = kept.state_dict()
    for key, value in mixture.get_submodule("experts").state_dict().items():
        (own[key] if key.startswith("base.") else own[key][:-1]).copy_(value)
    kept.put(len(config.expert_names) - 1, expert.state_dict())
    return made


def _like(mixture: DistilledMoE, config: Any) -> Any:
    """Return a mixture of another configuration with the same router and teacher."""
    made = DistilledMoE(config).to(mixture.device).eval()
    made.router.load_state_dict(mixture.router.state_dict())
    made.balance_bias.load_state_dict(mixture.balance_bias.state_dict())
    if mixture.teacher is not None and mixture.familiarity is not None:
        made.teacher.load_state_dict(mixture.teacher.state_dict())
        made.familiarity.load_state_dict(mixture.familiarity.state_dict())
    return made


def _check_shapes(experts: Mapping[str, nn.Module]) -> None:
    shapes = {
        name: {key: tuple(value.shape) for key, value in expert.state_dict().items()}
        for name, expert in experts.items()
    }
    first, *others = shapes
    odd = next((name for name in others if shapes[name] != shapes[first]), None)
    if odd is not None:
        raise InputError(
            f"low-rank experts are changes of one model, so all must have its shape; {first!r} and {odd!r} differ; "
            "distil experts of one size"
        )


def _common_weights(experts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the weights that experts are changes of."""
    _check_shapes(experts)
    states = [expert.state_dict() for expert in experts.values()]
    if "generalist" in experts:
        return dict(experts["generalist"].state_dict())
    return {key: torch.stack([state[key] for state in states]).mean(dim=0) for key in states[0]}
