"""Where a series lies and how far it spreads: what Chronos-2 takes off before it reads it."""

import torch
from chronos.chronos_bolt import InstanceNorm
from jaxtyping import Float
from torch import Tensor

SAFE = 1e15
"""Deviations up to here, and down to its inverse, have squares that float32 holds."""


def loc_and_scale(
    context: Float[Tensor, "batch time"], norm: InstanceNorm
) -> tuple[Float[Tensor, "batch 1"], Float[Tensor, "batch 1"]]:
    """Return the mean and standard deviation of what was observed of each row, as ``InstanceNorm`` does, bit for bit.

    Where sums or squares leave the range of float32 they are taken of shares of the largest value instead.
    """
    values = context.float()
    loc = values.nanmean(dim=-1, keepdim=True).nan_to_num(nan=0.0)
    scale = (values - loc).square().nanmean(dim=-1, keepdim=True).sqrt().nan_to_num(nan=1.0)
    odd = ~((scale > 1 / SAFE) & (scale < SAFE))
    if odd.any():
        loc, scale = _where_odd(values, loc, scale, odd)
    return loc, torch.where(scale == 0, norm.eps, scale)


def loc_and_scale_without_branch(
    context: Float[Tensor, "batch time"], norm: InstanceNorm
) -> tuple[Float[Tensor, "batch 1"], Float[Tensor, "batch 1"]]:
    """Return what :func:`loc_and_scale` does, from the same operations whatever the values are."""
    values, seen = context.float(), ~context.isnan()
    count = seen.float().sum(dim=-1, keepdim=True)
    loc = torch.where(count > 0, torch.where(seen, values, 0.0).sum(dim=-1, keepdim=True) / count, 0.0)
    square = torch.where(seen, (values - loc).square(), 0.0).sum(dim=-1, keepdim=True)
    scale = torch.where(count > 0, (square / count).sqrt(), 1.0)
    loc, scale = _where_odd(values, loc, scale, ~((scale > 1 / SAFE) & (scale < SAFE)))
    return loc, torch.where(scale == 0, norm.eps, scale)


def _where_odd(values: Tensor, loc: Tensor, scale: Tensor, odd: Tensor) -> tuple[Tensor, Tensor]:
    seen = ~values.isnan()
    share = 1 / seen.float().sum(dim=-1, keepdim=True).clamp(min=1)
    mean = torch.where(seen, values * share, 0.0).sum(dim=-1, keepdim=True)
    gap = torch.where(seen, values - mean, 0.0)
    largest = gap.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    spread = ((gap / largest).square() * share).sum(dim=-1, keepdim=True).sqrt() * largest
    odd = odd & ((loc - values).abs().nan_to_num(nan=0.0).amax(dim=-1, keepdim=True) > 0)
    return torch.where(odd, mean, loc), torch.where(odd, spread, scale)
