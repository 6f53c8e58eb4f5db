"""Training a router on frozen experts, from forecasts that they made once."""

import copy
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from chronomoe.data.fit_inputs import are_windows, training_windows, validation_windows, windows_for
from chronomoe.data.windows import Window, collate, model_inputs, to_device
from chronomoe.errors import InputError
from chronomoe.models.configuration import Seed, configuration
from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.models.mixture.router import pool_groups
from chronomoe.training.losses import quantile_loss
from chronomoe.training.validation import domain_mean, row_losses


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

    init: Literal["random", "centroids"] = "random"
    """First weights: drawn, or those of a classifier that gives each series the expert best on the domain or cluster
    whose mean features are nearest."""
    epochs: int = Field(60, ge=1)
    """Passes over the windows, at most."""
    batch_size: int = Field(256, ge=1)
    """Windows of a step."""
    learning_rate: float = Field(2e-3, gt=0)
    """AdamW's; a cosine leads to zero."""
    weight_decay: float = Field(0.02, ge=0)
    """AdamW's."""
    noise: float = Field(0.1, ge=0)
    """Standard deviation of the noise added to standardised features: augmentation against overfitting."""
    target_weight: float = Field(0.03, ge=0)
    """Weight of the cross-entropy to the expert that is best on the whole domain of a window: one window's own losses
    are noisy labels. Left out where one expert is best on all domains."""
    mixture_weight: float = Field(1.0, ge=0)
    """Weight of the forecast loss of the mixture."""
    mixture: Literal["all", "top_k"] = "all"
    """Average all experts by probability in that loss, or only the chosen ones as in inference."""
    patience: int = Field(12, ge=1)
    """Epochs without a better validation loss before training stops; the best epoch's weights are kept."""
    seed: Seed = 0
    """Of the order of windows, noise and dropout."""

    def __post_init__(self) -> None:
        if not (self.target_weight or self.mixture_weight):
            raise InputError("target_weight and mixture_weight must not both be 0: nothing would teach the router")


def fit_router(
    mixture: DistilledMoE,
    train_dataset: Any,
    eval_dataset: Any = None,
    *,
    prediction_length: int = 48,
    context_length: int = 512,
    num_windows: int = 4096,
    args: RouterTrainingConfig | None = None,
    **columns: Any,
) -> dict[str, list[float | int]]:
    """Train the router of a mixture on data of any form; its experts stay as they are.

    Args:
        mixture: its router is trained in place.
        train_dataset: see ``chronomoe.data.fit_inputs.training_windows``.
        eval_dataset: likewise, to stop by. When None, the validation parts of domains and the last window of all other
            series, which training then leaves out; windows that are already cut need a set of their own.
        prediction_length: horizon of the windows.
        context_length: their context.
        num_windows: drawn from the training data.
        args: how the router is trained.
        **columns: ``target``, ``known_covariates`` and ``freq`` of frames and files.

    Returns:
        The curve of ``train_router``.

    Raises:
        InputError: the data break a rule, or the settings let nothing reach the router.

    Examples:
        >>> student = create_student_model(load_teacher("tiny"), "slim")
        >>> mixture = build_mixture({"traffic": student, "web": student})
        >>> curve = fit_router(mixture, ["demo:traffic", "demo:web"], context_length=96, num_windows=8)
        >>> sorted(curve)
        ['eval_loss', 'eval_step', 'loss', 'step']
    """
    config = args or RouterTrainingConfig()
    shape = windows_for(mixture, prediction_length=prediction_length, context_length=context_length)
    alone = eval_dataset is None
    if alone and are_windows(train_dataset):
        raise InputError("windows to train on do not say which of them may stop the training; pass eval_dataset too")
    watched = train_dataset if alone else eval_dataset
    forecasts = []
    for windows in (
        training_windows(train_dataset, shape, size=num_windows, seed=config.seed, leave_last=alone, **columns),
        validation_windows(watched, shape, **columns),
    ):
        count = range(len(windows))  # type: ignore[arg-type]
        of = getattr(windows, "domain_of", getattr(windows, "owner", lambda index: 0))
        forecasts.append(forecast_with_experts(mixture, windows, domain_of=[of(index) for index in count]))
    train, validation = forecasts
    return train_router(mixture, train, validation, config)


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
    losses = [row_losses(own.float(), forecasts.target, levels=levels) for own in forecasts.quantiles.unbind(dim=1)]
    return torch.stack(losses, dim=1)


