"""Training a router on frozen experts, from forecasts that they made once."""

import copy
import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from chronomoe.data.windows import Window, check_seed, collate, model_inputs, to_device
from chronomoe.errors import InputError
from chronomoe.models.balancing import expert_load, load_balancing_loss, z_loss
from chronomoe.models.configuration import configuration
from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.models.mixture.router import choose, pool_groups
from chronomoe.training.losses import quantile_loss


class ExpertForecasts(NamedTuple):
    """What every expert says of every window, and what happened: all that a router learns from.

    One row for each target variate; rows of one window share a group, numbered from 0 without gaps. The router reads
    all members of a group, covariates too.
    """

    features: Float[Tensor, "member feature"]
    member: Int[Tensor, " member"]  # group of each member
    observed: Bool[Tensor, " member"]  # whether its context has any value
    group: Int[Tensor, " row"]
    quantiles: Float[Tensor, "row expert quantile horizon"]  # normalised, half precision
    target: Float[Tensor, "row horizon"]  # normalised, NaN where not observed
    domain: Int[Tensor, " row"]

    def to(self, device: torch.device) -> "ExpertForecasts":
        """Return them on a device."""
        return ExpertForecasts(*(part.to(device) for part in self))


@configuration
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
    target_weight: float = 0.0
    """Weight of the cross-entropy to each window's best experts; one window's losses are noisy labels, see LOG.md."""
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
        rates = (self.learning_rate, self.target_temperature)
        if self.batch_size < 1 or not all(0 < rate < math.inf for rate in rates):
            raise InputError(
                "batch_size, learning_rate and target_temperature must be positive, got "
                f"{self.batch_size}, {self.learning_rate} and {self.target_temperature}"
            )
        weights = (self.target_weight, self.mixture_weight)
        if not all(0 <= weight < math.inf for weight in weights) or sum(weights) == 0:
            raise InputError(
                "target_weight and mixture_weight must not be negative, nor both 0, got "
                f"{self.target_weight} and {self.mixture_weight}"
            )
        if not (0 <= self.noise < math.inf and 0 <= self.weight_decay < math.inf):
            raise InputError(f"noise and weight_decay must not be negative, got {self.noise} and {self.weight_decay}")
        check_seed(self.seed)
        if self.mixture not in ("all", "top_k"):
            raise InputError(f"mixture must be 'all' or 'top_k', got {self.mixture!r}")


@torch.no_grad()
def forecast_with_experts(
    mixture: DistilledMoE, windows: Dataset[Window], *, domain_of: Sequence[int], batch_size: int = 256
) -> ExpertForecasts:
    """Let every expert forecast every window once; forecasts of rows without a target are left out.

    Windows in which no row has a target are left out altogether.

    Args:
        mixture: its experts forecast, on their device; its router only describes the series.
        windows: numbered from 0 in the order of the data set.
        domain_of: domain of each window.
        batch_size: windows at a time.

    Raises:
        InputError: no window has a target.
    """
    mixture.eval()
    patch_size = mixture.chronos_config.output_patch_size
    loader = DataLoader(windows, batch_size=batch_size, collate_fn=functools.partial(collate, patch_size=patch_size))
    parts: list[tuple[Tensor, ...]] = []
    first = 0
    for loaded in loader:
        batch = to_device(loaded, mixture.device)
        horizon = batch["future_target"].shape[1]
        forecasts = [expert(**model_inputs(batch)) for expert in mixture.experts]
        target, _ = mixture.instance_norm(batch["future_target"], forecasts[0].loc_scale)
        kept = target.isfinite().any(dim=1)
        described = torch.isin(batch["group_ids"], batch["group_ids"][kept])
        window = first + batch["group_ids"]
        quantiles = torch.stack([forecast.normalized_preds[..., :horizon] for forecast in forecasts], dim=1)
        features = mixture.router_inputs(batch["context"])
        observed = batch["context"].isfinite().any(dim=1)
        domain = torch.tensor([domain_of[index] for index in window.tolist()], device=mixture.device)
        members = tuple(part[described] for part in (features, window, observed))
        rows = tuple(part[kept] for part in (window, quantiles.half(), target, domain))
        parts.append(tuple(part.cpu() for part in members + rows))
        first += len(batch["window"])
    cached = ExpertForecasts(*(torch.cat(column) for column in zip(*parts, strict=True)))
    windows_kept = cached.group.unique()
    if len(windows_kept) == 0:
        raise InputError("no window has a target: every value to be forecast is missing; use other cutoffs or series")
    return cached._replace(
        member=torch.searchsorted(windows_kept, cached.member), group=torch.searchsorted(windows_kept, cached.group)
    )


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


def _group_mean(values: Float[Tensor, "row expert"], group: Int[Tensor, " row"]) -> Float[Tensor, "group expert"]:
    return pool_groups(values, group=group, observed=torch.ones_like(group, dtype=torch.bool))


