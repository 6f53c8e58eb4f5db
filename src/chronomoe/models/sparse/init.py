"""First weights of an MoE layer: fresh, or cut from a dense feed-forward block."""

import torch
from jaxtyping import Float
from torch import Tensor

from chronomoe.errors import InputError
from chronomoe.models.sparse.config import MoEConfig

ROUTER_STD = 1e-9
"""So small that every softmax is uniform in float32, while scores still differ and no expert is starved by ties."""


def draw_router(config: MoEConfig, d_model: int, *, generator: torch.Generator) -> Float[Tensor, "expert d_model"]:
    """Draw a router whose probabilities are even.

    The slices of a copy share one row, so that a token takes all of a copy or none: virtual group initialisation, He
    et al., 2024, https://arxiv.org/abs/2410.07524.
    """
    rows = torch.randn(config.num_experts // config.granularity, d_model, generator=generator)
    return ROUTER_STD * rows.repeat_interleave(config.granularity, dim=0)


def fresh_weights(config: MoEConfig, d_model: int, d_ff: int, *, generator: torch.Generator) -> dict[str, Tensor]:
    """Return weights that read but do not write yet: the layer is the identity, and ``wo`` learns from the first step.

    The scale of ``wi`` is that of Chronos-2's dense block.
    """
    width = config.width(d_ff)
    weights = {
        "wi": torch.randn(config.num_experts, width, d_model, generator=generator) * d_model**-0.5,
        "wo": torch.zeros(config.num_experts, d_model, width),
    }
    if config.shared_width:
        weights["shared_wi"] = torch.randn(config.shared_width, d_model, generator=generator) * d_model**-0.5
        weights["shared_wo"] = torch.zeros(d_model, config.shared_width)
    return weights


def dense_weights(
    wi: Float[Tensor, "d_ff d_model"],
    wo: Float[Tensor, "d_model d_ff"],
    config: MoEConfig,
    *,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Cut experts from a dense block, so that even gates add up to it.

    The first ``shared_width`` hidden units go to the shared expert; the rest is cut into ``granularity`` slices, and
    there are ``num_experts / granularity`` copies of each. Experts of one copy stand next to each other. ``noise`` and
    ``reinit`` (Drop-Upcycling; Nakamura et al., 2025, https://arxiv.org/abs/2502.19261) touch routed experts alone:
    fresh units have the mean and spread of the dense matrix.

    Returns:
        ``wi`` of shape (expert, width, d_model), ``wo`` (expert, d_model, width), and ``shared_wi`` and ``shared_wo``
        where there is a shared expert; float32 or wider, on the CPU.

    Raises:
        InputError: the widths do not divide, or ``expert_width`` is not a slice of the block.
    """
    wide = torch.promote_types(wi.dtype, torch.float32)
    wi, wo = wi.detach().to("cpu", wide), wo.detach().to("cpu", wide)
    d_ff, shared = len(wi), config.shared_width
    width = config.slice_width(d_ff)
    if config.expert_width not in (None, width):
        raise InputError(
            f"expert_width must be {width} for granularity {config.granularity} of a dense block with {d_ff} hidden "
            f"units, {shared} of them shared, got {config.expert_width}; leave it out or change granularity"
        )
    copies = config.num_experts // config.granularity
    experts = {
        "wi": wi[shared:].unflatten(0, (config.granularity, width)).repeat(copies, 1, 1),
        "wo": wo[:, shared:].unflatten(1, (config.granularity, width)).transpose(0, 1).repeat(copies, 1, 1),
    }
    fresh = _choose_units(config, width, generator=generator)
    for name, dense in (("wi", wi), ("wo", wo)):
        weight, std = experts[name], dense.std(correction=0)
        if config.noise:
            weight += config.noise * std * torch.randn(weight.shape, generator=generator, dtype=wide)
        if fresh.any():
            drawn = dense.mean() + std * torch.randn(weight.shape, generator=generator, dtype=wide)
            unit = fresh[:, :, None] if name == "wi" else fresh[:, None]
            experts[name] = torch.where(unit, drawn, weight)
    if shared:
        experts |= {"shared_wi": wi[:shared].clone(), "shared_wo": wo[:, :shared].clone()}
    return experts


def _choose_units(config: MoEConfig, width: int, *, generator: torch.Generator) -> Tensor:
    """Mark the hidden units of each expert that are drawn afresh, ``(expert, width)``: ``reinit`` of them, rounded."""
    if not config.reinit:
        return torch.zeros(config.num_experts, width, dtype=torch.bool)
    rank = torch.rand(config.num_experts, width, generator=generator).argsort(dim=1).argsort(dim=1)
    return rank < round(config.reinit * width)