def _group_mean(values: Float[Tensor, "row expert"], group: Int[Tensor, " row"]) -> Float[Tensor, "group expert"]:
    return pool_groups(values, group=group, observed=torch.ones_like(group, dtype=torch.bool))


def train_router(
    mixture: DistilledMoE,
    train: ExpertForecasts,
    validation: ExpertForecasts,
    config: RouterTrainingConfig,
) -> dict[str, list[float | int]]:
    """Train the router of a mixture whose experts stay as they are; seconds, since no expert runs.

    The loss has two parts: cross-entropy to the expert that is best on a window's domain, which also teaches at
    ``top_k=1``, and the quantile loss of the averaged forecast. Stops early on the validation loss of the mixture as
    it will be used, and keeps the best weights seen, an untrained router's included.

    Trains where the mixture is, whatever device the forecasts are on.

    Returns:
        The curve: epoch, training loss, validation loss.

    Raises:
        InputError: the settings let nothing reach the router.
    """
    router, generator = mixture.router, torch.Generator().manual_seed(config.seed)
    train, validation = train.to(mixture.device), validation.to(mixture.device)
    levels = torch.tensor(mixture.chronos_config.quantiles, device=mixture.device)
    router.standardize_on(train.features)
    losses = _group_mean(expert_losses(train, levels), train.group)
    wanted = _best_of_domain(losses, train)
    if config.init == "centroids":
        router.start_from_centroids(train.features, wanted[train.member])
    target_weight = config.target_weight if len(wanted.unique()) > 1 else 0.0
    if not target_weight and (not config.mixture_weight or (mixture.top_k == 1 and config.mixture == "top_k")):
        raise InputError(
            "nothing would teach the router: at top_k 1 the chosen expert's gate is always 1, and labels need a "
            "target_weight above 0 and domains on which different experts are best; set mixture to 'all'"
        )
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
                loss = _router_loss(
                    mixture, _pick(train, chosen), wanted[chosen], target_weight, levels, config, generator
                )
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


def domain_of_groups(data: ExpertForecasts) -> Int[Tensor, " group"]:
    """Return the domain of each group."""
    return data.domain.new_zeros(int(data.group.max()) + 1).scatter_(0, data.group, data.domain)


def _best_of_domain(losses: Float[Tensor, "group expert"], data: ExpertForecasts) -> Int[Tensor, " group"]:
    """Return for each group the expert with the lowest mean loss on its domain."""
    place = domain_of_groups(data).unique(return_inverse=True)[1]
    return _group_mean(losses, place).argmin(dim=1)[place]


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
    wanted: Int[Tensor, " group"],
    target_weight: float,
    levels: Tensor,
    config: RouterTrainingConfig,
    generator: torch.Generator,
) -> Tensor:
    drawn = torch.randn(data.features.shape, generator=generator).to(data.features.device)
    score = _scores(mixture, data, drawn * config.noise * mixture.router.spread)
    routing = mixture.choose(score, training=True, generator=generator)
    loss = score.new_zeros(())
    if target_weight:
        loss = loss + target_weight * cross_entropy(score, wanted)
    if config.mixture_weight:
        weight = routing.gates() if config.mixture == "top_k" else routing.prob
        forecast = torch.einsum("re,reqh->rqh", weight[data.group], data.quantiles.float())
        loss = loss + config.mixture_weight * quantile_loss(forecast, data.target, levels=levels).nanmean()
    return loss + mixture.aux_weight * mixture.auxiliary_loss(routing, training=True)


@torch.no_grad()
def mixture_quantiles(mixture: DistilledMoE, data: ExpertForecasts) -> Float[Tensor, "row quantile horizon"]:
    """Return the mixture's normalised forecasts as it would make them, from what its experts said."""
    mixture.eval()
    data = data.to(mixture.device)
    gates = mixture.choose(_scores(mixture, data)).gates()
    return torch.einsum("re,reqh->rqh", gates[data.group], data.quantiles.float())


def _scores(mixture: DistilledMoE, data: ExpertForecasts, noise: Tensor | float = 0.0) -> Float[Tensor, "group expert"]:
    return pool_groups(mixture.router(data.features + noise), group=data.member, observed=data.observed)


def mixture_quantile_loss(mixture: DistilledMoE, data: ExpertForecasts) -> float:
    """Return the validation loss of the mixture."""
    levels = torch.tensor(mixture.chronos_config.quantiles, device=mixture.device)
    data = data.to(mixture.device)
    return domain_mean(row_losses(mixture_quantiles(mixture, data), data.target, levels=levels), data.domain)
