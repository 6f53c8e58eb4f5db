"""What a run will train and take, estimated from its recipe and a trial of seconds, before anything is written."""

import copy
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil
import torch

from chronomoe.data.windows import CHOSEN_BY, EvaluationWindows
from chronomoe.errors import InputError
from chronomoe.evaluation.cost import count_parameters, weight_bytes
from chronomoe.inputs import GENERALIST, Inputs
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.models.folded import computing_in
from chronomoe.models.precision import settled
from chronomoe.models.sparse.insertion import MoEEnhancedChronos2, MoEInsertionConfig
from chronomoe.models.sparse.upcycling import upcycle
from chronomoe.models.student import StudentConfig, create_student_model
from chronomoe.stages.faults import out_of_memory
from chronomoe.stages.trial import ROUTER_BATCH, Trial, machine, measure, router_step
from chronomoe.training.growing import ExpansionConfig, candidate_places

Bytes = int | float
LOOKS = 5
"""How often a training looks at its validation windows."""
ADAM = 4
"""Weights, their gradients and AdamW's two moments."""


class Planned(NamedTuple):
    """One stage of a run."""

    stage: str
    parameters: int
    """Of the model that is trained or run; of all experts together for those of the mixture."""
    steps: int
    """Optimiser steps."""
    windows: int
    """Windows to forecast."""
    seconds: float
    disk: Bytes
    """That stay."""
    memory: Bytes
    """At the most, beside what the process holds already."""


