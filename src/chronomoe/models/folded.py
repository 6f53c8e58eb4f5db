"""Chronos-2's encoder as inference runs it: the same numbers from fewer, larger steps.

Made once of a model's weights, and again when these change:

- The weight of a norm is multiplied into the projection behind it. What is left of an RMS norm is one factor a token,
  which linear layers and ReLU pass on, so that it can be applied to what they return.
- Queries, keys and values are one product. For a row that is alone in its group, so are ``v`` and ``o``.
- The two halves of a head that rotary encoding turns against each other are interleaved: one complex product.
- Weights are packed for their products: see :mod:`chronomoe.models.packing`.
- Products are taken in the type of :func:`computing_in`; the residual stream, norms and softmax stay in float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from chronos.chronos2.layers import MHA, MLP, Chronos2LayerNorm, FeedForward, ResidualBlock
from chronos.chronos2.model import Chronos2Encoder
from jaxtyping import Float
from torch import Tensor, nn

from chronomoe.models.attention import GroupPlan, attend, attend_across
from chronomoe.models.packing import pack, product

_DTYPE = ContextVar("type of products", default=torch.float32)


@contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """Take the encoder's products of inference in a type, within a ``with`` block; without one it is float32.

    It holds for the calls of this thread, as ``torch.autocast`` does, so that threads may share a model. Parameters
    stay in float32; so do instance norm, residual stream, attention weights, router, quantile head and unscaling.
    """
    before = _DTYPE.set(dtype)
    try:
        yield
    finally:
        _DTYPE.reset(before)


def compute_dtype() -> torch.dtype:
    """Return the type of :func:`computing_in`."""
    return _DTYPE.get()


class FoldedBlock(NamedTuple):
    """The weights of an encoder block; ``(out, in)`` each, packed."""

    time_in: Tensor  # queries, keys, values
    time_parts: tuple[Tensor, Tensor] | None  # queries; keys and values: of the last block, for its last tokens
    time_out: Tensor
    group_in: Tensor  # queries, keys, values
    group_out: Tensor
    alone: tuple[Tensor, ...]  # values and what reads them, as one where that is no more work
    feed_in: Tensor | None  # None: the block has other layers than a dense feed-forward
    feed_out: Tensor | None


class FoldedEncoder(NamedTuple):
    """The folded weights of an encoder, in one type."""

    made_of: tuple[tuple[int, int], ...]
    """Where the parameters lay, and their versions."""
    blocks: list[FoldedBlock]
    embed_out: Tensor
    rotation: Tensor
    """Complex, ``(token, 1, d_kv / 2)``."""

    def embed(self, embedding: ResidualBlock, patches: Tensor) -> Tensor:
        """Embed patches; values and times enter in float32, the wide product is taken in the folded type."""
        inside = embedding.act(embedding.hidden_layer(patches)).to(self.embed_out.dtype)
        embedded: Tensor = embedding.residual_layer(patches)
        return embedded.add_(product(inside, self.embed_out)).add_(embedding.output_layer.bias)


class Folds:
    """The folded weights of an encoder by type, kept with the model while its parameters are the same.

    What :meth:`get` returned never changes, so that threads may share a model.
    """

    def __init__(self) -> None:
        self.kept: dict[torch.dtype, FoldedEncoder] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Folds":
        return Folds()  # a copy's weights may go their own way

    def __reduce__(self) -> tuple[type["Folds"], tuple[()]]:
        return Folds, ()

    @torch.no_grad()
    def get(
        self, encoder: Chronos2Encoder, embedding: ResidualBlock, *, dtype: torch.dtype, num_tokens: int
    ) -> FoldedEncoder:
        """Return the weights in a type, folded unless it is done, and the rotation of at least as many tokens."""
        weights = [embedding.output_layer.weight, *_folded_parameters(encoder)]
        made_of = tuple((weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights)
        found = self.kept.get(dtype)
        if found is None or found.made_of != made_of:
            last = len(encoder.block) - 1
            blocks = [_fold(block, dtype, last=index == last) for index, block in enumerate(encoder.block)]
            found = FoldedEncoder(made_of, blocks, pack(weights[0].to(dtype)), torch.empty(0))
        if len(found.rotation) < num_tokens:
            rotary = encoder.block[0].layer[0].self_attention.rope_embed
            position = torch.arange(num_tokens, device=rotary.inv_freq.device)[None]
            cos, sin = (part[0, :, None, : part.shape[-1] // 2] for part in rotary(rotary.inv_freq, position))
            found = found._replace(rotation=torch.complex(cos, sin))
        self.kept[dtype] = found
        return found


def can_fold(encoder: Chronos2Encoder, embedding: ResidualBlock) -> bool:
    """Whether all layers are upstream's own: adapters and quantised layers are not."""
    if (
        type(embedding) is not ResidualBlock
        or embedding.use_layer_norm
        or type(embedding.output_layer) is not nn.Linear
    ):
        return False
    for block in encoder.block:
        for layer in block.layer[:2]:
            attention = layer.self_attention
            if type(attention) is not MHA or type(layer.layer_norm) is not Chronos2LayerNorm:
                return False
            if any(type(getattr(attention, name)) is not nn.Linear for name in "qkvo"):
                return False
    return True


