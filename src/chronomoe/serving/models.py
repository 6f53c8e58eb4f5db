"""A model that is served: series of requests in, quantiles out."""

import functools
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from chronos.chronos2.dataset import PreparedInput
from chronos.utils import interpolate_quantiles
from numpy.typing import NDArray

from chronomoe.data.forecasts import Unit, in_units
from chronomoe.models.mixture.explanation import explain
from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.pipeline import ChronoMoEPipeline

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A series and what is asked of it."""

    context: Values
    """``(row, time)``: targets, then past covariates, then known ones."""
    future: Values
    """``(row, horizon)``: NaN but for known covariates."""
    n_targets: int
    n_known: int
    levels: tuple[float, ...] = ()
    explain: bool = False

    @property
    def horizon(self) -> int:
        """Steps to forecast."""
        return int(self.future.shape[1])


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A forecast in the unit of its series."""

    median: Values
    """``(variate, horizon)``"""
    quantiles: Values
    """``(level, variate, horizon)``"""
    experts: dict[str, float] | None = None
    reasons: list[tuple[str, float]] | None = None


class ServedModel:
    """A pipeline under a name; ``count_experts`` is told how many rows each expert forecast, pass by pass."""

    def __init__(
        self, name: str, pipeline: ChronoMoEPipeline, *, count_experts: Callable[[str, str, int], None] | None = None
    ) -> None:
        self.name, self.pipeline = name, pipeline
        names = list(getattr(pipeline.model.config, "expert_names", ()))
        self.experts: list[str] = names if len(names) > 1 else []
        if self.experts and count_experts is not None:
            tell = functools.partial(count_experts, name)
            pipeline.model.register_forward_hook(lambda *call: _count(call[-1].routing, self.experts, tell))

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """What a client may want to know before it asks."""
        return {
            "name": self.name,
            "ready": True,
            "context_length": self.pipeline.model_context_length,
            "horizon_of_one_pass": self.pipeline.model_prediction_length,
            "quantiles": self.pipeline.quantiles,
            "experts": self.experts,
        }

    def patches(self, steps: int) -> int:
        """Return the tokens that steps are read or written as."""
        return int(-(-steps // self.pipeline.model_output_patch_size))

    def key(self, task: Task) -> Hashable:
        """Say which tasks may share a batch: of one forecast length, contexts within a factor of two, alone or not."""
        read = self.patches(min(task.context.shape[1], self.pipeline.model_context_length))
        return self.name, self.patches(task.horizon), (read - 1).bit_length(), len(task.context) > 1

    def forecast(self, tasks: Sequence[Task]) -> list[Answer]:
        """Forecast tasks of one key."""
        steps = self.patches(tasks[0].horizon) * self.pipeline.model_output_patch_size
        units, inputs = zip(*(self._prepare(task, steps) for task in tasks), strict=True)
        rows = sum(len(task.context) for task in tasks)
        found = self.pipeline.predict(list(inputs), prediction_length=steps, batch_size=rows)
        asked = [one for task, one in zip(tasks, inputs, strict=True) if task.explain and self.experts]
        said = iter(self._explain(asked))
        return [
            self._answer(task, *pair, *(next(said) if task.explain and self.experts else (None, None)))
            for task, *pair in zip(tasks, units, found, strict=True)
        ]

    def _prepare(self, task: Task, steps: int) -> tuple[Unit, PreparedInput]:
        context = task.context[:, -self.pipeline.model_context_length :]
        future = np.full((len(context), steps), np.nan)
        future[:, : task.horizon] = task.future
        unit, past, known = in_units(context[None], future[None])
        return Unit(*(column[0] for column in unit)), PreparedInput(
            context=past[0],
            future_covariates=known[0],
            n_targets=task.n_targets,
            n_covariates=len(context) - task.n_targets,
            n_future_covariates=task.n_known,
        )

    def _answer(self, task: Task, unit: Unit, found: torch.Tensor, experts: Any, reasons: Any) -> Answer:
        found = found[..., : task.horizon].movedim(1, 2)  # (variate, horizon, quantile)
        at = [*task.levels, 0.5]
        trained = self.pipeline.quantiles
        if set(at) <= set(trained):
            found = found[..., [trained.index(level) for level in at]]
        else:
            found = interpolate_quantiles(at, trained, found)
        size, level = unit.size[: task.n_targets, None], unit.level[: task.n_targets, None]
        values = found.double().numpy().transpose(2, 0, 1) * size + level
        return Answer(median=values[-1], quantiles=values[:-1], experts=experts, reasons=reasons)

    def _explain(
        self, inputs: Sequence[PreparedInput]
    ) -> list[tuple[dict[str, float], list[tuple[str, float]] | None]]:
        if not inputs:
            return []
        model = self.pipeline.model
        routed = self.pipeline.routing(list(inputs))
        if not isinstance(model, DistilledMoE):  # an exported graph holds its router inside
            return [(one, None) for one in routed]
        return [
            (experts, explain(model, one["context"].to(model.device)))
            for experts, one in zip(routed, inputs, strict=True)
        ]


def _count(routing: Any, experts: Sequence[str], tell: Callable[[str, int], None]) -> None:
    for name, rows in zip(experts, (routing.gates() > 0).sum(dim=0).tolist(), strict=True):
        tell(name, rows)


class ModelSet:
    """Models by name; a batch holds tasks of one of them."""

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        self.models = dict(models)

    def __getitem__(self, name: str) -> ServedModel:
        return self.models[name]

    def run(self, tasks: Sequence[tuple[str, Task]]) -> list[Answer]:
        """Forecast tasks, each with its model's name, of one key."""
        return [
            answer
            for name, group in itertools.groupby(tasks, key=lambda each: each[0])
            for answer in self.models[name].forecast([task for _, task in group])
        ]
