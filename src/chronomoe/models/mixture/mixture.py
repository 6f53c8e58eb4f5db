"""Route 1: whole distilled students as experts, chosen per series by a router."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from chronos.chronos2 import Chronos2Model, Chronos2Pipeline
from chronos.chronos2.config import Chronos2CoreConfig, Chronos2ForecastingConfig
from chronos.chronos2.model import Chronos2EncoderOutput
from chronos.chronos_bolt import InstanceNorm
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from chronomoe.errors import InputError
from chronomoe.models.balancing import LossFreeBias, expert_load
from chronomoe.models.chronos2 import (
    ExactChronos2Model,
    ForecastOutput,
    cast_parameters,
    unscale,
)
from chronomoe.models.configuration import parse
from chronomoe.models.mixture.config import DistilledMoEConfig, MixtureConfig
from chronomoe.models.mixture.cores import check_same_task, core_fields
from chronomoe.models.mixture.familiarity import Familiarity, divert
from chronomoe.models.mixture.features import pool_tokens, series_features
from chronomoe.models.mixture.low_rank import make_experts
from chronomoe.models.mixture.router import Routing, RoutingConfig, TimeSeriesRouter, choose, pool_groups
from chronomoe.models.provenance import warn_of_mixed
from chronomoe.models.scaling import loc_and_scale
from chronomoe.models.sparse.upcycling import check_dense
from chronomoe.models.unwrapping import model_of

Pick = Callable[[Any], Any]
"""Takes an expert's rows of a tensor, or of None."""


@dataclass
class DistilledMoEOutput(ForecastOutput):
    """A forecast with the routing that made it."""

    routing: Routing | None = None
    """Experts, gates, probabilities and scores of each row."""
    aux_loss: Tensor | None = None
    """See ``DistilledMoE.auxiliary_loss``; not weighted against the forecast's loss yet."""