@dataclass(frozen=True)
class Plan:
    """All stages of a run, with what they take together."""

    stages: Sequence[Planned]
    held: Bytes
    """What this process holds already: interpreter, libraries, teacher, series."""
    scratch: Bytes
    """On disk while the largest student trains, beside what stays."""
    trial: float
    """Seconds that the trial took."""

    @property
    def seconds(self) -> float:
        """Time of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def steps(self) -> int:
        """Optimiser steps of all students."""
        return sum(stage.steps for stage in self.stages)

    @property
    def disk(self) -> Bytes:
        """The most that lies on disk."""
        return self.scratch + sum(stage.disk for stage in self.stages)

    @property
    def memory(self) -> Bytes:
        """The most that the process holds."""
        return self.held + max(stage.memory for stage in self.stages)

    def words(self) -> str:
        """Say it in a line."""
        trained = sum(stage.steps > 0 for stage in self.stages)
        return (
            f"{trained} trainings, {self.steps:,} steps in all: about {_minutes(self.seconds)}, "
            f"{self.memory / 1e9:.1f} GB of memory and {self.disk / 1e6:,.0f} MB of disk on {machine()['processor']}, "
            f"{torch.get_num_threads()} of {os.cpu_count()} cores; from a trial of {self.trial:.1f} s; longer "
            "where other work shares the machine"
        )


def plan(given: Inputs, *, trial: Callable[..., Trial] | None = None) -> Plan:
    """Estimate a run from a timed training step and forecast of each size of model, on its own first windows.

    Args:
        given: what the run needs, checked.
        trial: measures a model on some windows; by default a real trial, which takes seconds.
    """
    begin, held = time.perf_counter(), psutil.Process().memory_info().rss
    batch = given.config.budget.batch_size
    windows = [given.material.windows[index] for index in range(min(batch, len(given.material.windows)))]
    bf16 = settled(given.config.train_dtype, given.teacher) == torch.bfloat16
    try_out = trial or functools.partial(measure, bf16=bf16)
    measured: dict[Any, tuple[ExactChronos2Model, Trial]] = {}

    def of(size: Any, build: Callable[[], ExactChronos2Model], train: bool = True) -> tuple[ExactChronos2Model, Trial]:
        if size not in measured:
            with torch.random.fork_rng():
                model = build()
                try:
                    measured[size] = model, try_out(model, windows, train=train)
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    what = f"{'a training step' if train else 'a forecast'} of {len(windows)} windows"
                    raise InputError(
                        f"{what} with a model of {count_parameters(model):,} parameters ran out of memory in the trial "
                        "before the run; lower budget.batch_size, windows.context_length or the size of the student"
                    ) from error
        return measured[size]

    estimator = _Estimator(given, of, rows=sum(len(window.context) for window in windows) / len(windows))
    stages = list(estimator.stages())
    largest = max((stage.parameters for stage in stages if stage.steps), default=0)
    return Plan(stages, held, scratch=3 * 4 * largest, trial=time.perf_counter() - begin)


class _Estimator:
    """Lists the stages in the order of ``chronomoe.run``."""

    def __init__(self, given: Inputs, of: Callable[..., tuple[ExactChronos2Model, Trial]], *, rows: float) -> None:
        self.given, self.config, self.of, self.rows = given, given.config, of, rows
        self.watched = {name: len(part) for name, part in given.material.validation.items()}
        levels = len(given.teacher.chronos_config.quantiles)
        self.forecast_bytes = 2 * rows * levels * given.config.windows.horizon
        """Of one window, as stores and caches keep them."""

    def stages(self) -> Iterator[Planned]:
        routes, budget = self.config.routes, self.config.budget
        if budget.teacher_steps:
            taught = self.of("taught teacher", lambda: copy.deepcopy(self.given.teacher))
            yield self.training("teacher", taught, budget.teacher_steps)
        labelling = self.teacher(settled(self.config.label_dtype, self.given.teacher))
        yield self.forecasts("soft-targets", labelling, budget.windows)
        if "mixture" in routes:
            yield from self.experts()
        if "generalist-full" in self.config.baselines:
            yield self.student("generalist-full", budget.steps)
        if (wide := self.wide) is not None:
            yield self.student("generalist-wide", self.given.budget.steps_of(wide), wide)
        if "upcycle" in routes:
            yield from self.upcycling()
        if "expand" in routes:
            yield from self.expanding()
        if "mixture" in routes:
            yield from self.mixture()
        yield self.evaluation()

    @property
    def wide(self) -> StudentConfig | None:
        """The size of the wide generalist, where one is trained."""
        return self.given.budget.wide if "generalist-wide" in self.config.baselines else None

    def teacher(self, dtype: torch.dtype = torch.float32) -> tuple[ExactChronos2Model, Trial]:
        with computing_in(dtype):
            return self.of(("teacher", dtype), lambda: self.given.teacher, train=False)

    def sized(self, size: StudentConfig | None = None) -> tuple[ExactChronos2Model, Trial]:
        size = size or self.given.budget.size
        return self.of(size, lambda: create_student_model(self.given.teacher, size))

    def student(
        self, name: str, steps: int, size: StudentConfig | None = None, watched: Sequence[str] | None = None
    ) -> Planned:
        return self.training(f"students/{name}", self.sized(size), steps, watched)

    def training(
        self,
        stage: str,
        sized: tuple[ExactChronos2Model, Trial],
        steps: int,
        watched: Sequence[str] | None = None,
    ) -> Planned:
        model, trial = sized
        batch = self.config.budget.batch_size
        looked_at = LOOKS * sum(count for name, count in self.watched.items() if watched is None or name in watched)
        size = weight_bytes(model)
        seconds = steps * batch * trial.step + looked_at * trial.forecast
        memory = ADAM * size + batch * trial.activations
        return Planned(stage, count_parameters(model), steps, looked_at, seconds, size, memory)

    def forecasts(self, stage: str, sized: tuple[ExactChronos2Model, Trial], windows: int) -> Planned:
        model, trial = sized
        disk = windows * self.forecast_bytes
        return Planned(stage, count_parameters(model), 0, windows, windows * trial.forecast, disk, weight_bytes(model))

    def experts(self) -> Iterator[Planned]:
        given, begun = self.given, self.given.begun_steps
        groups = {name: [domain.name for domain in part] for name, part in given.groups.items()}
        if given.generalist_steps:
            yield self.student(GENERALIST, given.generalist_steps)
        for name, watched in groups.items():
            if begun:
                yield self.student(f"begun-{name}", begun, watched=watched)
        for name, watched in groups.items():
            yield self.student(f"expert-{name}", given.expert_steps - begun, watched=watched)
        for name, watched in groups.items() if "single" in self.config.baselines else ():
            yield self.student(f"single-{name}", given.single_steps, watched=watched)

    def upcycling(self) -> Iterator[Planned]:
        given, config, steps = self.given, self.config.upcycling, self.given.upcycling_plan().steps
        if "teacher" in steps:
            taught = self.of("upcycled teacher", lambda: upcycle(given.teacher, config.teacher_layers))
            yield self.training("upcycled/teacher", taught, steps["teacher"])
            yield self.forecasts("upcycled/soft-targets", taught, self.config.budget.windows)
        if "dense" in steps:
            yield self.student("dense-start", steps["dense"], given.budget.active_size)
        dense = self.sized(given.budget.active_size)[0]
        sparse = self.of("upcycled", lambda: upcycle(dense, config.layers))
        yield self.training("upcycled/student", sparse, steps["student"])

    def expanding(self) -> Iterator[Planned]:
        config, steps = self.config.expanding, self.given.expanding_plan().steps
        yield self.student("generalist-base", steps["base"], self.given.budget.active_size)
        base = self.sized(self.given.budget.active_size)[0]
        places = len(candidate_places(base, ExpansionConfig(layer=config.layers)))
        insertion = MoEInsertionConfig(after=(0,), layer=config.layers)
        grown = self.of("expanded", lambda: MoEEnhancedChronos2(base, insertion))
        probes = places * config.probe_steps if places > 1 else 0
        yield self.training("expanded/student", grown, config.max_layers * (steps["layer"] + probes))

    def mixture(self) -> Iterator[Planned]:
        config, (model, trial) = self.config, self.sized()
        members = len(self.given.groups) + self.given.has_generalist_member
        kept = config.experts.select or members
        windows = config.router_windows + sum(self.watched.values())
        cached = windows * members * self.forecast_bytes
        size = members * weight_bytes(model)
        count, seconds = members * count_parameters(model), windows * members * trial.forecast
        yield Planned("expert-forecasts", count, 0, windows * members, seconds, cached, size + cached)
        batches = -(-config.router_windows // ROUTER_BATCH)
        steps = config.router.epochs * batches
        looks = config.router.epochs * sum(self.watched.values()) / ROUTER_BATCH
        one = router_step(kept, len(model.chronos_config.quantiles), config.windows.horizon)
        parameters, kept_bytes = kept * count_parameters(model), kept * weight_bytes(model)
        yield Planned("router", parameters, 0, windows, (steps + looks) * one, kept_bytes, size + 3 * cached)
        if config.unfamiliar.forecast_by == "teacher":
            whole = parameters + count_parameters(self.given.teacher)
            space = kept_bytes + weight_bytes(self.given.teacher)
            yield Planned("unfamiliar", whole, 0, 0, 1.0, space, space)
        if config.joint.steps:
            cost = config.joint.steps * config.budget.batch_size * trial.step * config.moe.routing.top_k
            memory = ADAM * kept_bytes + config.budget.batch_size * trial.activations * config.moe.routing.top_k
            yield Planned("joint", parameters, config.joint.steps, 0, cost, kept_bytes, memory)

    def evaluation(self) -> Planned:
        given, options, routes = self.given, self.config.evaluation, self.config.routes
        shape, limit = self.config.windows, options.windows_per_domain
        windows = sum(
            len(EvaluationWindows(domain, shape, part="test", limit=limit))
            + len(EvaluationWindows(domain, shape, part="validation", limit=limit, half=CHOSEN_BY))
            for domain in given.domains
        )
        windows += sum(len(EvaluationWindows(domain, shape, part="test", limit=limit)) for domain in given.held_out)
        (model, own), members = self.sized(), len(given.groups) + given.has_generalist_member
        sizes = [self.teacher()[1].forecast, own.forecast]
        if self.wide is not None:
            sizes.append(self.sized(self.wide)[1].forecast)
        if "mixture" in routes:
            sizes += [own.forecast] * (members + len(given.groups))
            chosen = [*(k for k in options.top_k if k < members), members, members, self.config.moe.routing.top_k]
            sizes += [k * own.forecast for k in chosen]
        sizes += [2 * own.forecast] * (len(routes) - ("mixture" in routes))
        timed = options.latency_repeats * (1 + 64 / 4)
        kept = 4 * windows * len(sizes) * self.forecast_bytes  # as float64
        memory = weight_bytes(model) * len(sizes) + kept
        published = (
            3 * weight_bytes(model) * (members if "mixture" in routes else 1)
        )  # moe/, recommended/ and its stage
        return Planned("evaluation", 0, 0, windows * len(sizes), (windows + timed) * sum(sizes), published, memory)


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
