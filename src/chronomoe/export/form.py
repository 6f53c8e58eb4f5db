"""Students and routers as straight lines of products: what a graph can hold.

The forward pass of :mod:`chronomoe.models.chronos2` branches on values: it trims leading patches, skips masks where
all was observed, and gathers the rows of each group. Here shapes alone decide what is computed, with the same numbers.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from chronos.chronos2.layers import MLP, FeedForward
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from chronomoe.errors import InputError
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.models.folded import can_fold
from chronomoe.models.mixture.features import direct_spectra, pool_tokens, series_features
from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.models.mixture.router import choose
from chronomoe.models.scaling import loc_and_scale_without_branch


class Read(NamedTuple):
    """A batch as every expert of a mixture reads it, and where its forecasts come from."""

    past: Float[Tensor, "batch past features"]
    future: Float[Tensor, "batch future features"]
    observed: Bool[Tensor, "batch past"]  # patches that hold a value
    same: Bool[Tensor, "batch batch"]  # rows of one group
    together: Bool[Tensor, ""]  # whether any row shares its group
    loc: Float[Tensor, "batch 1"]
    scale: Float[Tensor, "batch 1"]
    gates: Float[Tensor, "batch expert"]  # 0 for experts that do not run


def known_ahead(known: Tensor | None, *, rows: int, steps: int) -> Float[Tensor, "rows steps"]:
    """Return what is known of the steps to forecast, NaN where nothing is: its width is the graph's horizon."""
    ahead = torch.full((rows, steps), torch.nan)
    if known is not None:
        ahead[:, : known.shape[1]] = known[:, :steps]
    return ahead


