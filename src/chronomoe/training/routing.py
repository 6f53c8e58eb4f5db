"""Training a router on frozen experts, from forecasts that they made once."""

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from chronomoe.data.windows import Window, collate, model_inputs
from chronomoe.errors import InputError
from chronomoe.models.balancing import expert_load, load_balancing_loss, z_loss
from chronomoe.models.distilled_moe import DistilledMoE
from chronomoe.models.router import choose
from chronomoe.training.losses import quantile_loss


class ExpertForecasts(NamedTuple):
    """What every expert says of every window, and what happened: all that a router learns from.

    One row for each target variate; rows of one window share a group.
    """

    features: Float[Tensor, "row feature"]
    group: Int[Tensor, " row"]
    quantiles: Float[Tensor, "row expert quantile horizon"]  # normalised, half precision
    target: Float[Tensor, "row horizon"]  # normalised, NaN where not observed
    domain: Int[Tensor, " row"]


@dataclass(frozen=True, kw_only=True)
class RouterTrainingConfig:
    """How a router is trained."""

    epochs: int = 60
    """Passes over the windows, at most."""
    batch_size: int = 256
    """Windows of a step."""
    learning_rate: float = 2e-3
    """AdamW's; a cosine leads to zero."""
    weight_decay: float = 0.02
    """AdamW's."""
    noise: float = 0.1
    """Standard deviation of the noise added to standardised features: augmentation against overfitting."""
    target_weight: float = 1.0
    """Weight of the cross-entropy to each window's best experts."""
    target_temperature: float = 0.05
    """Relative loss gap at which an expert's target probability falls by a factor of e; small is close to one-hot."""
    mixture_weight: float = 1.0
    """Weight of the forecast loss of the mixture."""
    mixture: Literal["all", "top_k"] = "all"
    """Average all experts by probability in that loss, or only the chosen ones as in inference."""
    patience: int = 12
    """Epochs without a better validation loss before training stops; the best epoch's weights are kept."""
    seed: int = 0
    """Of the order of windows, noise and dropout."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.patience < 1:
            raise InputError(f"epochs and patience must be at least 1, got {self.epochs} and {self.patience}")
        if self.mixture not in ("all", "top_k"):
            raise InputError(f"mixture must be 'all' or 'top_k', got {self.mixture!r}")


@torch.no_grad()
def forecast_with_experts(
    mixture: DistilledMoE, windows: Dataset[Window], *, domain_of: Sequence[int], batch_size: int = 256
) -> ExpertForecasts:
    """Let every expert forecast every window once; rows of covariates are left out.

    Args:
        mixture: its experts forecast; its router only describes the series.
        windows: numbered from 0 in the order of the data set.
        domain_of: domain of each window.
        batch_size: windows at a time.
    """
    mixture.eval()
    patch_size = mixture.chronos_config.output_patch_size
    loader = DataLoader(windows, batch_size=batch_size, collate_fn=functools.partial(collate, patch_size=patch_size))
    parts: list[tuple[Tensor, ...]] = []
    first = 0
    for batch in loader:
        horizon = batch["future_target"].shape[1]
        forecasts = [expert(**model_inputs(batch)) for expert in mixture.experts]
        target, _ = mixture.instance_norm(batch["future_target"], forecasts[0].loc_scale)
        kept = target.isfinite().any(dim=1)
        window = first + batch["group_ids"]
        quantiles = torch.stack([forecast.normalized_preds[..., :horizon] for forecast in forecasts], dim=1)
        features = mixture.router_inputs(batch["context"])
        domain = torch.tensor([domain_of[index] for index in window.tolist()])
        parts.append(tuple(part[kept] for part in (features, window, quantiles.half(), target, domain)))
        first += len(batch["window"])
    return ExpertForecasts(*(torch.cat(column) for column in zip(*parts, strict=True)))


def expert_losses(forecasts: ExpertForecasts, levels: Float[Tensor, " quantile"]) -> Float[Tensor, "row expert"]:
    """Mean quantile loss of each expert on each row."""
    losses = [
        quantile_loss(forecasts.quantiles[:, index].float(), forecasts.target, levels=levels).nanmean(dim=1)
        for index in range(forecasts.quantiles.shape[1])
    ]
    return torch.stack(losses, dim=1)


def target_probability(losses: Float[Tensor, "row expert"], *, temperature: float) -> Float[Tensor, "row expert"]:
    """How probable the router should find each expert: a softmax over relative losses, lowest first."""
    relative = losses / losses.mean(dim=1, keepdim=True).clamp(min=1e-6)
    return (-relative / temperature).softmax(dim=1)


def _group_mean(values: Tensor, group: Tensor) -> Tensor:
    """Average rows of a group and give every row its group's average."""
    count = int(group.max()) + 1
    total = values.new_zeros(count, *values.shape[1:]).index_add(0, group, values)
    return (total / torch.bincount(group, minlength=count).clamp(min=1)[:, None])[group]