def train_router(
    mixture: DistilledMoE,
    train: ExpertForecasts,
    validation: ExpertForecasts,
    config: RouterTrainingConfig,
) -> dict[str, list[float | int]]:
    """Train the router of a mixture whose experts stay as they are; seconds, since no expert runs.

    The loss has two parts: cross-entropy to probabilities made of each expert's own loss, which also teaches at
    ``top_k=1``, and the quantile loss of the averaged forecast. Stops early on the validation loss of the mixture as
    it will be used, and keeps the best weights seen, an untrained router's included.

    Trains where the mixture is, whatever device the forecasts are on.

    Returns:
        The curve: epoch, training loss, validation loss.

    Raises:
        InputError: the settings let nothing reach the router.
    """
    if mixture.top_k == 1 and config.mixture == "top_k" and config.target_weight == 0:
        raise InputError(
            "at top_k 1 the chosen expert's gate is always 1, so that its forecast teaches the router nothing; "
            "set target_weight above 0, or mixture to 'all'"
        )
    router, generator = mixture.router, torch.Generator().manual_seed(config.seed)
    train, validation = train.to(mixture.device), validation.to(mixture.device)
    levels = torch.tensor(mixture.chronos_config.quantiles, device=mixture.device)
    router.standardize_on(train.features)
    losses = _group_mean(expert_losses(train, levels), train.group)
    wanted = target_probability(losses, temperature=config.target_temperature)
    optimizer = torch.optim.AdamW(router.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    steps = math.ceil(len(wanted) / config.batch_size) * config.epochs
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    trained = torch.nn.ModuleList([router, mixture.balance_bias])
    best, best_state, since = mixture_quantile_loss(mixture, validation), copy.deepcopy(trained.state_dict()), 0
    curve: dict[str, list[float | int]] = {"step": [], "loss": [], "eval_step": [], "eval_loss": []}
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # dropout draws from the global generator
        for epoch in range(config.epochs):
            total = 0.0
            router.train()
            order = torch.randperm(len(wanted), generator=generator).to(wanted.device)
            for chosen in order.split(config.batch_size):
                loss = _router_loss(mixture, _pick(train, chosen), wanted[chosen], levels, config, generator)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(chosen)
            judged = mixture_quantile_loss(mixture, validation)
            curve["step"].append(epoch + 1)
            curve["loss"].append(total / len(wanted))
            curve["eval_step"].append(epoch + 1)
            curve["eval_loss"].append(judged)
            since += 1
            if judged < best:
                best, best_state, since = judged, copy.deepcopy(trained.state_dict()), 0
            if since >= config.patience:
                break
    trained.load_state_dict(best_state)
    router.eval()
    return curve


def _pick(data: ExpertForecasts, groups: Int[Tensor, " group"]) -> ExpertForecasts:
    """Return some groups, numbered in their order."""
    number = torch.full((int(data.group.max()) + 1,), -1, device=data.group.device)
    number[groups] = torch.arange(len(groups), device=number.device)
    member, row = number[data.member], number[data.group]
    return ExpertForecasts(
        features=data.features[member >= 0],
        member=member[member >= 0],
        observed=data.observed[member >= 0],
        group=row[row >= 0],
        quantiles=data.quantiles[row >= 0],
        target=data.target[row >= 0],
        domain=data.domain[row >= 0],
    )


def _router_loss(
    mixture: DistilledMoE,
    data: ExpertForecasts,
    wanted: Float[Tensor, "group expert"],
    levels: Tensor,
    config: RouterTrainingConfig,
    generator: torch.Generator,
) -> Tensor:
    drawn = torch.randn(data.features.shape, generator=generator).to(data.features.device)
    noise = drawn * config.noise * mixture.router.spread
    score = pool_groups(mixture.router(data.features + noise), group=data.member, observed=data.observed)
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
        forecast = torch.einsum("re,reqh->rqh", weight[data.group], data.quantiles.float())
        loss = loss + config.mixture_weight * quantile_loss(forecast, data.target, levels=levels).nanmean()
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
    data = data.to(mixture.device)
    score = pool_groups(mixture.router(data.features), group=data.member, observed=data.observed)
    routing = choose(
        score,
        mixture.moe.routing,
        bias=mixture.balance_bias.bias if mixture.moe.balance.bias_rate else None,
        generalist=mixture.generalist,
    )
    weight = torch.zeros_like(routing.prob).scatter_add(1, routing.expert, routing.gate)
    return torch.einsum("re,reqh->rqh", weight[data.group], data.quantiles.float())


def mixture_quantile_loss(mixture: DistilledMoE, data: ExpertForecasts) -> float:
    """Mean quantile loss of the mixture, each domain counting alike."""
    levels = torch.tensor(mixture.chronos_config.quantiles, device=mixture.device)
    data = data.to(mixture.device)
    loss = quantile_loss(mixture_quantiles(mixture, data), data.target, levels=levels).nanmean(dim=1)
    return torch.stack([loss[data.domain == place].mean() for place in data.domain.unique()]).mean().item()
