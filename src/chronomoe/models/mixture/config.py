"""What a mixture's checkpoint says of it."""

import copy
from dataclasses import asdict, field
from typing import Any

from transformers.configuration_utils import PretrainedConfig

from chronomoe.models.balancing import BalanceConfig
from chronomoe.models.configuration import configuration
from chronomoe.models.mixture.router import RouterConfig, RoutingConfig


@configuration
class MixtureConfig:
    """All that a ``DistilledMoE`` adds to its experts."""

    router: RouterConfig = field(default_factory=RouterConfig)
    """The network that scores experts."""
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    """How scores become choices."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    """How experts are kept in use."""


class DistilledMoEConfig(PretrainedConfig):
    """The ``config.json`` of a ``DistilledMoE``."""

    model_type = "chronomoe-distilled"

    def __init__(
        self,
        experts: list[dict[str, Any]] | None = None,
        expert_names: list[str] | None = None,
        moe: dict[str, Any] | None = None,
        low_rank: int | None = None,
        unfamiliar: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.experts = experts or []
        self.low_rank = low_rank
        self.unfamiliar = unfamiliar
        self.expert_names = expert_names or []
        self.moe = moe or asdict(MixtureConfig())
        if self.experts and "feature_length" not in self.moe["router"]:  # written by a version without this field
            limit = self.experts[0]["chronos_config"]["context_length"]
            self.moe = self.moe | {"router": self.moe["router"] | {"feature_length": limit}}
        kwargs.setdefault("chronos_pipeline_class", "ChronoMoEPipeline")
        kwargs.setdefault("chronos_config", copy.deepcopy(self.experts[0]["chronos_config"]) if self.experts else {})
        super().__init__(**kwargs)
