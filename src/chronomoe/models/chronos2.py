"""Chronos-2's forward pass, exact and without the work that no output depends on.

Upstream's group attention scores every row of a batch against every other and masks out the rows of other groups,
which costs ``O(batch^2)`` per time step. Here rows meet only the rows of their own group; a row that is alone attends
to itself alone, for which attention is ``o(v(norm(x)))`` whatever ``q`` and ``k`` are. In the last block only the
forecast tokens are computed, and leading patches that hold no value in any row are not computed at all (both encodings
of time count from the cutoff backwards, so nothing else moves). Inference reads weights in the form of
:mod:`chronomoe.models.folded`.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from chronos.chronos2 import Chronos2Model
from chronos.chronos2.layers import Chronos2RotaryEmbedding, GroupSelfAttention, TimeSelfAttention
from chronos.chronos2.model import Chronos2EncoderOutput, Chronos2Output
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import dropout, pad
from transformers import PreTrainedModel

from chronomoe.models import folded
from chronomoe.models.attention import GroupPlan, attend, attend_across, invert, plan_groups
from chronomoe.models.scaling import loc_and_scale


@dataclass
class ForecastOutput(Chronos2Output):
    """``Chronos2Output`` with the forecast in the model's own space, where losses are taken."""

    normalized_preds: Tensor | None = None
    """Quantiles before they are unscaled, ``(batch, quantile, horizon)``: instance-normalised, arcsinh."""
    loc_scale: tuple[Tensor, Tensor] | None = None
    """Mean and standard deviation of each context, ``(batch, 1)`` each."""
    hidden_states: tuple[Tensor, ...] | None = None
    """Tokens after each block, ``(batch, token, d_model)``, when asked for."""


def attend_in_groups(
    layer: GroupSelfAttention,
    hidden: Float[Tensor, "batch token d_model"],
    *,
    plan: GroupPlan,
    observed: Float[Tensor, "batch token"] | None,
) -> Float[Tensor, "batch token d_model"]:
    """Apply a ``GroupSelfAttention`` layer to each group on its own."""
    attention = layer.self_attention
    dropout_p = attention.dropout if layer.training else 0.0
    normed: Tensor = layer.layer_norm(hidden)

    def alone(states: Tensor) -> Tensor:
        value: Tensor = attention.v(states)
        if dropout_p:  # of a head's one weight, which is 1
            kept = dropout(value.new_ones(*value.shape[:2], attention.n_heads, 1), dropout_p)
            value = (value.unflatten(-1, (attention.n_heads, -1)) * kept).flatten(-2)
        updated: Tensor = attention.o(value)
        return updated

    update: Tensor = alone(normed) if not plan.together else torch.empty_like(hidden)
    if plan.together and len(plan.alone):
        update[plan.alone] = alone(normed[plan.alone]).to(update.dtype)
    for rows in plan.together:
        mixed = attend_across(
            *(project(normed[rows]) for project in (attention.q, attention.k, attention.v)),
            num_heads=attention.n_heads,
            observed=None if observed is None else observed[rows],
            dropout_p=dropout_p,
        )
        update[rows] = attention.o(mixed).to(update.dtype)
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
    q, k, v = (
        project(states).unflatten(-1, (attention.n_heads, -1)).transpose(1, 2)
        for project, states in ((attention.q, normed[:, -keep:]), (attention.k, normed), (attention.v, normed))
    )
    cos, sin = (part.to(v.dtype)[:, None] for part in rotation)
    rotate = Chronos2RotaryEmbedding.rotate_half
    q = q * cos[..., -keep:, :] + rotate(q) * sin[..., -keep:, :]
    k = k * cos + rotate(k) * sin
    mixed = attend(q, k, v, mask=mask, dropout_p=attention.dropout if layer.training else 0.0)
    update: Tensor = layer.dropout(attention.o(mixed.transpose(1, 2).flatten(-2)))
    return hidden[:, -keep:] + update


