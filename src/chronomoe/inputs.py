"""What a run needs, from series to seeds: read and checked before anything is written."""

import functools
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from chronomoe.data.clusters import cluster_domains
from chronomoe.data.domains import Domain, load_domain
from chronomoe.data.windows import EvaluationWindows, TrainingWindows
from chronomoe.errors import InputError
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.models.precision import settled
from chronomoe.models.sparse.config import MoEConfig
from chronomoe.models.student import StudentConfig
from chronomoe.pipeline import load_teacher
from chronomoe.recipe import DomainConfig, RunConfig
from chronomoe.stages.budget import Budget, Division
from chronomoe.stages.cluster import check_engine
from chronomoe.stages.mixture import check_select
from chronomoe.stages.processes import check_one_process, choose_device
from chronomoe.stages.soft_targets import Material, check_windows, report_skipped, seed_for
from chronomoe.stages.students import load_student, taught_teacher
from chronomoe.stages.workspace import Workspace, check_folder
from chronomoe.training.arguments import DistilConfig
from chronomoe.training.familiarity import PATCH_EMBEDDING, TEACHER

GENERALIST = "generalist"
"""The student that experts branch from."""


class Inputs:
    """What a run needs, read and checked before anything is written.

    Raises:
        InputError: the recipe, the data, the teacher or the output folder break a rule.
    """

    def __init__(self, config: RunConfig, out: Path | None, *, console: Console | None = None) -> None:
        if out is not None:
            check_folder(out)
        self.device = choose_device(config.device)
        check_engine(config.label_engine, None)
        self.config, self._out, self._console = config, out, console
        self.domains = [load(domain) for domain in config.domains]
        self.held_out = [load(domain) for domain in config.held_out]
        self._check_names([domain.name for domain in (*self.domains, *self.held_out)])
        self.teacher: ExactChronos2Model = load_teacher(config.teacher).to(self.device)
        check_windows(config.windows, self.teacher)
        for domain in self.domains:
            TrainingWindows([domain], config.windows, size=1, seed=0)
            for part in ("validation", "test"):
                EvaluationWindows(domain, config.windows, part=part)
        for domain in self.held_out:
            EvaluationWindows(domain, config.windows, part="test")
        size = config.student
        if not isinstance(size, StudentConfig):
            size = StudentConfig.preset(size, self.teacher)
        self.groups = self._groups()
        self._check_members()
        self.budget = Budget(
            self.teacher,
            config.windows,
            size=size,
            steps=config.budget.steps,
            most_experts=config.moe.routing.top_k,
            dynamic=config.moe.routing.threshold is not None,
        )

    def _check_names(self, names: list[str]) -> None:
        if len(set(names)) < len(names):
            raise InputError(f"every domain needs a name of its own, got {names}; set name in the recipe")
        if GENERALIST in names and self.config.experts.clusters is None:
            raise InputError(
                f"a domain cannot be called {GENERALIST!r}, which is the student of all domains; "
                "set another name in the recipe"
            )

    @functools.cached_property
    def work(self) -> Workspace:
        """The output folder, which is made when the first stage needs it."""
        if self._out is None:
            raise InputError("a run needs a folder to write to, got none; pass out")
        return Workspace(self._out, console=self._console)

    @functools.cached_property
    def material(self) -> Material:
        """Training windows of all groups, whose domains take turns, and validation windows."""
        parts = [part for group in self.groups.values() for part in group]
        found = Material.of(
            parts,
            self.config.windows,
            size=self.config.budget.windows,
            seed=self.seed("training windows"),
            facts={"groups": {name: [part.name for part in group] for name, group in self.groups.items()}},
        )
        report_skipped(self._console, found.windows.skipped)
        return found

    @functools.cached_property
    def guide(self) -> ExactChronos2Model:
        """The teacher that students follow: one that has learned the domains, where ``teacher_steps`` says so."""
        budget = self.config.budget
        if not budget.teacher_steps:
            return self.teacher
        training = self.training("teacher", budget.teacher_steps, budget.teacher_learning_rate)
        return load_student(taught_teacher(self.work, self.teacher, self.material, training), self.device)

    @property
    def has_generalist_member(self) -> bool:
        """Whether the generalist is one of the experts."""
        return self.config.experts.generalist_member and self.generalist_steps > 0

    @property
    def generalist_steps(self) -> int:
        """Steps of the generalist that experts branch from; 0 where they start from the teacher."""
        budget = self.config.budget
        return round(budget.generalist_share * budget.steps) if self.config.experts.branch else 0

    @property
    def expert_steps(self) -> int:
        """Steps of each expert; with an allocation, on average."""
        return max(1, (self.config.budget.steps - self.generalist_steps) // len(self.groups))

    @property
    def begun_steps(self) -> int:
        """Steps of each expert before the rest is allocated; 0 where all get the same."""
        return 0 if self.config.budget.allocation == "even" else self.expert_steps // 2

    @property
    def single_steps(self) -> int:
        """Steps of each domain's own single: one expert's share of the whole budget."""
        return max(1, self.config.budget.steps // len(self.groups))

    def _check_members(self) -> None:
        experts, routing = self.config.experts, self.config.moe.routing
        candidates = len(self.groups) + self.has_generalist_member
        check_select(experts.select, top_k=1, candidates=candidates)
        members = experts.select or candidates
        if routing.top_k > members:
            raise InputError(f"top_k must be from 1 to {members}, the number of experts, got {routing.top_k}")
        if self.config.unfamiliar.forecast_by == "teacher":
            if TEACHER in self.groups:
                raise InputError(f"no domain can be called {TEACHER!r} where the teacher forecasts what is unfamiliar")
            if self.config.moe.router.use_patch_embedding:
                raise InputError(PATCH_EMBEDDING)
        if routing.fallback == "generalist" and (not self.has_generalist_member or experts.select):
            raise InputError(
                "fallback 'generalist' needs the generalist among the experts: set branch and generalist_member, a "
                "generalist_share above 0, and no select; or use 'equal'"
            )

    def check_routes(self) -> None:
        """Refuse settings of routes 2 and 3 that this teacher, sizes, budget or number of processes cannot meet."""
        if "upcycle" in self.config.routes:
            self.upcycling_plan()
        if "expand" in self.config.routes:
            check_one_process("the route 'expand'")
            self.expanding_plan()

    def _groups(self) -> dict[str, list[Domain]]:
        """Name to domains of each expert: the given ones, or clusters of series."""
        clusters = self.config.experts.clusters
        if clusters is None:
            return {domain.name: [domain] for domain in self.domains}
        parts = cluster_domains(self.domains, self.teacher, num_clusters=clusters, seed=self.config.seed)
        groups: dict[str, list[Domain]] = {}
        for part in parts:
            try:
                TrainingWindows([part], self.config.windows, size=1, seed=0)
            except InputError:  # a cluster may hold a few series of a domain that are too short
                continue
            groups.setdefault(part.name.split("/")[0], []).append(part)
        return groups

    def seed(self, *names: str) -> int:
        """Derive a separate seed for each use from the run's seed."""
        return seed_for(self.config.seed, *names)

    def rows_of(self, group: str) -> list[int]:
        """Return the numbers of the training windows of a group, with its share of all others."""
        windows, share = self.material.windows, self.config.experts.own_share
        belongs = [windows.domains[windows.domain_of(index)] in self.groups[group] for index in range(len(windows))]
        own, others = np.flatnonzero(belongs), np.flatnonzero(~np.array(belongs))
        count = min(len(others), round(len(own) * (1 - share) / share))
        drawn = np.random.default_rng(self.seed("other windows", group)).choice(others, size=count, replace=False)
        return [int(index) for index in np.concatenate([own, drawn])]

    def training(self, name: str, steps: int, learning_rate: float, schedule: Any = "cosine") -> DistilConfig:
        """Return how a model is trained for so many steps."""
        return DistilConfig(
            steps=steps,
            batch_size=self.config.budget.batch_size,
            learning_rate=learning_rate,
            schedule=schedule,
            loss=self.config.loss,
            bf16=settled(self.config.train_dtype, self.teacher) == torch.bfloat16,
            checkpoint_steps=max(50, steps // 4),
            seed=self.seed("order", name),
        )

    def upcycling_plan(self) -> Division:
        """Divide route 2's budget."""
        config = self.config.upcycling
        return self.budget.upcycling(
            config.layers,
            config.teacher_layers,
            dense_share=config.dense_share,
            teacher_share=config.teacher_share,
        )

    def expanding_plan(self) -> Division:
        """Divide route 3's budget."""
        config = self.config.expanding
        return self.budget.expanding(
            config.layers, base_share=config.base_share, max_layers=config.max_layers, probe_steps=config.probe_steps
        )

    def seeded(self, layers: MoEConfig, name: str) -> MoEConfig:
        """Return MoE layers with a seed of their own."""
        return replace(layers, seed=self.seed("layers", name, str(layers.seed)))


def load(config: DomainConfig) -> Domain:
    """Load a domain as a recipe describes it."""
    options = {key: value for key, value in asdict(config).items() if key not in ("data", "target")}
    target = config.target if isinstance(config.target, str) else list(config.target)
    return load_domain(config.data, target=target, **options)
