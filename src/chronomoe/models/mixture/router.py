"""The router of route 1: which experts forecast a series, and how much each counts."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from chronomoe.errors import InputError
from chronomoe.models.mixture.features import NUM_FEATURES


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """The network that scores experts."""

    hidden_sizes: tuple[int, ...] = (64,)
    """Units of each hidden layer."""
    dropout: float = 0.2
    """Dropout after each hidden layer."""
    use_patch_embedding: bool = False
    """Also read the first expert's patch embedding, pooled over the context."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_sizes", tuple(self.hidden_sizes))  # JSON and YAML give lists
        if any(size < 1 for size in self.hidden_sizes):
            raise InputError(f"hidden_sizes of a router must be at least 1, got {list(self.hidden_sizes)}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"router dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """How scores become choices."""

    top_k: int = 2
    """Experts of a series; with ``threshold``, the most it may have."""
    temperature: float = 1.0
    """Divides the scores: higher is closer to equal weights."""
    threshold: float | None = None
    """Dynamic K: the fewest experts, best first, whose probabilities reach this together."""
    gumbel: bool = False
    """Add Gumbel noise to the scores in training (Jang et al., 2017, https://arxiv.org/abs/1611.01144)."""
    fallback: Literal["none", "equal", "generalist"] = "none"
    """Where the router is unsure: give the chosen experts equal gates, or take the generalist alone."""
    fallback_below: float = 0.0
    """The router is unsure where its largest probability is below this."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise InputError(f"top_k must be at least 1, got {self.top_k}")
        if not 0 < self.temperature < math.inf:
            raise InputError(f"temperature must be positive, got {self.temperature}")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise InputError(f"the dynamic-K threshold must be in (0, 1], got {self.threshold}")
        if self.fallback not in ("none", "equal", "generalist"):
            raise InputError(f"fallback must be 'none', 'equal' or 'generalist', got {self.fallback!r}")
        if not 0 <= self.fallback_below <= 1:
            raise InputError(f"fallback_below must be in [0, 1], got {self.fallback_below}")


class Routing(NamedTuple):
    """Which experts each row uses, best first, and how much each counts."""

    expert: Int[Tensor, "batch choice"]
    gate: Float[Tensor, "batch choice"]  # sums to 1 over the choices; 0 where dynamic K leaves a choice out
    prob: Float[Tensor, "batch expert"]  # before the cut to top_k
    score: Float[Tensor, "batch expert"]  # before the softmax


def choose(
    score: Float[Tensor, "batch expert"],
    config: RoutingConfig,
    *,
    bias: Float[Tensor, " expert"] | None = None,
    generalist: int | None = None,
    training: bool = False,
    generator: torch.Generator | None = None,
) -> Routing:
    """Keep the most probable experts of each row and renormalise their gates.

    Shazeer et al., 2017, https://arxiv.org/abs/1701.06538, without their noise. At ``top_k=1`` every gate is exactly 1,
    so no gradient reaches the router through it.

    Args:
        score: of each expert.
        config: how to choose.
        bias: added to the scores for the choice, not for the gates (loss-free balancing).
        generalist: the expert that ``fallback="generalist"`` takes.
        training: whether Gumbel noise is drawn.
        generator: draws it.
    """
    num_experts = score.shape[-1]
    if config.top_k > num_experts:
        raise InputError(f"top_k must be from 1 to {num_experts}, the number of experts, got {config.top_k}")
    if config.fallback == "generalist" and generalist is None:
        raise InputError("fallback 'generalist' needs a mixture with a generalist among its experts")
    logit = score.float() / config.temperature  # float32: half precision ties experts
    if training and config.gumbel:
        uniform = torch.rand(logit.shape, generator=generator, device=logit.device).clamp(1e-9, 1 - 1e-7)
        logit = logit - (-uniform.log()).log()
    prob = logit.softmax(dim=-1)
    ranked = prob if bias is None else (logit + bias).softmax(dim=-1)
    expert = ranked.topk(config.top_k, dim=-1).indices
    gate = prob.gather(-1, expert)
    if config.threshold is not None:
        before = gate.cumsum(dim=-1) - gate
        gate = gate * (before < config.threshold)
    gate = gate / gate.sum(dim=-1, keepdim=True)
    if config.fallback != "none":
        unsure = prob.amax(dim=-1, keepdim=True) < config.fallback_below
        if config.fallback == "equal":
            gate = torch.where(unsure, 1 / config.top_k, gate)
        elif generalist is not None:
            alone = torch.zeros_like(gate)
            alone[:, 0] = 1
            gate = torch.where(unsure, alone, gate)
            others = torch.where(expert == generalist, expert[:, :1], expert)
            others = torch.cat([torch.full_like(expert[:, :1], generalist), others[:, 1:]], dim=1)
            expert = torch.where(unsure, others, expert)
    return Routing(expert, gate, prob, score)


class TimeSeriesRouter(nn.Module):
    """An MLP over features of the series that scores experts."""

    mean: Tensor
    spread: Tensor

    def __init__(self, num_experts: int, config: RouterConfig, *, embedding_size: int = 0) -> None:
        super().__init__()
        self.config, self.num_experts = config, num_experts
        sizes = [NUM_FEATURES + embedding_size, *config.hidden_sizes]
        layers: list[nn.Module] = []
        for before, after in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(before, after), nn.GELU(), nn.Dropout(config.dropout)]
        self.network = nn.Sequential(*layers, nn.Linear(sizes[-1], num_experts))
        self.register_buffer("mean", torch.zeros(sizes[0]))
        self.register_buffer("spread", torch.ones(sizes[0]))

    @torch.no_grad()
    def standardize_on(self, features: Float[Tensor, "batch feature"]) -> None:
        """Take the mean and standard deviation of the training features, used on every input from then on."""
        self.mean.copy_(features.mean(dim=0))
        self.spread.copy_(features.std(dim=0, correction=0).clamp(min=1e-3))

    def forward(self, features: Float[Tensor, "batch feature"]) -> Float[Tensor, "batch expert"]:
        """Score the experts of each row."""
        standard = ((features.float() - self.mean.float()) / self.spread.float()).clamp(-5, 5)
        score: Tensor = self.network(standard.to(next(self.network.parameters()).dtype))
        return score.float()


def pool_groups(
    score: Float[Tensor, "batch expert"],
    *,
    group: Int[Tensor, " batch"],
    observed: Bool[Tensor, " batch"],
) -> Float[Tensor, "group expert"]:
    """Average the scores of each group's observed rows; of all its rows where none is.

    Args:
        score: of each row.
        group: of each row, numbered from 0 without gaps.
        observed: whether a row has any value.
    """
    num_groups = int(group.max()) + 1
    weight = observed.to(score.dtype)[:, None].clamp(min=1e-6)
    total = score.new_zeros(num_groups, score.shape[1]).index_add(0, group, score * weight)
    mass = score.new_zeros(num_groups, 1).index_add(0, group, weight)
    return total / mass
