"""What students learn from: windows of some domains, and the teacher's forecasts of them."""

import functools
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from chronomoe.data.domains import Domain
from chronomoe.data.fingerprint import fingerprint
from chronomoe.data.soft_targets import SoftTargetStore, revision
from chronomoe.data.windows import WATCHED, EvaluationWindows, JoinedWindows, TrainingWindows, WindowConfig
from chronomoe.errors import InputError
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.models.precision import Precision, settled
from chronomoe.stages.cluster import in_order
from chronomoe.stages.processes import first_process
from chronomoe.stages.workspace import Report, Workspace

VALIDATION_LIMIT = 128
"""Validation windows of each domain that training looks at."""


class Material(NamedTuple):
    """What students are trained and watched on."""

    windows: TrainingWindows
    """Of all domains, which take turns."""
    validation: Mapping[str, EvaluationWindows]
    """Of each domain."""
    facts: Mapping[str, Any]
    """What all of it depends on, as JSON: part of the inputs of every stage that uses it."""

    @classmethod
    def of(
        cls, domains: Sequence[Domain], windows: WindowConfig, *, size: int, seed: int, facts: Mapping[str, Any]
    ) -> "Material":
        """Cut windows: ``size`` for training.

        Raises:
            InputError: a domain has no series long enough.
        """
        own = {"data": [fingerprint(domain) for domain in domains], "windows": asdict(windows), "pool": size}
        return cls(
            TrainingWindows(domains, windows, size=size, seed=seed),
            validation_windows(domains, windows),
            own | {"pool seed": seed} | dict(facts),
        )

    def watched(self, names: Sequence[str] | None = None) -> JoinedWindows:
        """Return the validation windows of some domains, or of all."""
        return JoinedWindows([part for name, part in self.validation.items() if names is None or name in names])


def validation_windows(domains: Sequence[Domain], windows: WindowConfig) -> dict[str, EvaluationWindows]:
    """Return the validation windows that training looks at, of each domain that has any, by name."""
    found = {}
    for domain in domains:
        try:
            found[domain.name] = EvaluationWindows(
                domain, windows, part="validation", limit=VALIDATION_LIMIT, half=WATCHED
            )
        except InputError:  # a cluster may hold a few series of a domain that are too short
            if len(domains) == 1:
                raise
    return found


def label(
    work: Workspace,
    name: str,
    teacher: ExactChronos2Model,
    material: Material,
    *,
    precision: Precision = "auto",
    engine: str = "local",
    workers: int | None = None,
) -> Path:
    """Ask a teacher once for its forecasts of all training windows; return the stage that keeps them.

    It answers in this process or, of the engine "ray", in ``workers`` that have a copy; see ``cluster.spread``.

    A finished store that has been damaged since is made again: the windows and the teacher are still there.
    """
    dtype = settled(precision, teacher)
    made = work.root / "stages" / name
    if first_process() and (made / "store").exists():
        try:
            SoftTargetStore(made / "store")
        except InputError as error:
            work.console.print(f"{error}: made again")
            shutil.rmtree(made)

    def make(folder: Path, report: Report) -> None:
        asking: Any = map
        if engine == "ray":
            asking = functools.partial(in_order, workers=workers, gpu=teacher.device.type == "cuda")
        SoftTargetStore.build(
            folder / "store", teacher, material.windows, compute_dtype=dtype, progress=report, engine=asking
        )

    return work.stage(name, {**material.facts, "teacher": revision(teacher), "computed in": str(dtype)}, make)


def open_store(stage: Path | None) -> SoftTargetStore | None:
    """Open the soft targets that ``label`` left, if any."""
    return None if stage is None else SoftTargetStore(stage / "store")


def seed_for(seed: int, *names: str) -> int:
    """Derive a separate seed for each use from the run's seed."""
    text = "/".join([str(seed), *names])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 2**31


def check_windows(windows: WindowConfig, model: ExactChronos2Model | DistilledMoE) -> None:
    """Refuse windows longer than a model and its students can take in one pass."""
    limits = model.chronos_config
    longest = limits.max_output_patches * limits.output_patch_size
    if windows.context_length > limits.context_length:
        raise InputError(
            f"context_length must be at most the model's {limits.context_length}, got {windows.context_length}"
        )
    if windows.horizon > longest:
        raise InputError(
            f"with this model, training takes horizons of at most {longest} steps, got {windows.horizon}; "
            "train on that, since forecasts unroll longer ones"
        )


def report_skipped(console: Console | None, skipped: Mapping[str, int]) -> None:
    """Report how many series of each domain were too short."""
    for name, count in skipped.items():
        if count:
            (console or Console(stderr=True)).print(f"{name}: {count} series too short for a window, skipped")
