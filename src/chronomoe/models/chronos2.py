"""Chronos-2's forward pass, exact and without the work that no output depends on.

Upstream's group attention scores every row of a batch against every other and masks out the rows of other groups,
which costs ``O(batch^2)`` per time step. Here rows meet only the rows of their own group; a row that is alone attends
to itself alone, for which attention is ``o(v(norm(x)))`` whatever ``q`` and ``k`` are. In the last block only the
forecast tokens are computed, and leading patches that hold no value in any row are not computed at all (both encodings
of time count from the cutoff backwards, so nothing else moves).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from chronos.chronos2 import Chronos2Model
from chronos.chronos2.layers import Chronos2RotaryEmbedding, GroupSelfAttention, TimeSelfAttention
from chronos.chronos2.model import Chronos2EncoderOutput, Chronos2Output
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel


@dataclass
class ForecastOutput(Chronos2Output):
    """``Chronos2Output`` with the forecast in the model's own space, where losses are taken."""

    normalized_preds: Tensor | None = None
    """Quantiles before they are unscaled, ``(batch, quantile, horizon)``: instance-normalised, arcsinh."""
    loc_scale: tuple[Tensor, Tensor] | None = None
    """Mean and standard deviation of each context, ``(batch, 1)`` each."""
    hidden_states: tuple[Tensor, ...] | None = None
    """Tokens after each block, ``(batch, token, d_model)``, when asked for."""


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


def attend_in_groups(
    layer: GroupSelfAttention,
    hidden: Float[Tensor, "batch token d_model"],
    *,
    plan: GroupPlan,
    observed: Float[Tensor, "batch token"],
) -> Float[Tensor, "batch token d_model"]:
    """Apply a ``GroupSelfAttention`` layer to each group on its own."""
    attention = layer.self_attention
    normed: Tensor = layer.layer_norm(hidden)
    update: Tensor
    if not plan.together:
        update = layer.dropout(attention.o(attention.v(normed)))
        return hidden + update
    update = torch.empty_like(hidden)
    if len(plan.alone):
        update[plan.alone] = attention.o(attention.v(normed[plan.alone])).to(update.dtype)
    for rows in plan.together:
        q, k, v = (
            rearrange(project(normed[rows]), "g m t (h d) -> g t h m d", h=attention.n_heads)
            for project in (attention.q, attention.k, attention.v)
        )
        mask = invert(rearrange(observed[rows], "g m t -> g t 1 1 m"), q.dtype)
        mixed = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=attention.dropout if layer.training else 0.0, scale=1.0
        )
        update[rows] = attention.o(rearrange(mixed, "g t h m d -> g m t (h d)")).to(update.dtype)
    update = layer.dropout(update)
    return hidden + update


def attend_in_time(
    layer: TimeSelfAttention,
    hidden: Float[Tensor, "batch token d_model"],
    *,
    rotation: tuple[Tensor, Tensor],
    mask: Tensor | None,
    keep: int,
) -> Float[Tensor, "batch kept d_model"]:
    """Apply a ``TimeSelfAttention`` layer, returning the last ``keep`` tokens only."""
    attention = layer.self_attention
    normed = layer.layer_norm(hidden)
    cos, sin = rotation
    q, k, v = (
        rearrange(project(states), "b t (h d) -> b h t d", h=attention.n_heads)
        for project, states in ((attention.q, normed[:, -keep:]), (attention.k, normed), (attention.v, normed))
    )
    cos, sin = cos.to(v.dtype)[:, None], sin.to(v.dtype)[:, None]
    rotate = Chronos2RotaryEmbedding.rotate_half
    q = q * cos[..., -keep:, :] + rotate(q) * sin[..., -keep:, :]
    k = k * cos + rotate(k) * sin
    mixed = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=attention.dropout if layer.training else 0.0, scale=1.0
    )
    update: Tensor = layer.dropout(attention.o(rearrange(mixed, "b h t d -> b t (h d)")))
    return hidden[:, -keep:] + update


