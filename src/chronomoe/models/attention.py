"""Chronos-2's two attentions on projected queries, keys and values, each in the form that is fastest for its size."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import dropout, scaled_dot_product_attention

FEW_TOKENS = 64
"""Up to here plain products beat torch's fused kernel in float32 and wherever there is a backward pass."""


class GroupPlan(NamedTuple):
    """Which rows attend to each other: groups of equal size are computed together."""

    alone: Int[Tensor, " row"]
    together: list[Int[Tensor, "group member"]]


def plan_groups(group_ids: Int[Tensor, " batch"]) -> GroupPlan:
    """Sort rows into those that are alone in their group and blocks of groups of the same size."""
    _, group, size = group_ids.unique(return_inverse=True, return_counts=True)
    size_of_row = size[group]
    order = torch.argsort(group, stable=True)
    together = []
    for members in size.unique().tolist():
        if members > 1:
            rows = order[size_of_row[order] == members]
            together.append(rows.view(-1, members))
    return GroupPlan(torch.where(size_of_row == 1)[0], together)


def invert(observed: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn 1 = attend, 0 = ignore into the additive mask of attention scores."""
    return (1.0 - observed.to(dtype)) * torch.finfo(dtype).min


def attend(
    q: Float[Tensor, "batch head query d_kv"],
    k: Float[Tensor, "batch head token d_kv"],
    v: Float[Tensor, "batch head token d_kv"],
    *,
    mask: Tensor | None,
    dropout_p: float = 0.0,
) -> Float[Tensor, "batch head query d_kv"]:
    """Mix values by the softmax of unscaled scores; ``mask`` is added to these."""
    if k.shape[2] > FEW_TOKENS or not (q.requires_grad or q.dtype == torch.float32):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=1.0)
    score = q @ k.transpose(2, 3)
    weight = (score if mask is None else score + mask).softmax(dim=-1, dtype=torch.float32).to(v.dtype)
    return (dropout(weight, dropout_p) if dropout_p else weight) @ v


def attend_across(
    q: Float[Tensor, "group member token width"],
    k: Float[Tensor, "group member token width"],
    v: Float[Tensor, "group member token width"],
    *,
    num_heads: int,
    observed: Float[Tensor, "group member token"] | None,
    dropout_p: float = 0.0,
) -> Float[Tensor, "group member token width"]:
    """Let the members of each group attend to each other, token by token.

    Each head of each token counts as a head of its own: one large call instead of many small ones.
    """
    groups, members, tokens, width = q.shape

    def heads(states: Tensor) -> Tensor:
        split = states.reshape(groups, members, tokens * num_heads, width // num_heads)
        return split.transpose(1, 2).contiguous()

    mask = None
    if observed is not None:
        mask = invert(observed, q.dtype).transpose(1, 2).repeat_interleave(num_heads, dim=1)[:, :, None]
    mixed = scaled_dot_product_attention(heads(q), heads(k), heads(v), attn_mask=mask, dropout_p=dropout_p, scale=1.0)
    return mixed.transpose(1, 2).reshape(q.shape)
