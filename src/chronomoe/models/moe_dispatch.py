"""Dispatch and combine: send tokens to their experts in contiguous rows, and add up what comes back."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

SLOTS_AT_ONCE = 16_384
"""Choices sent out at a time on a CPU: buffers of a few MB stay in the cache, larger ones cost page faults."""


class Dispatch(NamedTuple):
    """Choices sorted by expert: a slot is one choice of one token, and the slots of an expert are contiguous."""

    token: Int[Tensor, " slot"]  # whose choice it is
    slot: Int[Tensor, "token choice"]  # where it went; 0 if it was dropped
    counts: list[int]  # slots of each expert


def dispatch_tokens(expert: Int[Tensor, "token choice"], *, num_experts: int) -> Dispatch:
    """Sort choices by expert, those of one expert by token; choices of expert ``num_experts`` are dropped."""
    choice = expert.flatten()
    counts: list[int] = choice.bincount(minlength=num_experts).tolist()[:num_experts]
    order = choice.argsort(stable=True)[: sum(counts)]
    slot = torch.zeros_like(choice).scatter_(0, order, torch.arange(len(order), device=order.device))
    return Dispatch(order // expert.shape[1], slot.view_as(expert), counts)


def within_capacity(
    expert: Int[Tensor, "token choice"], gate: Float[Tensor, "token choice"], *, num_experts: int, capacity: int
) -> Bool[Tensor, "token choice"]:
    """Say which choices an expert keeps that takes at most ``capacity``: those of the largest gates, then the first.

    The surest tokens go first wherever they stand in the batch: batch prioritised routing, Riquelme et al., 2021,
    https://arxiv.org/abs/2106.05974.
    """
    surest = gate.detach().flatten().argsort(descending=True, stable=True)
    choice = expert.flatten()
    order = surest[choice[surest].argsort(stable=True)]
    count = choice.bincount(minlength=num_experts)
    place = torch.arange(len(order), device=order.device) - (count.cumsum(0) - count)[choice[order]]
    return torch.empty_like(order).scatter_(0, order, place).view_as(expert) < capacity


def run_experts(
    tokens: Float[Tensor, "token d_model"],
    expert: Int[Tensor, "token choice"],
    gate: Float[Tensor, "token choice"],
    *,
    wi: Float[Tensor, "expert width d_model"],
    wo: Float[Tensor, "expert d_model width"],
    activate: Callable[[Tensor], Tensor],
) -> Float[Tensor, "token d_model"]:
    """Return for each token the gated sum of what its experts say; a choice of expert ``len(wi)`` counts for nothing.

    Each expert is two matrix products over the rows that were sent to it. ``bench/dispatch.py`` compares this with a
    loop that looks for each expert's tokens; ``torch.nn.functional.grouped_mm`` was no faster on a CPU.
    """
    at_once = SLOTS_AT_ONCE // expert.shape[1] if tokens.device.type == "cpu" else max(1, len(tokens))
    weights = list(zip(wi.unbind(), wo.unbind(), strict=True))
    parts = [
        _run(*part, weights=weights, activate=activate)
        for part in zip(tokens.split(at_once), expert.split(at_once), gate.split(at_once), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _run(
    tokens: Tensor,
    expert: Tensor,
    gate: Tensor,
    *,
    weights: list[tuple[Tensor, Tensor]],
    activate: Callable[[Tensor], Tensor],
) -> Tensor:
    sent = dispatch_tokens(expert, num_experts=len(weights))
    used = [(count, *weight) for count, weight in zip(sent.counts, weights, strict=True) if count]
    if not used:
        return torch.zeros_like(tokens)
    sizes = [count for count, *_ in used]
    if torch.is_grad_enabled() or torch.is_autocast_enabled(tokens.device.type):
        rows = tokens.index_select(0, sent.token).split(sizes)
        output = torch.cat([activate(row @ wi.T) @ wo.T for row, (_, wi, wo) in zip(rows, used, strict=True)])
    else:  # neither gradients nor casts: each expert fetches its rows when it needs them and writes in place
        output = tokens.new_empty(len(sent.token), tokens.shape[1])
        for token, part, (_, wi, wo) in zip(sent.token.split(sizes), output.split(sizes), used, strict=True):
            torch.mm(activate(tokens.index_select(0, token) @ wi.T), wo.T, out=part)
    if len(sent.token) < expert.numel():
        gate = gate.masked_fill(expert == len(weights), 0)
    return embedding_bag(sent.slot, output, mode="sum", per_sample_weights=gate.to(output.dtype))
