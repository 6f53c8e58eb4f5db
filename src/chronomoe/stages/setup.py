"""What the stages of a run share: series, teacher, groups of domains, sizes, seeds and the key of it all."""

import functools
import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from chronomoe.data.clusters import cluster_domains
from chronomoe.data.domains import Domain, load_domain
from chronomoe.data.fingerprint import fingerprint
from chronomoe.data.soft_targets import revision
from chronomoe.data.windows import EvaluationWindows, JoinedWindows, TrainingWindows, WindowConfig
from chronomoe.errors import InputError
from chronomoe.evaluation.cost import count_flops
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.models.student import StudentConfig, create_student_model
from chronomoe.pipeline import load_teacher
from chronomoe.stages.workspace import Workspace, check_folder

GENERALIST = "generalist"
VALIDATION_LIMIT = 128
"""Validation windows of each domain that training looks at."""


class Setup:
    """A run's inputs, read and checked before anything is written.

    Raises:
        InputError: the recipe, the data, the teacher or the output folder break a rule.
    """

    def __init__(self, config: Any, out: Path, *, console: Console | None = None) -> None:
        check_folder(out)
        self.config, self._out, self._console = config, out, console
        self.domains = [load(domain) for domain in config.domains]
        self.held_out = [load(domain) for domain in config.held_out]
        names = [domain.name for domain in (*self.domains, *self.held_out)]
        if len(set(names)) < len(names):
            raise InputError(f"every domain needs a name of its own, got {names}; set name in the recipe")
        if GENERALIST in names and config.experts.clusters is None:
            raise InputError(
                f"a domain cannot be called {GENERALIST!r}, which is the student of all domains; "
                "set another name in the recipe"
            )
        self.teacher = load_teacher(config.teacher)
        self._check_windows()
        student = config.student
        self.size = student if isinstance(student, StudentConfig) else StudentConfig.preset(student, self.teacher)
        self.groups = self._groups()
        self._check_members()
        self.base: dict[str, Any] = {
            "data": [fingerprint(domain) for domain in self.domains],
            "groups": {name: [part.name for part in parts] for name, parts in self.groups.items()},
            "teacher": revision(self.teacher),
            "windows": asdict(config.windows),
            "pool": config.budget.windows,
            "seed": config.seed,
        }

    @functools.cached_property
    def work(self) -> Workspace:
        """The output folder, which is made when the first stage needs it."""
        return Workspace(self._out, console=self._console)

    @property
    def has_generalist_member(self) -> bool:
        """Whether the generalist is one of the experts."""
        experts = self.config.experts
        return experts.generalist_member and self.generalist_steps > 0

    @property
    def generalist_steps(self) -> int:
        """Steps of the generalist that experts branch from; 0 where they start from the teacher."""
        budget = self.config.budget
        return round(budget.generalist_share * budget.steps) if self.config.experts.branch else 0

    def _check_members(self) -> None:
        experts, routing = self.config.experts, self.config.moe.routing
        candidates = len(self.groups) + self.has_generalist_member
        if experts.select is not None and experts.select > candidates:
            raise InputError(f"select must be from 1 to {candidates}, the number of experts, got {experts.select}")
        members = experts.select or candidates
        if routing.top_k > members:
            raise InputError(f"top_k must be from 1 to {members}, the number of experts, got {routing.top_k}")
        if routing.fallback == "generalist" and (not self.has_generalist_member or experts.select):
            raise InputError(
                "fallback 'generalist' needs the generalist among the experts: set branch and generalist_member, a "
                "generalist_share above 0, and no select; or use 'equal'"
            )

    def _check_windows(self) -> None:
        windows = self.config.windows
        check_windows(windows, self.teacher)
        for domain in self.domains:
            skipped = TrainingWindows([domain], windows, size=1, seed=0).skipped[domain.name]
            for part in ("validation", "test"):
                EvaluationWindows(domain, windows, part=part)
            if skipped:
                Console(stderr=True).print(f"{domain.name}: {skipped} series too short for training, skipped")
        for domain in self.held_out:
            EvaluationWindows(domain, windows, part="test")

    def _groups(self) -> dict[str, list[Domain]]:
        """Name to domains of each expert: the given ones, or clusters of series."""
        clusters = self.config.experts.clusters
        if clusters is None:
            return {domain.name: [domain] for domain in self.domains}
        parts = cluster_domains(self.domains, self.teacher, num_clusters=clusters, seed=self.config.seed)
        groups: dict[str, list[Domain]] = {}
        for part in parts:
            if self._trains(part):
                groups.setdefault(part.name.split("/")[0], []).append(part)
        return groups

    def _trains(self, domain: Domain) -> bool:
        try:
            TrainingWindows([domain], self.config.windows, size=1, seed=0)
        except InputError:  # a cluster may hold a few series of a domain that are too short
            return False
        return True

    def seed(self, *names: str) -> int:
        """Return a seed of its own for each use, from the run's."""
        text = "/".join([str(self.config.seed), *names])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 2**31

    def pool(self) -> TrainingWindows:
        """Return the training windows of all groups, whose domains take turns."""
        parts = [part for group in self.groups.values() for part in group]
        return TrainingWindows(
            parts, self.config.windows, size=self.config.budget.windows, seed=self.seed("training windows")
        )

    def validation(self, group: str | None = None) -> JoinedWindows:
        """Return validation windows of a group, or of all domains."""
        if group is None:
            return JoinedWindows(list(self.validation_parts().values()))
        parts = [
            EvaluationWindows(domain, self.config.windows, part="validation", limit=VALIDATION_LIMIT)
            for domain in self.groups[group]
            if self._validates(domain)
        ]
        return JoinedWindows(parts)

    def validation_parts(self) -> dict[str, EvaluationWindows]:
        """Return validation windows of each domain."""
        return {
            domain.name: EvaluationWindows(domain, self.config.windows, part="validation", limit=VALIDATION_LIMIT)
            for domain in self.domains
        }

    def _validates(self, domain: Domain) -> bool:
        try:
            EvaluationWindows(domain, self.config.windows, part="validation")
        except InputError:
            return False
        return True

    def wide_size(self) -> StudentConfig | None:
        """Return the size with the mixture's active compute, ``top_k`` times the layers, if the teacher has them."""
        top_k = self.config.moe.routing.top_k
        layers = (self.size.num_layers or self.teacher.config.num_layers) * top_k
        return None if top_k == 1 or layers > self.teacher.config.num_layers else replace(self.size, num_layers=layers)

    @property
    def active_size(self) -> StudentConfig:
        """The size with the mixture's active compute, or an expert's where the teacher has too few layers."""
        return self.wide_size() or self.size

    @property
    def budget(self) -> float:
        """What all training of a route may cost, in operations of forward passes of one window."""
        return float(self.config.budget.steps * self.cost(self.size))

    def cost(self, size: StudentConfig) -> float:
        """Return the operations of one forward pass of a student."""
        return self.cost_of(create_student_model(self.teacher, size))

    def cost_of(self, model: ExactChronos2Model) -> float:
        """Return the operations of one forward pass of a model."""
        windows = self.config.windows
        return float(count_flops(model.eval(), torch.zeros(1, windows.context_length), horizon=windows.horizon))


def check_windows(windows: WindowConfig, model: ExactChronos2Model | DistilledMoE) -> None:
    """Refuse windows longer than a model and its students take in one pass."""
    limits = model.chronos_config
    longest = limits.max_output_patches * limits.output_patch_size
    if windows.context_length > limits.context_length:
        raise InputError(
            f"context_length must be at most the model's {limits.context_length}, got {windows.context_length}"
        )
    if windows.horizon > longest:
        raise InputError(
            f"with this model training takes horizons of at most {longest} steps, got {windows.horizon}; "
            "train on that: longer ones are unrolled when forecasting"
        )


def load(config: Any) -> Domain:
    """Load a domain as a recipe describes it."""
    options = {key: value for key, value in asdict(config).items() if key not in ("data", "target")}
    target = config.target if isinstance(config.target, str) else list(config.target)
    return load_domain(config.data, target=target, **options)