class DistilledMoE(PreTrainedModel):
    """A mixture of whole Chronos-2 students: a forecast is the gated average of the chosen experts' quantiles.

    It is called as a ``Chronos2Model`` is. Rows of one group (the variates of a series and its covariates) are routed
    together by their mean score. Quantiles are averaged level by level in the experts' common normalised space (Vincent
    averaging; Ratcliff, 1979), so the median is the average of medians there. Only chosen experts run, each once a
    batch.

    Where there is a ``teacher``, it alone forecasts series that are far from all that the router learned from; the
    router never scores it, and its name is the last of ``config.expert_names``.

    ``experts``, ``router`` and ``top_k`` are there to read; ``build_mixture`` makes one from trained students.
    """

    experts: Sequence[ExactChronos2Model]
    diverts: bool = True
    """Whether the teacher, if there is one, gets series that are unlike all others."""
    config_class = DistilledMoEConfig
    _keep_in_fp32_modules_strict = {"familiarity"}  # half precision would round away what tells series apart
    _supports_long_horizon: bool = True
    _supports_future_covariates: bool = True
    _supports_sdpa: bool = True

    def __init__(self, config: DistilledMoEConfig) -> None:
        super().__init__(config)
        self.moe = parse(config.moe, MixtureConfig, source="the mixture's configuration")
        cores = [Chronos2CoreConfig(**copy.deepcopy(core)) for core in config.experts]
        extra = config.unfamiliar
        teacher = [] if extra is None else [Chronos2CoreConfig(**copy.deepcopy(extra["core"]))]
        check_same_task([*cores, *teacher], config.expert_names)
        if self.moe.routing.top_k > len(cores):
            raise InputError(
                f"top_k must be from 1 to {len(cores)}, the number of experts, got {self.moe.routing.top_k}"
            )
        self.experts = make_experts(cores, rank=config.low_rank)  # type: ignore[assignment]
        self.chronos_config: Chronos2ForecastingConfig = self.experts[0].chronos_config
        self.num_quantiles = len(self.chronos_config.quantiles)
        self.instance_norm: InstanceNorm = self.experts[0].instance_norm
        embedding_size = cores[0].d_model if self.moe.router.use_patch_embedding else 0
        self.router = TimeSeriesRouter(len(cores), self.moe.router, embedding_size=embedding_size)
        self.balance_bias = LossFreeBias(len(cores), rate=self.moe.balance.bias_rate)
        self.teacher: ExactChronos2Model | None = None
        self.familiarity: Familiarity | None = None
        if extra is not None:
            self.teacher = make_experts(teacher, rank=None)[0]  # type: ignore[assignment]
            self.familiarity = Familiarity(num_domains=extra["domains"], num_features=len(self.router.mean))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):  # the router's; experts initialise themselves
            nn.init.kaiming_uniform_(module.weight, a=5**0.5)
            nn.init.zeros_(module.bias)

    @property
    def top_k(self) -> int:
        """Most experts of a series."""
        return self.moe.routing.top_k

    @property
    def generalist(self) -> int | None:
        """Index of the expert named "generalist", if there is one."""
        names = self.config.expert_names
        return names.index("generalist") if "generalist" in names else None

    def set_routing(self, routing: RoutingConfig) -> None:
        """Change how scores become choices; the weights stay."""
        if routing.top_k > len(self.experts):
            raise InputError(f"top_k must be from 1 to {len(self.experts)}, the number of experts, got {routing.top_k}")
        self.moe = replace(self.moe, routing=routing)
        self.config.moe = asdict(self.moe)

    def members(self) -> Iterator[ExactChronos2Model]:
        """Yield the experts, and the teacher where there is one, in the order of ``config.expert_names``."""
        yield from self.experts
        if self.teacher is not None:
            yield self.teacher

    def active_parameters(self) -> int:
        """Count the most that the forecast of one series uses: router and ``top_k`` largest experts, or the teacher."""
        sizes = [sum(p.numel() for p in member.parameters()) for member in self.members()]
        experts = sum(sorted(sizes[: len(self.experts)], reverse=True)[: self.top_k])
        return int(max([experts, *sizes[len(self.experts) :]]) + sum(p.numel() for p in self.router.parameters()))

    def router_inputs(self, context: Float[Tensor, "batch time"]) -> Float[Tensor, "batch feature"]:
        """Return the router's inputs for each row."""
        features = series_features(context, max_length=self.moe.router.feature_length)
        if not self.moe.router.use_patch_embedding:
            return features
        patches, observed, _ = self.experts[0]._prepare_patched_context(context=context)
        with torch.no_grad():
            tokens = self.experts[0].input_patch_embedding(patches).float()
        return torch.cat([features, pool_tokens(tokens, observed=observed)], dim=1)

    def route(
        self,
        context: Float[Tensor, "batch time"],
        *,
        group_ids: Int[Tensor, " batch"] | None = None,
        generator: torch.Generator | None = None,
        diverts: bool = True,
    ) -> Routing:
        """Choose experts for each row, the same ones for all rows of a group.

        In training all series count as familiar, and so without ``diverts``.
        """
        with torch.autocast(context.device.type, enabled=False):
            inputs = self.router_inputs(context)
            parts = self.router(inputs)
            familiarity = self.familiarity if diverts and self.diverts and not self.training else None
            if familiarity is not None:
                parts = torch.cat([parts, familiarity(inputs)[:, None]], dim=1)
        group = torch.arange(len(context), device=context.device)
        if group_ids is not None:
            group = group_ids.unique(return_inverse=True)[1]
            parts = pool_groups(parts, group=group, observed=context.isfinite().any(dim=1))
        scores = parts[:, : self.router.num_experts]
        routing = self.choose(scores, training=self.training, generator=generator)
        if familiarity is not None:
            routing = divert(routing, parts[:, -1] > familiarity.limit)
        return Routing(*(part[group] for part in routing))

    def choose(
        self, scores: Float[Tensor, "group expert"], *, training: bool = False, generator: torch.Generator | None = None
    ) -> Routing:
        """Turn scores into choices: see :func:`chronomoe.models.mixture.router.choose`."""
        return choose(
            scores,
            self.moe.routing,
            bias=self.balance_bias.bias if self.moe.balance.bias_rate else None,
            generalist=self.generalist,
            training=training,
            generator=generator,
        )

    @property
    def aux_weight(self) -> float:
        """Weight of the auxiliary loss in training: see ``BalanceConfig``."""
        return self.moe.balance.aux_weight

    def auxiliary_loss(self, routing: Routing, *, training: bool) -> Float[Tensor, ""]:
        """Return ``BalanceConfig.loss`` of a routing; in training, move the loss-free bias."""
        balance = self.moe.balance
        if not (self.aux_weight or balance.bias_rate):
            return routing.score.new_zeros(())
        load = expert_load(routing.expert, num_experts=routing.prob.shape[1], used=routing.gate > 0)
        if training and balance.bias_rate:
            self.balance_bias.update(load)
        return balance.loss(routing.prob, routing.score, load)

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
        route_ids: Tensor | None = None,
    ) -> DistilledMoEOutput:
        """Forecast, as ``Chronos2Model.forward`` does; experts' attention weights are not returned.

        ``context`` is ``(batch, time)``, oldest first, NaN where missing, ``group_ids`` is ``(batch,)``; what concerns
        the future is ``(batch, horizon)``. ``quantile_preds`` is ``(batch, quantile, horizon)`` in the unit of each
        series.

        ``route_ids``, ``(batch,)``, is for groups that hold several series, as in cross-learning, and says which rows
        are one series with its covariates. Rows of one route id choose their experts together, by their mean score and
        whatever else is in their group; then each expert forecasts the rows that chose it, and of a group, those
        attend to each other. Without it, all rows of a group choose together.
        """
        routing = self.route(_observed(context, context_mask), group_ids=group_ids if route_ids is None else route_ids)

        def forecast(expert: ExactChronos2Model, pick: Pick) -> Tensor:
            output = expert(
                pick(context),
                context_mask=pick(context_mask),
                group_ids=pick(group_ids),
                future_covariates=pick(future_covariates),
                future_covariates_mask=pick(future_covariates_mask),
                num_output_patches=num_output_patches,
                normalized_only=True,
            )
            normalized: Tensor = output.normalized_preds
            return normalized

        normalized = self._mix(routing, forecast)
        loc_scale = loc_and_scale(context[:, -self.chronos_config.context_length :], self.instance_norm)
        loss = None
        if future_target is not None:
            loss = self._loss(
                normalized,
                loc_scale,
                future_target=future_target,
                future_target_mask=future_target_mask,
                future_covariates=future_covariates,
                future_covariates_mask=future_covariates_mask,
                num_output_patches=num_output_patches,
            )
        return DistilledMoEOutput(
            loss=loss,
            quantile_preds=unscale(self, normalized, loc_scale),
            normalized_preds=normalized,
            loc_scale=loc_scale,
            routing=routing,
            aux_loss=self.auxiliary_loss(routing, training=self.training),
        )

    def _mix(
        self,
        routing: Routing,
        run: Callable[[ExactChronos2Model, Pick], Tensor],
    ) -> Tensor:
        """Run each chosen expert on its rows, which ``run`` is given the means to pick, and average by gate."""
        batch, used = len(routing.gate), routing.gate > 0
        mixed: Tensor | None = None
        for index in routing.expert[used].unique().tolist():
            row, choice = torch.where((routing.expert == index) & used)  # dispatch
            everyone = len(row) == batch
            expert = self.experts[index] if self.teacher is None or index < len(self.experts) else self.teacher
            part = run(expert, _keep if everyone else partial(_pick, row=row)).float()
            if self.top_k > 1:
                part = routing.gate[row, choice, None, None] * part
            if everyone:
                mixed = part if mixed is None else mixed + part
            else:
                mixed = part.new_zeros(batch, *part.shape[1:]) if mixed is None else mixed
                mixed.index_add_(0, row, part)  # combine
        assert mixed is not None  # every row has an expert
        return mixed

    def _loss(self, normalized: Tensor, loc_scale: tuple[Tensor, Tensor], **inputs: Any) -> Tensor:
        expert = self.experts[0]
        _, known_mask = expert._prepare_patched_future(
            future_covariates=inputs["future_covariates"],
            future_covariates_mask=inputs["future_covariates_mask"],
            loc_scale=loc_scale,
            num_output_patches=inputs["num_output_patches"],
            batch_size=len(normalized),
        )
        loss: Tensor = expert._compute_loss(
            normalized,
            inputs["future_target"],
            inputs["future_target_mask"],
            known_mask,
            loc_scale,
            inputs["num_output_patches"],
        )
        return loss

    def encode(
        self,
        context: Tensor,
        context_mask: Tensor | None = None,
        group_ids: Tensor | None = None,
        num_output_patches: int = 1,
    ) -> tuple[Chronos2EncoderOutput, tuple[Tensor, Tensor], None, int]:
        """Return the gated average of the chosen experts' tokens, ``(batch, token, d_model)``, as ``embed`` needs it.

        Unfamiliar series are embedded by experts, too.

        Raises:
            InputError: the experts differ in ``d_model``, so that their tokens have no average.
        """
        widths = {expert.config.d_model for expert in self.experts}
        if len(widths) > 1:
            raise InputError(
                f"embeddings need experts of one d_model, these have {sorted(widths)}; embed with one expert"
            )
        routing = self.route(_observed(context, context_mask), group_ids=group_ids, diverts=False)

        def encode(expert: ExactChronos2Model, pick: Pick) -> Tensor:
            inputs = (pick(context), pick(context_mask), pick(group_ids))
            tokens: Tensor = expert.encode(*inputs, num_output_patches=num_output_patches)[0][0]
            return tokens

        tokens = self._mix(routing, encode)
        loc_scale = loc_and_scale(context[:, -self.chronos_config.context_length :], self.instance_norm)
        return Chronos2EncoderOutput(tokens), loc_scale, None, tokens.shape[1] - 1 - num_output_patches


