"""Distillation losses, in Chronos-2's normalised space (instance norm, then arcsinh)."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from chronomoe.models.configuration import configuration


@configuration
class LossConfig:
    """What a student is trained on."""

    soft_weight: float = Field(0.5, ge=0, le=1)
    """Share of the soft loss; the hard loss has the rest."""
    soft_kind: Literal["mae", "mse", "huber"] = "mae"
    """Distance to the teacher's quantiles."""
    huber_delta: float = Field(0.1, gt=0)
    """Where the Huber distance turns from squared to absolute."""
    horizon_weights: Literal["equal", "linear", "exponential"] = "equal"
    """Weight of the steps of the horizon: alike, or falling to half of the first step's by the last, or by e."""
    hidden_weight: float = Field(0.0, ge=0)
    """Weight of the gap between hidden states at the same relative depth; needs the teacher itself."""


class LossParts(NamedTuple):
    """The loss and what it is made of."""

    total: Float[Tensor, ""]
    soft: Float[Tensor, ""]
    hard: Float[Tensor, ""]


def quantile_loss(
    quantiles: Float[Tensor, "batch quantile horizon"],
    target: Float[Tensor, "batch horizon"],
    *,
    levels: Float[Tensor, " quantile"],
) -> Float[Tensor, "batch horizon"]:
    """Twice the pinball loss, averaged over levels, step by step; NaN where the target is.

    Chronos-2's own loss sums over levels instead, and keeps masked steps in its denominator.
    """
    gap = target[:, None] - quantiles
    return 2 * torch.maximum(levels[:, None] * gap, (levels[:, None] - 1) * gap).mean(dim=1)


def soft_loss(
    student: Float[Tensor, "batch quantile horizon"],
    teacher: Float[Tensor, "batch quantile horizon"],
    *,
    kind: Literal["mae", "mse", "huber"] = "mae",
    huber_delta: float = 0.1,
) -> Float[Tensor, "batch horizon"]:
    """Gap to the teacher at equal quantile levels, averaged over levels, step by step.

    With "mae" this estimates the 1-Wasserstein distance between the two forecast distributions; Hinton et al., 2015,
    https://arxiv.org/abs/1503.02531, use cross-entropy on logits instead.
    """
    gap = student - teacher
    if kind == "mse":
        return gap.square().mean(dim=1)
    if kind == "huber":
        return torch.nn.functional.huber_loss(student, teacher, reduction="none", delta=huber_delta).mean(dim=1)
    return gap.abs().mean(dim=1)


def horizon_weights(kind: Literal["equal", "linear", "exponential"], horizon: int) -> Float[Tensor, " horizon"]:
    """Weights of the steps, with a mean of 1."""
    place = torch.linspace(0, 1, horizon)
    weights = {"equal": torch.ones(horizon), "linear": 1 - place / 2, "exponential": torch.exp(-place)}[kind]
    return weights / weights.mean()


def masked_mean(
    loss: Float[Tensor, "batch horizon"],
    observed: Bool[Tensor, "batch horizon"],
    weights: Float[Tensor, " horizon"],
) -> Float[Tensor, ""]:
    """Weighted mean over observed steps; 0 where there is none."""
    counted = torch.where(observed, loss, 0.0) * weights
    return counted.sum() / (observed * weights).sum().clamp(min=1e-9)


def distillation_loss(
    student: Float[Tensor, "batch quantile student_steps"],
    *,
    teacher: Float[Tensor, "batch quantile teacher_steps"] | None,
    target: Float[Tensor, "batch horizon"],
    levels: Float[Tensor, " quantile"],
    config: LossConfig,
) -> LossParts:
    """``soft_weight * soft + (1 - soft_weight) * hard`` over the steps that have a target.

    Args:
        student: normalised quantiles, with or without trailing steps beyond the target's.
        teacher: normalised quantiles; the loss is the hard one alone when None.
        target: normalised; NaN steps, and so rows of covariates, count in neither part.
        levels: quantile levels.
        config: weights and kinds.
    """
    horizon = target.shape[1]
    student = student[..., :horizon]
    observed = target.isfinite()
    weights = horizon_weights(config.horizon_weights, horizon).to(student)
    safe = torch.where(observed, target, 0.0)
    hard = masked_mean(quantile_loss(student, safe, levels=levels), observed, weights)
    if teacher is None:
        return LossParts(hard, torch.zeros_like(hard), hard)
    gap = soft_loss(student, teacher[..., :horizon].to(student), kind=config.soft_kind, huber_delta=config.huber_delta)
    soft = masked_mean(gap, observed, weights)
    return LossParts(config.soft_weight * soft + (1 - config.soft_weight) * hard, soft, hard)


def hidden_loss(
    student: tuple[Tensor, ...],
    teacher: tuple[Tensor, ...],
    layers: list[int],
    *,
    observed: Bool[Tensor, "batch token"] | None = None,
) -> Float[Tensor, ""]:
    """Mean of one minus the cosine between tokens of student layers and the teacher layers they correspond to.

    Where ``observed`` is given, other tokens, of patches without any value, do not count.
    Cosine, not distance, because residual streams grow with depth; Sanh et al., 2019, https://arxiv.org/abs/1910.01108.
    """
    gaps = [
        1 - torch.nn.functional.cosine_similarity(own, teacher[layer].detach().to(own), dim=-1)
        for own, layer in zip(student, layers, strict=True)
    ]
    return torch.stack([gap.mean() if observed is None else gap[observed].mean() for gap in gaps]).mean()
