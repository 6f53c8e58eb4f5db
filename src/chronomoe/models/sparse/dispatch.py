"""Dispatch and combine: send tokens to their experts in contiguous rows, and add up what comes back."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

SLOTS_AT_ONCE = 8_192
"""Choices sent out at a time on a CPU: buffers of a few MB stay in the cache, larger ones cost page faults."""
ROWS_OF_AN_EXPERT = 256
"""But on average so many for each expert, that reading its weights pays."""
FEW_EXPERTS, FEW_CHOICES = 4, 1_024
"""Up to here, looking for the choices of each expert costs less than sorting them."""


Weights = list[tuple[Tensor, Tensor]]
Activation = Callable[[Tensor], Tensor]


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
    """Return which choices an expert keeps within ``capacity``: those with the largest gates, then the first.

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
    activate: Activation,
) -> Float[Tensor, "token d_model"]:
    """Return the gated sum of each token's experts; a choice of expert ``len(wi)`` counts for nothing.

    Each expert is two matrix products over the rows that were sent to it. ``bench/dispatch.py`` compares this with a
    loop that looks for each expert's tokens; ``torch.nn.functional.grouped_mm`` was no faster on a CPU.
    """
    learns = torch.is_grad_enabled() or torch.is_autocast_enabled(tokens.device.type)
    if not learns and len(wi) <= FEW_EXPERTS and expert.numel() <= FEW_CHOICES:
        return _search(tokens, expert, gate, wi=wi, wo=wo, activate=activate)
    weights = list(zip(wi.unbind(), wo.unbind(), strict=True))
    slots = max(SLOTS_AT_ONCE, ROWS_OF_AN_EXPERT * len(wi))
    at_once = slots // expert.shape[1] if tokens.device.type == "cpu" else max(1, len(tokens))
    parts = zip(tokens.split(at_once), expert.split(at_once), gate.split(at_once), strict=True)
    if learns:
        sums = [_send(*part, weights=weights, activate=activate) for part in parts]
        return sums[0] if len(sums) == 1 else torch.cat(sums)
    output = torch.empty_like(tokens)
    for part, place in zip(parts, output.split(at_once), strict=True):
        _send_in_place(*part, weights=weights, activate=activate, place=place)
    return output


def _send(tokens: Tensor, expert: Tensor, gate: Tensor, *, weights: Weights, activate: Activation) -> Tensor:
    """Sort, run and combine in a way that gradients and casts pass through."""
    sent = dispatch_tokens(expert, num_experts=len(weights))
    if not len(sent.token):
        return torch.zeros_like(tokens)
    rows = tokens.index_select(0, sent.token).split(sent.counts)
    said = [activate(row @ wi.T) @ wo.T for row, (wi, wo) in zip(rows, weights, strict=True) if len(row)]
    output = torch.cat(said)
    gate = _without_dropped(gate, expert, num_experts=len(weights)).to(output.dtype)
    return embedding_bag(sent.slot, output, mode="sum", per_sample_weights=gate)


def _send_in_place(
    tokens: Tensor, expert: Tensor, gate: Tensor, *, weights: Weights, activate: Activation, place: Tensor
) -> None:
    """Do what :func:`_send` does; each expert fetches its rows when it needs them, and nothing is copied twice."""
    sent = dispatch_tokens(expert, num_experts=len(weights))
    if not len(sent.token):
        place.zero_()
        return
    output = tokens.new_empty(len(sent.token), tokens.shape[1])
    sizes = sent.counts
    for token, part, (wi, wo) in zip(sent.token.split(sizes), output.split(sizes), weights, strict=True):
        if len(token):
            torch.mm(activate(tokens.index_select(0, token) @ wi.T), wo.T, out=part)
    gate = _without_dropped(gate, expert, num_experts=len(weights)).to(output.dtype)
    if expert.shape[1] == 1:
        torch.index_select(output, 0, sent.slot[:, 0], out=place)
        place.mul_(gate)
    else:
        place.copy_(embedding_bag(sent.slot, output, mode="sum", per_sample_weights=gate))


def _search(tokens: Tensor, expert: Tensor, gate: Tensor, *, wi: Tensor, wo: Tensor, activate: Activation) -> Tensor:
    """Look for the tokens of each expert in turn."""
    output = torch.zeros_like(tokens)
    for index in range(len(wi)):
        token, choice = torch.where(expert == index)
        if len(token):
            said = activate(tokens.index_select(0, token) @ wi[index].T) @ wo[index].T
            output.index_add_(0, token, said.mul_(gate[token, choice, None]))
    return output


def _without_dropped(gate: Tensor, expert: Tensor, *, num_experts: int) -> Tensor:
    return gate.masked_fill(expert == num_experts, 0)