class ExactChronos2Model(Chronos2Model):
    """A ``Chronos2Model`` with a faster forward pass: the same parameters, checkpoint and numbers.

    Made with :func:`use_exact_group_attention`. Tokens of patches in which a whole group has no value are the one
    exception to equality: upstream fills them with an average over the batch, and nothing reads them.

    Inference in bfloat16: see :func:`chronomoe.models.folded.computing_in`.
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
        normalized_only: bool = False,
    ) -> ForecastOutput:
        """Forecast, as ``Chronos2Model.forward`` does; ``loss`` is upstream's when ``future_target`` is given.

        Attention weights are computed by upstream's code, which gives no hidden states. ``normalized_only`` leaves out
        ``quantile_preds``.
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
        patches = self.output_patch_embedding(last).unflatten(-1, (self.num_quantiles, -1))
        normalized = patches.transpose(1, 2).flatten(start_dim=2)
        loss = None
        if future_target is not None:
            loss = self._compute_loss(
                normalized, future_target, future_target_mask, known_mask, loc_scale, num_output_patches
            )
        return self._output(
            notes,
            loss=loss,
            quantile_preds=None if normalized_only else unscale(self, normalized, loc_scale),
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
        """Assemble the output; models with MoE layers add their notes."""
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
        everything_observed = bool(observed.all())
        if trim and not everything_observed:
            first = int(observed.any(dim=0).int().argmax()) if observed.any() else observed.shape[1] - 1
            patches, observed = patches[:, first:], observed[:, first:]
        future, known_mask = self._prepare_patched_future(
            future_covariates=future_covariates,
            future_covariates_mask=future_covariates_mask,
            loc_scale=loc_scale,
            num_output_patches=num_output_patches,
            batch_size=batch,
        )
        weights = self._fold(num_tokens=patches.shape[1] + future.shape[1] + 1)
        tokens = torch.cat([patches, future], dim=1)
        embedding = self.input_patch_embedding
        embedded = embedding(tokens) if weights is None else weights.embed(embedding, tokens)
        num_always = num_output_patches
        if self.chronos_config.use_reg_token:
            reg = self.shared.weight[self.config.reg_token_id].to(embedded.dtype).expand(batch, 1, -1)
            embedded = torch.cat([embedded[:, : patches.shape[1]], reg, embedded[:, patches.shape[1] :]], dim=1)
            num_always += 1
        observed = pad(observed.to(self.dtype), (0, num_always), value=1.0)
        hidden = self.encoder.dropout(embedded.to(self.dtype))  # autocast leaves the residual stream in float32
        everything_observed = everything_observed or bool(observed.all())
        plan = (
            plan_groups(group_ids) if group_ids is not None else GroupPlan(observed.new_ones(batch).nonzero()[:, 0], [])
        )
        run = self._run if weights is None else partial(self._run_folded, weights)
        states = run(
            hidden,
            observed=None if everything_observed else observed,
            plan=plan,
            keep=hidden.shape[1] if keep_all else num_output_patches,
            notes=notes,
        )
        return states if keep_all else states[-1:], loc_scale, known_mask

    def _run(
        self, hidden: Tensor, *, observed: Tensor | None, plan: GroupPlan, keep: int, notes: list[Any]
    ) -> list[Tensor]:
        """Run the encoder's blocks as they are, the last one for ``keep`` tokens."""
        position = torch.arange(hidden.shape[1], device=hidden.device)[None]
        rotation = self.encoder.block[0].layer[0].self_attention.rope_embed(hidden, position)
        mask = None if observed is None else invert(observed[:, None, None, :], hidden.dtype)
        states = []
        for index, block in enumerate(self.encoder.block):
            kept = keep if index == len(self.encoder.block) - 1 else hidden.shape[1]
            seen = None if observed is None else observed[:, -kept:]
            hidden = attend_in_time(block.layer[0], hidden, rotation=rotation, mask=mask, keep=kept)
            hidden = attend_in_groups(block.layer[1], hidden, plan=plan, observed=seen)
            hidden = self._feed_forward(block, hidden, observed=seen, notes=notes)
            states.append(hidden)
        return states

    def _fold(self, *, num_tokens: int) -> folded.FoldedEncoder | None:
        """Return the weights that inference reads; None where a gradient or another type may be needed."""
        if self.training or torch.is_grad_enabled() or self.dtype != torch.float32:
            return None
        layers = self.encoder, self.input_patch_embedding
        if torch.is_autocast_enabled(self.device.type) or not folded.can_fold(*layers):
            return None
        folds: folded.Folds = self.__dict__.setdefault("_folds", folded.Folds())
        return folds.get(*layers, dtype=folded.compute_dtype(), num_tokens=num_tokens)

    def forget_folds(self, *, keep: set[torch.dtype]) -> None:
        """Free the weights that were folded for other types than these."""
        folds = self.__dict__.get("_folds", folded.Folds())
        folds.kept = {dtype: weights for dtype, weights in folds.kept.items() if dtype in keep}

    def _run_folded(
        self,
        weights: folded.FoldedEncoder,
        hidden: Tensor,
        *,
        observed: Tensor | None,
        plan: GroupPlan,
        keep: int,
        notes: list[Any],
    ) -> list[Tensor]:
        """Do what :meth:`_run` does, from folded weights."""
        mask = None if observed is None else invert(observed[:, None, None, :], weights.embed_out.dtype)
        eps, states = self.config.layer_norm_epsilon, []
        for index, (block, own) in enumerate(zip(self.encoder.block, weights.blocks, strict=True)):
            kept = keep if index == len(weights.blocks) - 1 else hidden.shape[1]
            seen = None if observed is None else observed[:, -kept:]
            time, group = (layer.self_attention for layer in block.layer[:2])
            hidden = folded.attend_in_time(hidden, own, time, eps=eps, rotation=weights.rotation, mask=mask, keep=kept)
            hidden = folded.attend_in_groups(hidden, own, group, eps=eps, plan=plan, observed=seen)
            if own.feed_in is None:
                hidden = self._feed_forward(block, hidden, observed=seen, notes=notes)
            else:
                hidden = folded.feed_forward(hidden, own, eps=eps)
            states.append(hidden)
        return states

    def _prepare_patched_context(
        self, context: Tensor, context_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Return what upstream's method does, in fewer steps; ``loc_and_scale`` keeps the digits."""
        settings = self.chronos_config
        size = settings.input_patch_size
        context = context[..., -settings.context_length :]
        mask = ~context.isnan() if context_mask is None else context_mask[..., -settings.context_length :]
        loc_scale = loc_and_scale(context, self.instance_norm)
        normed = self.instance_norm(context, loc_scale)[0].to(self.dtype)
        seen = mask > 0
        missing = -context.shape[-1] % size
        values = pad(torch.where(seen, normed, 0.0), (missing, 0)).unfold(-1, size, settings.input_patch_stride)
        mask = pad(mask.to(self.dtype), (missing, 0)).unfold(-1, size, settings.input_patch_stride)
        steps = torch.arange(-values.shape[1] * size, 0, device=context.device, dtype=torch.float32)
        time = (steps / settings.time_encoding_scale).to(self.dtype).view(1, -1, size).expand(values.shape)
        return torch.cat([time, values, mask], dim=-1), mask.sum(dim=-1) > 0, loc_scale

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