def train_router(
    mixture: DistilledMoE,
    train: ExpertForecasts,
    validation: ExpertForecasts,
    config: RouterTrainingConfig,
) -> dict[str, list[float]]:
    """Train the router of a mixture whose experts stay as they are; seconds, since no expert runs.

    The loss has two parts: cross-entropy to probabilities made of each expert's own loss, which also teaches at
    ``top_k=1``, and the quantile loss of the averaged forecast. Stops early on the validation loss of the mixture as
    it will be used, and keeps the best weights seen, an untrained router's included.

    Returns:
        The curve: epoch, training loss, validation loss.
    """
    router, generator = mixture.router, torch.Generator().manual_seed(config.seed)
    levels = torch.tensor(mixture.chronos_config.quantiles)
    router.standardize_on(train.features)
    losses = _group_mean(expert_losses(train, levels), train.group)
    wanted = target_probability(losses, temperature=config.target_temperature)
    optimizer = torch.optim.AdamW(router.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    steps = math.ceil(len(train.group) / config.batch_size) * config.epochs
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, best_state, since = math.inf, copy.deepcopy(router.state_dict()), 0
    curve: dict[str, list[float]] = {"step": [], "loss": [], "eval_step": [], "eval_loss": []}
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # dropout draws from the global generator
        for epoch in range(config.epochs):
            total = 0.0
            router.train()
            for rows in torch.randperm(len(train.group), generator=generator).split(config.batch_size):
                noise = torch.randn(train.features[rows].shape, generator=generator) * config.noise * router.spread
                score = router(train.features[rows] + noise)
                loss = _router_loss(mixture, score, train, rows, wanted[rows], levels, config, generator)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(rows)
            judged = mixture_quantile_loss(mixture, validation)
            curve["step"].append(epoch + 1)
            curve["loss"].append(total / len(train.group))
            curve["eval_step"].append(epoch + 1)
            curve["eval_loss"].append(judged)
            since += 1
            if judged < best:
                best, best_state, since = judged, copy.deepcopy(router.state_dict()), 0
            if since >= config.patience:
                break
    router.load_state_dict(best_state)
    router.eval()
    return curve


def _router_loss(
    mixture: DistilledMoE,
    score: Tensor,
    data: ExpertForecasts,
    rows: Tensor,
    wanted: Tensor,
    levels: Tensor,
    config: RouterTrainingConfig,
    generator: torch.Generator,
) -> Tensor:
    routing = choose(
        score,
        mixture.moe.routing,
        bias=mixture.balance_bias.bias if mixture.moe.balance.bias_rate else None,
        generalist=mixture.generalist,
        training=True,
        generator=generator,
    )
    loss = score.new_zeros(())
    if config.target_weight:
        loss = loss - config.target_weight * (wanted * score.log_softmax(dim=1)).sum(dim=1).mean()
    if config.mixture_weight:
        weight = routing.prob
        if config.mixture == "top_k":
            weight = torch.zeros_like(routing.prob).scatter_add(1, routing.expert, routing.gate)
        forecast = torch.einsum("re,reqh->rqh", weight, data.quantiles[rows].float())
        loss = loss + config.mixture_weight * quantile_loss(forecast, data.target[rows], levels=levels).nanmean()
    balance = mixture.moe.balance
    load = expert_load(routing.expert, num_experts=len(mixture.experts), used=routing.gate > 0)
    if balance.bias_rate:
        mixture.balance_bias.update(load)
    if balance.weight:
        loss = loss + balance.weight * load_balancing_loss(routing.prob, load, kind=balance.kind)
    if balance.z_weight:
        loss = loss + balance.z_weight * z_loss(score)
    return loss


@torch.no_grad()
def mixture_quantiles(mixture: DistilledMoE, data: ExpertForecasts) -> Float[Tensor, "row quantile horizon"]:
    """Return the mixture's normalised forecasts as it would make them, from what its experts said."""
    mixture.eval()
    score = _group_mean(mixture.router(data.features), data.group)
    routing = choose(
        score,
        mixture.moe.routing,
        bias=mixture.balance_bias.bias if mixture.moe.balance.bias_rate else None,
        generalist=mixture.generalist,
    )
    weight = torch.zeros_like(routing.prob).scatter_add(1, routing.expert, routing.gate)
    return torch.einsum("re,reqh->rqh", weight, data.quantiles.float())


def mixture_quantile_loss(mixture: DistilledMoE, data: ExpertForecasts) -> float:
    """Mean quantile loss of the mixture, each domain counting alike."""
    levels = torch.tensor(mixture.chronos_config.quantiles)
    loss = quantile_loss(mixture_quantiles(mixture, data), data.target, levels=levels).nanmean(dim=1)
    return torch.stack([loss[data.domain == place].mean() for place in data.domain.unique()]).mean().item()