def attend_in_time(
    hidden: Float[Tensor, "batch token d_model"],
    block: FoldedBlock,
    attention: MHA,
    *,
    eps: float,
    rotation: Tensor,
    mask: Tensor | None,
    keep: int,
) -> Float[Tensor, "batch kept d_model"]:
    """Apply time attention, for the last ``keep`` tokens only."""
    heads, inner, dtype = attention.n_heads, attention.inner_dim, block.time_in.dtype
    batch, tokens, _ = hidden.shape
    normed = (hidden * _factor(hidden, eps)).to(dtype)

    def split(states: Tensor) -> Tensor:
        return states.view(*states.shape[:-1], -1, attention.kv_proj_dim)

    if keep == tokens or block.time_parts is None:
        joined = product(normed, block.time_in)
        turned = _rotate(split(joined[..., : 2 * inner]), rotation[:tokens])
        q, k, v = turned[:, :, :heads], turned[:, :, heads:], split(joined[..., 2 * inner :])
    else:
        of_q, of_kv = block.time_parts
        latest = normed[:, -keep:].contiguous()  # from a slice, the product copies the weights once a row
        q = _rotate(split(product(latest, of_q)), rotation[tokens - keep : tokens])
        joined = product(normed, of_kv)
        k, v = _rotate(split(joined[..., :inner]), rotation[:tokens]), split(joined[..., inner:])
    mixed = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask=mask)
    return hidden[:, -keep:] + product(mixed.transpose(1, 2).reshape(batch, keep, inner), block.time_out)


def attend_in_groups(
    hidden: Float[Tensor, "batch token d_model"],
    block: FoldedBlock,
    attention: MHA,
    *,
    eps: float,
    plan: GroupPlan,
    observed: Float[Tensor, "batch token"] | None,
) -> Float[Tensor, "batch token d_model"]:
    """Apply group attention, in place."""
    if not plan.together:
        return hidden.addcmul_(_alone(hidden, block), _factor(hidden, eps))
    update = torch.empty_like(hidden)
    factor = _factor(hidden, eps)
    if len(plan.alone):
        update[plan.alone] = _alone(hidden[plan.alone], block) * factor[plan.alone]
    for rows in plan.together:
        normed = (hidden[rows] * factor[rows]).to(block.group_in.dtype)
        mixed = attend_across(
            *product(normed, block.group_in).chunk(3, dim=-1),
            num_heads=attention.n_heads,
            observed=None if observed is None else observed[rows],
        )
        update[rows] = product(mixed, block.group_out).to(update.dtype)
    return hidden.add_(update)


def feed_forward(
    hidden: Float[Tensor, "batch token d_model"], block: FoldedBlock, *, eps: float
) -> Float[Tensor, "batch token d_model"]:
    """Apply a dense feed-forward block, in place."""
    assert block.feed_in is not None
    assert block.feed_out is not None
    inside = product(hidden.to(block.feed_in.dtype), block.feed_in).relu_()
    return hidden.addcmul_(product(inside, block.feed_out), _factor(hidden, eps))


def _factor(hidden: Tensor, eps: float) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
    return norm.square_().div_(hidden.shape[-1]).add_(eps).rsqrt_()


def _alone(hidden: Tensor, block: FoldedBlock) -> Tensor:
    """Return the update of rows that attend to themselves alone, before the norm's factor."""
    found = hidden.to(block.group_in.dtype)
    for weight in block.alone:
        found = product(found, weight)
    return found


def _rotate(states: Tensor, rotation: Tensor) -> Tensor:
    """Turn interleaved pairs: ``(batch, token, head, d_kv)`` by ``(token, 1, d_kv / 2)``."""
    turned = torch.view_as_complex(states.float().unflatten(-1, (-1, 2))) * rotation
    return torch.view_as_real(turned).flatten(-2).to(states.dtype)


def _folded_parameters(encoder: Chronos2Encoder) -> Iterator[Tensor]:
    for block in encoder.block:
        for layer in block.layer[:2]:
            yield layer.layer_norm.weight
            for name in "qkvo":
                yield getattr(layer.self_attention, name).weight
        if _is_dense(block.layer[2]):
            yield from block.layer[2].parameters()


def _is_dense(layer: Any) -> bool:
    if type(layer) is not FeedForward or type(layer.mlp) is not MLP or type(layer.mlp.act) is not nn.ReLU:
        return False
    return type(layer.mlp.wi) is nn.Linear and type(layer.mlp.wo) is nn.Linear


def _fold(block: nn.Module, dtype: torch.dtype, *, last: bool) -> FoldedBlock:
    time, group, dense = block.layer  # type: ignore[misc]

    def joined(layer: Any, *, turned: bool) -> Tensor:
        attention = layer.self_attention
        q, k, v = (getattr(attention, name).weight * layer.layer_norm.weight for name in "qkv")
        if turned:
            halves = (attention.n_heads, 2, attention.kv_proj_dim // 2, -1)
            q, k = (weight.view(halves).transpose(1, 2).reshape(weight.shape) for weight in (q, k))
        return torch.cat([q, k, v])

    def narrow(weight: Tensor) -> Tensor:
        return pack(weight.to(dtype))

    time_in, group_in, o = joined(time, turned=True), joined(group, turned=False), group.self_attention.o.weight
    inner, v = time.self_attention.inner_dim, group_in[-group.self_attention.inner_dim :]
    fed, group_out = _is_dense(dense), narrow(o)
    return FoldedBlock(
        time_in=narrow(time_in),
        time_parts=(narrow(time_in[:inner]), narrow(time_in[inner:])) if last else None,
        time_out=narrow(time.self_attention.o.weight),
        group_in=narrow(group_in),
        group_out=group_out,
        alone=(narrow(o @ v),) if len(o) <= 2 * len(v) else (narrow(v), group_out),
        feed_in=narrow(dense.mlp.wi.weight * dense.layer_norm.weight) if fed else None,
        feed_out=narrow(dense.mlp.wo.weight) if fed else None,
    )