class ReadForm(nn.Module):
    """Normalise a batch, cut it into patches and choose the experts of each row.

    A model that is not a mixture is its own only expert.
    """

    def __init__(self, model: ExactChronos2Model | DistilledMoE) -> None:
        super().__init__()
        self.settings, self.norm = model.chronos_config, model.instance_norm
        self.router = RouterForm(model) if isinstance(model, DistilledMoE) else None

    def forward(
        self,
        context: Float[Tensor, "batch time"],
        group_ids: Int[Tensor, " batch"],
        route_ids: Int[Tensor, " batch"],
        future_covariates: Float[Tensor, "batch horizon"],
    ) -> Read:
        """Read a batch, of any length and horizon from 1 on: what is missing of a patch is NaN."""
        size = self.settings.input_patch_size
        num_past, num_future = ((part.shape[1] + size - 1) // size for part in (context, future_covariates))
        loc, scale = loc_and_scale_without_branch(context, self.norm)
        time = torch.arange(num_past * size, dtype=torch.float32) - num_past * size
        values = pad(context, (size, 0), value=torch.nan)
        values = values[:, values.shape[1] - num_past * size :]
        past, observed = self._patches(values, time, loc, scale, num_past)
        ahead = torch.arange(num_future * size, dtype=torch.float32)
        values = pad(future_covariates, (0, size), value=torch.nan)[:, : num_future * size]
        future, _ = self._patches(values, ahead, loc, scale, num_future)
        same = group_ids[:, None] == group_ids[None]
        together = same.sum() > same.shape[0]
        if self.router is None:
            gates = torch.ones_like(loc)
        else:
            gates = self.router(context, past, observed, route_ids[:, None] == route_ids[None])
        return Read(past, future, observed, same, together, loc, scale, gates)

    def _patches(self, values: Tensor, time: Tensor, loc: Tensor, scale: Tensor, number: int) -> tuple[Tensor, Tensor]:
        shape = (values.shape[0], number, self.settings.input_patch_size)
        seen = ~values.isnan()
        normed = torch.where(seen, self.norm(values, (loc, scale))[0], 0.0)
        time = (time / self.settings.time_encoding_scale).expand(values.shape)
        parts = [part.reshape(shape) for part in (time, normed, seen.float())]
        return torch.cat(parts, dim=-1), seen.reshape(shape).any(dim=-1)


class WriteForm(nn.Module):
    """Bring normalised quantiles back to the unit of each series, for as many steps as were asked for."""

    def __init__(self, model: ExactChronos2Model | DistilledMoE) -> None:
        super().__init__()
        self.norm = model.instance_norm

    def forward(
        self,
        normalized: Float[Tensor, "batch quantile steps"],
        loc: Float[Tensor, "batch 1"],
        scale: Float[Tensor, "batch 1"],
        future_covariates: Float[Tensor, "batch horizon"],
    ) -> Float[Tensor, "batch quantile horizon"]:
        """Unscale."""
        normalized = normalized[:, :, : future_covariates.shape[1]]
        quantiles: Tensor = self.norm.inverse(normalized, (loc[:, None], scale[:, None]))
        return quantiles


class _Weights(nn.Module):
    """Weights as products read them: ``(in, out)``, so that a graph holds them as they are."""

    def _keep(self, name: str, weight: Tensor) -> None:
        weight = weight.detach() if weight.ndim == 1 else weight.detach().mT
        self.register_buffer(name, weight.clone(memory_format=torch.contiguous_format))  # apart from the model


class StudentForm(_Weights):
    """The encoder of a Chronos-2 model from patches to normalised quantiles; weights are ``(in, out)``.

    Args:
        model: with dense feed-forward layers, in float32.
        grouped: whether rows attend to others; if not, each is alone in its group.

    Raises:
        InputError: the model has layers that are not Chronos-2's own.
    """

    cos: Tensor
    sin: Tensor
    final: Tensor
    reg: Tensor

    def __init__(self, model: ExactChronos2Model, *, grouped: bool) -> None:
        super().__init__()
        dense = all(
            type(block.layer[2]) is FeedForward and type(block.layer[2].mlp) is MLP for block in model.encoder.block
        )
        if not (dense and can_fold(model.encoder, model.input_patch_embedding)):
            raise InputError(
                "only dense Chronos-2 models are exported: students, and mixtures of them; merge adapters first"
            )
        self.grouped, self.num_quantiles = grouped, model.num_quantiles
        self.eps = model.config.layer_norm_epsilon
        self.embed, self.head = (
            _ResidualWeights(model.input_patch_embedding),
            _ResidualWeights(model.output_patch_embedding),
        )
        self._keep("final", model.encoder.final_layer_norm.weight)
        first = model.encoder.block[0].layer[0].self_attention
        self.heads, self.width = first.n_heads, first.kv_proj_dim
        settings = model.chronos_config
        longest = settings.context_length // settings.input_patch_size + settings.max_output_patches + 2
        rotation = first.rope_embed(first.q.weight, torch.arange(longest)[None])
        for name, part in zip(("cos", "sin"), rotation, strict=True):
            self.register_buffer(name, part[0, :, None])
        self.uses_reg = settings.use_reg_token
        if self.uses_reg:
            self._keep("reg", model.shared.weight[model.config.reg_token_id])
        self.blocks = nn.ModuleList(_BlockWeights(block) for block in model.encoder.block)

    def forward(
        self,
        past: Float[Tensor, "batch past features"],
        future: Float[Tensor, "batch future features"],
        observed: Bool[Tensor, "batch past"],
        same: Bool[Tensor, "batch batch"],
    ) -> Float[Tensor, "batch quantile horizon"]:
        """Forecast in the model's normalised space."""
        kept = future.shape[1]
        hidden = [self.embed(past), self.embed(future)]
        if self.uses_reg:
            hidden.insert(1, self.reg.expand(past.shape[0], 1, -1))
        states = torch.cat(hidden, dim=1)
        seen = pad(observed, (0, kept + len(hidden) - 2), value=True)
        mask = _ignore(seen[:, None, None, :])
        for index, weights in enumerate(self._blocks()):
            if index == len(self.blocks) - 1:
                states = self._in_time(states, weights, mask, first=states.shape[1] - kept)
                seen = seen[:, seen.shape[1] - kept :]
            else:
                states = self._in_time(states, weights, mask, first=0)
            states = self._in_groups(states, weights, same, seen)
            states = states + (self._normed(states) @ weights.feed_in).relu() @ weights.feed_out
        patches = self.head(self._normed(states) * self.final).unflatten(-1, (self.num_quantiles, -1))
        result: Tensor = patches.transpose(1, 2).flatten(start_dim=2)
        return result

    def _blocks(self) -> Iterator["_BlockWeights"]:
        yield from self.blocks  # type: ignore[misc]

    def _normed(self, states: Tensor) -> Tensor:
        result: Tensor = states * (states.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()
        return result

    def _in_time(self, states: Tensor, weights: "_BlockWeights", mask: Tensor, *, first: int) -> Tensor:
        normed = self._normed(states)
        q, k, v = (
            (part @ weight).unflatten(-1, (self.heads, self.width))
            for part, weight in (
                (normed[:, first:], weights.time_q),
                (normed, weights.time_k),
                (normed, weights.time_v),
            )
        )
        tokens = states.shape[1]
        q, k = self._rotate(q, first, tokens).transpose(1, 2), self._rotate(k, 0, tokens)
        score = q @ k.permute(0, 2, 3, 1) + mask
        mixed = score.softmax(dim=-1) @ v.transpose(1, 2)
        result: Tensor = states[:, first:] + mixed.transpose(1, 2).flatten(-2) @ weights.time_out
        return result

    def _rotate(self, states: Tensor, first: int, last: int) -> Tensor:
        low, high = states.chunk(2, dim=-1)
        return states * self.cos[first:last] + torch.cat([-high, low], dim=-1) * self.sin[first:last]

    def _in_groups(self, states: Tensor, weights: "_BlockWeights", same: Tensor, seen: Tensor) -> Tensor:
        normed = self._normed(states)
        if not self.grouped:
            return states + normed @ weights.alone
        q, k, v = (
            (normed @ weight).unflatten(-1, (self.heads, self.width)).permute(1, 2, 0, 3)  # (token, head, batch, width)
            for weight in (weights.group_q, weights.group_k, weights.group_v)
        )
        mask = _ignore(same[None, None] & seen.T[:, None, None])
        mixed = (q @ k.transpose(2, 3) + mask).softmax(dim=-1) @ v
        result: Tensor = states + mixed.permute(2, 0, 1, 3).flatten(-2) @ weights.group_out
        return result


class _ResidualWeights(_Weights):
    """A two-layer patch embedding beside a linear one."""

    hidden_in: Tensor
    hidden_bias: Tensor
    output_in: Tensor
    output_bias: Tensor
    residual_in: Tensor

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.act = block.act
        for name in ("hidden", "output", "residual"):
            self._keep(f"{name}_in", getattr(block, f"{name}_layer").weight)
        self._keep("hidden_bias", block.hidden_layer.bias)
        self._keep("output_bias", block.output_layer.bias + block.residual_layer.bias)

    def forward(self, states: Tensor) -> Tensor:
        inside = self.act(states @ self.hidden_in + self.hidden_bias)
        result: Tensor = inside @ self.output_in + states @ self.residual_in + self.output_bias
        return result


class _BlockWeights(_Weights):
    """A block's weights with the norms before them multiplied in, ``(in, out)`` each."""

    time_q: Tensor
    time_k: Tensor
    time_v: Tensor
    time_out: Tensor
    group_q: Tensor
    group_k: Tensor
    group_v: Tensor
    group_out: Tensor
    alone: Tensor
    feed_in: Tensor
    feed_out: Tensor

    def __init__(self, block: Any) -> None:
        super().__init__()
        time, group, dense = block.layer
        for name, layer in (("time", time), ("group", group)):
            for part in "qkv":
                weight = getattr(layer.self_attention, part).weight * layer.layer_norm.weight
                self._keep(f"{name}_{part}", weight)
            self._keep(f"{name}_out", layer.self_attention.o.weight)
        self._keep("alone", group.self_attention.o.weight @ weight)
        self._keep("feed_in", dense.mlp.wi.weight * dense.layer_norm.weight)
        self._keep("feed_out", dense.mlp.wo.weight)


def _ignore(attended: Bool[Tensor, "..."]) -> Float[Tensor, "..."]:
    return torch.where(attended, 0.0, torch.finfo(torch.float32).min)


class RouterForm(nn.Module):
    """The router of a mixture with the choice of experts: a dense table of gates, 0 for those that do not run."""

    bias: Tensor | None

    def __init__(self, mixture: DistilledMoE) -> None:
        super().__init__()
        self.router, self.routing, self.generalist = mixture.router, mixture.moe.routing, mixture.generalist
        self.length = mixture.moe.router.feature_length
        self.embed = mixture.experts[0].input_patch_embedding if mixture.moe.router.use_patch_embedding else None
        self.familiarity = mixture.familiarity if mixture.diverts else None
        self.register_buffer("bias", mixture.balance_bias.bias if mixture.moe.balance.bias_rate else None)

    def forward(
        self,
        context: Float[Tensor, "batch time"],
        past: Float[Tensor, "batch past features"],
        observed: Bool[Tensor, "batch past"],
        same: Bool[Tensor, "batch batch"],
    ) -> Float[Tensor, "batch expert"]:
        """Return the gate of each expert; the rows of a group get the same."""
        latest = pad(context, (self.length, 0), value=torch.nan)[:, context.shape[1] :]
        features = series_features(latest, max_length=self.length, spectra=direct_spectra)
        if self.embed is not None:
            features = torch.cat([features, pool_tokens(self.embed(past), observed=observed)], dim=1)
        weight = context.isfinite().any(dim=1).float().clamp(min=1e-6) * same.float()
        weight = weight / weight.sum(dim=1, keepdim=True)
        gates = choose(weight @ self.router(features), self.routing, bias=self.bias, generalist=self.generalist).gates()
        if self.familiarity is None:
            return gates
        away = (weight @ self.familiarity(features)[:, None] > self.familiarity.limit).float()
        return torch.cat([gates * (1 - away), away], dim=1)
