"""The stage that distils one student, and the command that does it for one domain."""

import copy
import functools
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import Dataset, Subset

from chronomoe.data.domains import Domain
from chronomoe.data.soft_targets import revision
from chronomoe.data.windows import Window, WindowConfig
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.models.precision import Precision, settled
from chronomoe.models.student import StudentConfig, create_student_model
from chronomoe.pipeline import ChronoMoEPipeline, load_model, load_teacher
from chronomoe.stages.cluster import check_engine
from chronomoe.stages.processes import choose_device, first_process
from chronomoe.stages.soft_targets import Material, check_windows, label, open_store, report_skipped
from chronomoe.stages.workspace import Report, Workspace, check_new, folder_for, stage_key
from chronomoe.training.arguments import DistilConfig
from chronomoe.training.distillation import distil, save_curve

Build = Callable[[], ExactChronos2Model]


def train(
    work: Workspace,
    name: str,
    build: Build,
    material: Material,
    soft_targets: Path | None,
    training: DistilConfig,
    *,
    inputs: dict[str, Any],
    windows: Dataset[Window] | None = None,
    watched: Sequence[str] | None = None,
    **options: Any,
) -> Path:
    """Train a model and return the stage that holds its checkpoint (``model/``) and ``curve.json``.

    Args:
        work: the run's folder.
        name: of the stage.
        build: makes the model, on the device that trains it.
        material: what it learns from.
        soft_targets: the stage of the teacher's forecasts; None trains on what happened alone.
        training: steps, rates and losses.
        inputs: what the result depends on besides.
        windows: some of the material's training windows; all when None.
        watched: domains whose validation windows are watched; all when None.
        **options: of ``training.trainer.Chronos2DistillationTrainer``.
    """
    if options.get("hidden_teacher") is None:  # mixtures and MoE layers follow no layer of a teacher
        training = replace(training, loss=replace(training.loss, hidden_weight=0.0))

    def make(folder: Path, report: Report) -> None:
        model = build()
        curve = distil(
            model,
            material.windows if windows is None else windows,
            open_store(soft_targets),
            training,
            folder / "checkpoints",
            validation=material.watched(watched),
            progress=report,
            **options,
        )
        if first_process():
            ChronoMoEPipeline(model).save_pretrained(folder / "model")
            save_curve(curve, folder / "curve.json")
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    needed = {**material.facts, "training": asdict(training), "soft_targets": stage_key(soft_targets), **inputs}
    return work.stage(name, needed, make, together=True)


def distil_student(
    work: Workspace,
    name: str,
    teacher: ExactChronos2Model,
    material: Material,
    soft_targets: Path,
    training: DistilConfig,
    *,
    size: StudentConfig,
    seed: int,
    rows: Sequence[int] | None = None,
    watched: Sequence[str] | None = None,
    start: Path | None = None,
) -> Path:
    """Distil one student, on the teacher's device; see ``train`` for arguments of those names.

    It is cut from ``teacher``, unless it branches from the student of stage ``start``. It sees the training windows
    numbered ``rows``, all when None; ``seed`` draws what is not copied.
    """

    def build() -> ExactChronos2Model:
        if start is not None:
            return load_student(start, teacher.device)
        return create_student_model(teacher, size, generator=torch.Generator().manual_seed(seed))

    return train(
        work,
        f"students/{name}",
        build,
        material,
        soft_targets,
        training,
        inputs={
            "size": asdict(size),
            "seed": seed,
            "start": stage_key(start),
            "rows": None if rows is None else [len(rows), sum(rows)],
            "watched": watched,
        },
        windows=None if rows is None else Subset(material.windows, rows),
        watched=watched,
        hidden_teacher=teacher if training.loss.hidden_weight else None,
    )


def taught_teacher(work: Workspace, teacher: ExactChronos2Model, material: Material, training: DistilConfig) -> Path:
    """Let a copy of the teacher learn the domains from what happened alone; see ``train``."""
    build, inputs = functools.partial(copy.deepcopy, teacher), {"teacher": revision(teacher)}
    return train(work, "teacher", build, material, None, training, inputs=inputs)


def load_student(stage: Path, device: torch.device) -> ExactChronos2Model:
    """Load the model that a stage left."""
    model: ExactChronos2Model = load_model(stage / "model").to(device)
    return model


def steps_taken(stage: Path) -> int:
    """Return the optimiser steps that a stage trained for; 0 where there is no such stage."""
    curve = stage / "curve.json"
    return int(json.loads(curve.read_text())["eval_step"][-1]) if curve.exists() else 0


def distil_domain(
    teacher: str,
    domain: Domain,
    out: Path,
    *,
    windows: WindowConfig,
    student: str | StudentConfig,
    training: DistilConfig,
    pool: int = 8192,
    precision: Precision = "auto",
    device: str = "auto",
    engine: str = "local",
    workers: int | None = None,
    console: Console | None = None,
) -> Path:
    """Distil one student for one domain and write its checkpoint to ``out``; resumable until then.

    Args:
        teacher: hub id, folder, s3:// URL or "tiny".
        domain: its training part is learned from, its validation part watched.
        out: a new folder.
        windows: context and horizon.
        student: a preset or a size.
        training: steps, rates and losses.
        pool: training windows that soft targets are computed for.
        precision: what the teacher labels in and the student trains in, whatever ``training`` says of bf16.
        device: see ``choose_device``.
        engine: where the teacher labels: see ``soft_targets.label`` for this and for ``workers``.
        workers: of the engine ray.
        console: for progress.
    """
    check_new(out)
    check_engine(engine, workers)
    model = load_teacher(teacher).to(choose_device(device))
    check_windows(windows, model)
    size = student if isinstance(student, StudentConfig) else StudentConfig.preset(student, model)
    training = replace(training, bf16=settled(precision, model) == torch.bfloat16)
    count = min(pool, training.steps * training.batch_size)
    material = Material.of([domain], windows, size=count, seed=training.seed, facts={})
    report_skipped(console, material.windows.skipped)
    with folder_for(out, console=console) as work:
        store = label(work, "soft-targets", model, material, precision=precision, engine=engine, workers=workers)
        made = distil_student(work, "student", model, material, store, training, size=size, seed=training.seed)
        work.publish(made / "model", out)
    return out
