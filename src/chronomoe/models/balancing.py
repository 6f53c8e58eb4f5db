"""Keeping experts in use: losses on the router and a bias without a loss.

For frozen experts that specialise by domain, measure these over mixed batches: in a batch of one domain, an uneven load
is what the router is for.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from chronomoe.errors import InputError
from chronomoe.models.configuration import configuration

AUX_WEIGHT = 0.01
"""Of MoE layers' auxiliary loss beside the forecast's, unless a trainer is told otherwise."""


def expert_load(
    expert: Int[Tensor, "batch choice"], *, num_experts: int, used: Tensor | None = None
) -> Float[Tensor, " expert"]:
    """Share of the choices that go to each expert; sums to 1. Choices where ``used`` is False do not count."""
    counted = expert.flatten() if used is None else expert[used]
    load = torch.bincount(counted, minlength=num_experts).float()
    return load / load.sum().clamp(min=1)


def load_balancing_loss(
    prob: Float[Tensor, "batch expert"], load: Float[Tensor, " expert"], *, kind: Literal["l2", "switch"] = "l2"
) -> Float[Tensor, ""]:
    """How far the router is from using all experts alike: 0 for "l2", 1 for "switch", when it is not at all.

    "l2" is ``num_experts * sum((mean prob - 1 / num_experts) ** 2)``; "switch" is ``num_experts * sum(load * mean
    prob)``, Fedus et al., 2021, https://arxiv.org/abs/2101.03961. Only ``prob`` carries gradient.
    """
    mean, num_experts = prob.mean(dim=0), prob.shape[1]
    if kind == "l2":
        return num_experts * (mean - 1 / num_experts).square().sum()
    if kind == "switch":
        return num_experts * (load.detach() * mean).sum()
    raise InputError(f"the balance loss must be 'l2' or 'switch', got {kind!r}")


def z_loss(score: Float[Tensor, "batch expert"]) -> Float[Tensor, ""]:
    """Mean squared log-sum-exp of the scores: keeps them small. Zoph et al., 2022, https://arxiv.org/abs/2202.08906."""
    return score.logsumexp(dim=-1).square().mean()


class LossFreeBias(nn.Module):
    """A bias per expert, added to the scores for the choice only, that rises while an expert is used too little.

    Wang et al., 2024, https://arxiv.org/abs/2408.15664: no gradient, so nothing competes with the forecast loss.
    """

    bias: Tensor

    def __init__(self, num_experts: int, *, rate: float = 0.001) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("bias", torch.zeros(num_experts))

    @torch.no_grad()
    def update(self, load: Float[Tensor, " expert"]) -> None:
        """Move every bias one ``rate`` towards an equal load."""
        self.bias += self.rate * torch.sign(1 / len(load) - load)


@configuration
class BalanceConfig:
    """How the router is kept from forgetting experts in training."""

    kind: Literal["l2", "switch"] = "l2"
    """The balance loss."""
    weight: float = Field(default=0.0, ge=0)
    """Of the balance loss."""
    z_weight: float = Field(default=0.0, ge=0)
    """Of the z-loss."""
    bias_rate: float = Field(default=0.0, ge=0)
    """Step of the loss-free bias; 0 leaves it out."""

    @property
    def aux_weight(self) -> float:
        """Weight of :meth:`loss` beside the forecast's."""
        return self.weight + self.z_weight

    def loss(
        self, prob: Float[Tensor, "batch expert"], score: Float[Tensor, "batch expert"], load: Float[Tensor, " expert"]
    ) -> Float[Tensor, ""]:
        """Return the mean of balance and z-loss by their weights; 0 where they have none."""
        loss = score.new_zeros(())
        if self.weight:
            loss = loss + self.weight / self.aux_weight * load_balancing_loss(prob, load, kind=self.kind)
        if self.z_weight:
            loss = loss + self.z_weight / self.aux_weight * z_loss(score)
        return loss
