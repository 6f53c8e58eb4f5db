"""The router of route 1: which experts forecast a series, and how much each counts."""

from typing import Annotated, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from chronomoe.errors import InputError
from chronomoe.models.configuration import configuration
from chronomoe.models.mixture.features import NUM_FEATURES


@configuration
class RouterConfig:
    """The network that scores experts."""

    hidden_sizes: tuple[Annotated[int, Field(ge=1)], ...] = (64,)
    """Units of each hidden layer."""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """Dropout after each hidden layer."""
    use_patch_embedding: bool = False
    """Also read the first expert's patch embedding, pooled over the context."""
    feature_length: int = Field(default=512, ge=1)
    """Latest steps that the features describe; a mixture takes its experts' context limit where that is shorter."""


@configuration
class RoutingConfig:
    """How scores become choices."""

    top_k: int = Field(default=2, ge=1)
    """Most experts of a series; without ``threshold``, their number."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the scores: higher is closer to equal weights."""
    threshold: float | None = Field(default=0.8, gt=0, le=1)
    """Dynamic K: the fewest experts, best first, whose probabilities reach this together; None fixes K."""
    gumbel: bool = False
    """Add Gumbel noise to the scores in training (Jang et al., 2017, https://arxiv.org/abs/1611.01144)."""
    fallback: Literal["none", "equal", "generalist"] = "none"
    """Where the router is unsure: give the chosen experts equal gates, or take the generalist alone."""
    fallback_below: float = Field(default=0.0, ge=0, le=1)
    """The router is unsure where its largest probability is below this."""


class Routing(NamedTuple):
    """Which experts each row uses, best first, and how much each counts."""

    expert: Int[Tensor, "batch choice"]
    gate: Float[Tensor, "batch choice"]  # sums to 1 over the choices; 0 where dynamic K leaves a choice out
    prob: Float[Tensor, "batch expert"]  # before the cut to top_k
    score: Float[Tensor, "batch expert"]  # before the softmax

    def gates(self) -> Float[Tensor, "batch expert"]:
        """Return the gate of every expert, 0 where it is not chosen."""
        return torch.zeros_like(self.prob).scatter_add(1, self.expert, self.gate)


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
    score_now = score.float()  # half precision ties experts
    if training and config.gumbel:
        source = score.device if generator is None else generator.device
        uniform = torch.rand(score.shape, generator=generator, device=source, dtype=torch.float32).to(score.device)
        score_now = score_now - (-uniform.clamp(1e-9, 1 - 1e-7).log()).log()
    logit = score_now / config.temperature
    prob = logit.softmax(dim=-1)
    expert = (logit if bias is None else logit + bias).topk(config.top_k, dim=-1).indices
    chosen = logit.gather(-1, expert)
    if config.threshold is not None:
        share = prob.gather(-1, expert)
        chosen = chosen.masked_fill(share.cumsum(dim=-1) - share >= config.threshold, -torch.inf)
    gate = chosen.softmax(dim=-1)  # of scores: probabilities of experts that a bias picks may all be 0
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

    @torch.no_grad()
    def start_from_centroids(self, features: Float[Tensor, "batch feature"], expert: Int[Tensor, " batch"]) -> None:
        """Begin as a nearest-centroid classifier of the rows that each expert is to have.

        The last layer becomes that of Gaussians with one spherical variance around the mean of each expert's rows, as
        the layers before it see them, and the experts' shares of rows as prior.
        """
        last = self.eval().network[-1]
        assert isinstance(last, nn.Linear)
        hidden = self.network[:-1](self._standardized(features))
        count = expert.bincount(minlength=self.num_experts)
        centroid = hidden.new_zeros(last.weight.shape).index_add(0, expert, hidden) / count.clamp(min=1)[:, None]
        unit = (hidden - centroid[expert]).square().sum(dim=1).mean().clamp(min=1e-6)
        prior = (count + 1) / (count + 1).sum()
        last.weight.copy_(centroid / unit)
        last.bias.copy_(prior.log() - centroid.square().sum(dim=1) / (2 * unit))

    def _standardized(self, features: Float[Tensor, "batch feature"]) -> Float[Tensor, "batch feature"]:
        standard = ((features.float() - self.mean.float()) / self.spread.float()).clamp(-5, 5)
        return standard.to(next(self.network.parameters()).dtype)

    def forward(self, features: Float[Tensor, "batch feature"]) -> Float[Tensor, "batch expert"]:
        """Score the experts of each row."""
        score: Tensor = self.network(self._standardized(features))
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