def invert(observed: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn 1 = attend, 0 = ignore into the additive mask of attention scores."""
    return (1.0 - observed.to(dtype)) * torch.finfo(dtype).min


class ExactChronos2Model(Chronos2Model):
    """A ``Chronos2Model`` with a faster forward pass: the same parameters, checkpoint and numbers.

    Made with :func:`use_exact_group_attention`. Tokens of patches in which a whole group has no value are the one
    exception to equality: upstream fills them with an average over the batch, and nothing reads them.
    """

    def encode(  # type: ignore[override]
        self,
        context: Tensor,
        context_mask: Tensor | None = None,
        group_ids: Tensor | None = None,
        future_covariates: Tensor | None = None,
        future_covariates_mask: Tensor | None = None,
        num_output_patches: int = 1,
        future_target: Tensor | None = None,
        future_target_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Chronos2EncoderOutput, tuple[Tensor, Tensor], Tensor, int]:
        """Encode every token: see ``Chronos2Model.encode``; attention weights are computed by upstream's code."""
        inputs = (context, context_mask, group_ids, future_covariates, future_covariates_mask, num_output_patches)
        if output_attentions:
            encoded: tuple[Chronos2EncoderOutput, tuple[Tensor, Tensor], Tensor, int] = super().encode(
                *inputs, future_target, future_target_mask, output_attentions=True
            )
            return encoded
        self._check(*inputs, future_target, future_target_mask)
        states, loc_scale, known_mask = self._tokens(*inputs, keep_all=True, trim=False, notes=[])
        last = self.encoder.dropout(self.encoder.final_layer_norm(states[-1]))
        return Chronos2EncoderOutput(last), loc_scale, known_mask, last.shape[1] - num_output_patches - 1

    def forward(
        self,
        context: Tensor,
        context_mask: Tensor | None = None,
        group_ids: Tensor | None = None,
        future_covariates: Tensor | None = None,
        future_covariates_mask: Tensor | None = None,
        num_output_patches: int = 1,
        future_target: Tensor | None = None,
        future_target_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> ForecastOutput:
        """Forecast, as ``Chronos2Model.forward`` does; ``loss`` is upstream's when ``future_target`` is given.

        Attention weights are computed by upstream's code, which gives no hidden states.
        """
        inputs = (context, context_mask, group_ids, future_covariates, future_covariates_mask, num_output_patches)
        states: list[Tensor] | None = None
        notes: list[Any] = []
        weights: dict[str, Any] = {}
        if output_attentions:
            encoded, loc_scale, known_mask, _ = self.encode(
                *inputs, future_target, future_target_mask, output_attentions=True
            )
            last = encoded.last_hidden_state[:, -num_output_patches:]
            weights["enc_time_self_attn_weights"] = encoded.all_time_self_attn_weights
            weights["enc_group_self_attn_weights"] = encoded.all_group_self_attn_weights
        else:
            self._check(*inputs, future_target, future_target_mask)
            states, loc_scale, known_mask = self._tokens(*inputs, keep_all=output_hidden_states, notes=notes)
            last = self.encoder.dropout(self.encoder.final_layer_norm(states[-1][:, -num_output_patches:]))
        normalized = rearrange(self.output_patch_embedding(last), "b n (q p) -> b q (n p)", q=self.num_quantiles)
        loss = None
        if future_target is not None:
            loss = self._compute_loss(
                normalized, future_target, future_target_mask, known_mask, loc_scale, num_output_patches
            )
        return self._output(
            notes,
            loss=loss,
            quantile_preds=unscale(self, normalized, loc_scale),
            normalized_preds=normalized,
            loc_scale=loc_scale,
            hidden_states=tuple(states) if output_hidden_states and states else None,
            **weights,
        )

    def _feed_forward(self, block: nn.Module, hidden: Tensor, *, observed: Tensor | None, notes: list[Any]) -> Tensor:
        """Apply what follows attention in a block; models with MoE layers skip padding and take notes."""
        fed: Tensor = block.layer[2](hidden)  # type: ignore[index,operator]
        return fed

    def _output(self, notes: list[Any], **parts: Any) -> ForecastOutput:
        """Gather the output; models with MoE layers add what they noted."""
        return ForecastOutput(**parts)

    def _check(
        self,
        context: Tensor,
        context_mask: Tensor | None,
        group_ids: Tensor | None,
        future_covariates: Tensor | None,
        future_covariates_mask: Tensor | None,
        num_output_patches: int,
        future_target: Tensor | None,
        future_target_mask: Tensor | None,
    ) -> None:
        self._validate_input(
            context=context,
            context_mask=context_mask,
            future_covariates=future_covariates,
            future_covariates_mask=future_covariates_mask,
            group_ids=group_ids,
            num_output_patches=num_output_patches,
            future_target=future_target,
            future_target_mask=future_target_mask,
        )

    def _tokens(
        self,
        context: Tensor,
        context_mask: Tensor | None,
        group_ids: Tensor | None,
        future_covariates: Tensor | None,
        future_covariates_mask: Tensor | None,
        num_output_patches: int,
        *,
        keep_all: bool,
        notes: list[Any],
        trim: bool = True,
    ) -> tuple[list[Tensor], tuple[Tensor, Tensor], Tensor]:
        batch = context.shape[0]
        patches, observed, loc_scale = self._prepare_patched_context(context=context, context_mask=context_mask)
        if trim:
            first = int(observed.any(dim=0).int().argmax()) if observed.any() else observed.shape[1] - 1
            patches, observed = patches[:, first:], observed[:, first:]
        future, known_mask = self._prepare_patched_future(
            future_covariates=future_covariates,
            future_covariates_mask=future_covariates_mask,
            loc_scale=loc_scale,
            num_output_patches=num_output_patches,
            batch_size=batch,
        )
        parts = [self.input_patch_embedding(patches), self.input_patch_embedding(future)]
        num_always = num_output_patches
        if self.chronos_config.use_reg_token:
            reg = torch.full((batch, 1), self.config.reg_token_id, device=context.device)
            parts.insert(1, self.shared(reg).to(parts[0].dtype))
            num_always += 1
        always = torch.ones(batch, num_always, dtype=self.dtype, device=context.device)
        observed = torch.cat([observed.to(self.dtype), always], dim=1)
        hidden = self.encoder.dropout(torch.cat(parts, dim=1))

        position = torch.arange(hidden.shape[1], device=hidden.device)[None]
        rotation = self.encoder.block[0].layer[0].self_attention.rope_embed(hidden, position)
        everything_observed = bool(observed.all())
        time_mask = None if everything_observed else invert(observed[:, None, None, :], hidden.dtype)
        plan = plan_groups(torch.arange(batch, device=hidden.device) if group_ids is None else group_ids)

        states = []
        for index, block in enumerate(self.encoder.block):
            last = index == len(self.encoder.block) - 1
            keep = num_output_patches if last and not keep_all else hidden.shape[1]
            hidden = attend_in_time(block.layer[0], hidden, rotation=rotation, mask=time_mask, keep=keep)
            hidden = attend_in_groups(block.layer[1], hidden, plan=plan, observed=observed[:, -keep:])
            hidden = self._feed_forward(
                block, hidden, observed=None if everything_observed else observed[:, -keep:], notes=notes
            )
            states.append(hidden)
        return states, loc_scale, known_mask

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Save a checkpoint that stock ``Chronos2Pipeline`` and ``BaseChronosPipeline`` load."""
        self.config.chronos_pipeline_class = "Chronos2Pipeline"
        self.__class__ = Chronos2Model  # the name that is written, and uploaded with push_to_hub
        try:
            self.save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.__class__ = ExactChronos2Model


def unscale(
    model: PreTrainedModel,
    normalized: Float[Tensor, "batch quantile horizon"],
    loc_scale: tuple[Tensor, Tensor],
) -> Float[Tensor, "batch quantile horizon"]:
    """Return quantiles from the normalised space to the unit of the series."""
    flat: Tensor = model.instance_norm.inverse(normalized.flatten(start_dim=1), loc_scale)
    return flat.view(normalized.shape)


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters and no buffer, as loading a checkpoint does: ``module.to(dtype)`` rounds rotary frequencies."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def use_exact_group_attention(model: Chronos2Model) -> ExactChronos2Model:
    """Give a ``Chronos2Model`` the faster forward pass, in place; parameters and checkpoints stay what they are.

    The class of the instance is swapped, as ``torch.nn.utils.parametrize`` and FSDP2 do: nothing is copied.

    Raises:
        TypeError: not a ``Chronos2Model``.
    """
    if type(model) is Chronos2Model:
        model.__class__ = ExactChronos2Model
    if not isinstance(model, ExactChronos2Model):
        raise TypeError(f"exact group attention needs a Chronos2Model, got {type(model).__name__}")
    return model