def _keep(values: Tensor | None) -> Tensor | None:
    return values


def _pick(values: Tensor | None, *, row: Tensor) -> Tensor | None:
    return None if values is None else values[row]


def _observed(context: Tensor, mask: Tensor | None) -> Tensor:
    """Mark masked values as missing, so that the router does not read them."""
    return context if mask is None else context.masked_fill(mask == 0, torch.nan)


def build_mixture(
    experts: Mapping[str, Chronos2Model | Chronos2Pipeline] | Sequence[Chronos2Model | Chronos2Pipeline],
    config: MixtureConfig | None = None,
    *,
    num_experts_per_tok: int | None = None,
) -> DistilledMoE:
    """Make a mixture of trained students with an untrained router, of the type and on the device of the first.

    Args:
        experts: models or their pipelines, by name; the name "generalist" makes that one the fallback. Those of a list
            are called "expert-0" and so on.
        config: router, routing and balance.
        num_experts_per_tok: the most experts of a series, in place of ``config.routing.top_k``.

    Raises:
        InputError: the experts cannot be averaged, or ``top_k`` is out of range.

    Examples:
        >>> student = create_student_model(load_teacher("tiny"), "slim")
        >>> mixture = build_mixture({"load": student, "sales": student}, num_experts_per_tok=1)
        >>> mixture.top_k
        1
    """
    named = experts if isinstance(experts, Mapping) else {f"expert-{place}": one for place, one in enumerate(experts)}
    members: dict[str, Chronos2Model] = {name: model_of(expert) for name, expert in named.items()}
    for name, model in members.items():
        check_dense(model, what=f"expert {name!r}", remedy="distil a student, or forecast with that model itself")
    warn_of_mixed(members)
    config = config or MixtureConfig()
    if num_experts_per_tok is not None:
        config = replace(config, routing=replace(config.routing, top_k=num_experts_per_tok))
    names = list(members)
    check_same_task([expert.config for expert in members.values()], names)
    cores = [core_fields(expert.config) for expert in members.values()]
    reach = min(config.router.feature_length, cores[0]["chronos_config"]["context_length"])
    config = replace(config, router=replace(config.router, feature_length=reach))
    mixture = DistilledMoE(DistilledMoEConfig(experts=cores, expert_names=names, moe=asdict(config)))
    for own, expert in zip(mixture.experts, members.values(), strict=True):
        own.load_state_dict(expert.state_dict())
    first = next(iter(members.values()))
    cast_parameters(mixture, first.dtype)
    mixture.to(first.device)
    return mixture
