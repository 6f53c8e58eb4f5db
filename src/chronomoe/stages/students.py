"""The stages of a run that train: soft targets, students, experts, and what they are compared with."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from chronomoe.data.soft_targets import SoftTargetStore
from chronomoe.data.windows import TrainingWindows, Window
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.models.student import StudentConfig, create_student_model
from chronomoe.pipeline import ChronoMoEPipeline
from chronomoe.stages.setup import Setup
from chronomoe.stages.workspace import Report, stage_key
from chronomoe.training.distillation import DistilConfig, distil, save_curve


def soft_targets(setup: Setup) -> Path:
    """Ask the teacher once for the forecasts of all training windows."""
    windows = setup.pool()

    def make(folder: Path, report: Report) -> None:
        SoftTargetStore.build(folder / "store", setup.teacher, windows, progress=report)

    return setup.work.stage("soft-targets", setup.base, make)


def group_windows(setup: Setup, group: str | None) -> Dataset[Window]:
    """Return the training windows of a group, with its share of all others, or the whole pool for None."""
    pool = setup.pool()
    if group is None:
        return pool
    own = np.array([index for index in range(len(pool)) if _belongs(setup, pool, index, group)])
    share = setup.config.experts.own_share
    others = np.setdiff1d(np.arange(len(pool)), own)
    count = min(len(others), round(len(own) * (1 - share) / share))
    drawn = np.random.default_rng(setup.seed("other windows", group)).choice(others, size=count, replace=False)
    return Subset(pool, np.concatenate([own, drawn]).tolist())


def _belongs(setup: Setup, pool: TrainingWindows, index: int, group: str) -> bool:
    return pool.domains[pool.domain_of(index)] in setup.groups[group]


def student(
    setup: Setup,
    name: str,
    *,
    group: str | None,
    steps: int,
    store: Path,
    start: Path | None = None,
    size: StudentConfig | None = None,
    schedule: Literal["cosine", "constant"] = "cosine",
) -> Path:
    """Distil one student and return its folder.

    Args:
        setup: the run's.
        name: of the student.
        group: whose windows it is trained on; None for all, as a generalist is.
        steps: optimiser steps.
        store: the folder of the soft targets.
        start: folder of the student it branches from; the teacher when None.
        size: another size than the run's.
        schedule: of the learning rate.
    """
    budget, size = setup.config.budget, size or setup.size
    config = DistilConfig(
        steps=steps,
        batch_size=budget.batch_size,
        learning_rate=budget.learning_rate if start is None else budget.expert_learning_rate,
        schedule=schedule,
        loss=setup.config.loss,
        checkpoint_steps=max(50, steps // 4),
        seed=setup.seed("order", name),
    )

    def make(folder: Path, report: Report) -> None:
        if start is None:
            generator = torch.Generator().manual_seed(setup.seed("initial weights"))
            model = create_student_model(setup.teacher, size, generator=generator)
        else:
            model = load_student(start)
        curve = distil(
            model,
            group_windows(setup, group),
            SoftTargetStore(store / "store"),
            config,
            folder / "checkpoints",
            validation=setup.validation(group),
            hidden_teacher=setup.teacher if config.loss.hidden_weight else None,
            progress=report,
        )
        ChronoMoEPipeline(model).save_pretrained(folder / "model")
        save_curve(curve, folder / "curve.json")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    inputs = setup.base | {
        "config": asdict(config),
        "group": group,
        "own_share": setup.config.experts.own_share,
        "size": asdict(size),
        "start": None if start is None else stage_key(start),
    }
    return setup.work.stage(f"students/{name}", inputs, make)


def students(setup: Setup, store: Path) -> dict[str, Path]:
    """Distil everything that is compared, by name.

    The mixture's budget of steps goes to a generalist and the experts that branch from it. ``single`` students get one
    expert's share of the same budget straight from the teacher; two generalists get all of it, one of the experts'
    size and one with the mixture's active compute, which takes fewer steps of more compute each.
    """
    paths = experts(setup, store) if "mixture" in setup.config.routes else {}
    steps = setup.config.budget.steps
    paths["generalist-full"] = student(setup, "generalist-full", group=None, steps=steps, store=store)
    wide = setup.wide_size()
    if wide is not None:
        steps = max(1, round(setup.budget / setup.cost(wide)))
        paths["generalist-wide"] = student(setup, "generalist-wide", group=None, steps=steps, store=store, size=wide)
    return paths


def experts(setup: Setup, store: Path) -> dict[str, Path]:
    """Distil the generalist that experts branch from, the experts, and the ``single`` students."""
    budget = setup.config.budget
    shared = setup.generalist_steps
    own = max(1, (budget.steps - shared) // len(setup.groups))
    paths: dict[str, Path] = {}
    start = None
    if shared:
        start = paths["generalist"] = student(
            setup, "generalist", group=None, steps=shared, store=store, schedule=budget.generalist_schedule
        )
    for group in setup.groups:
        paths[f"expert/{group}"] = student(setup, f"expert-{group}", group=group, steps=own, store=store, start=start)
    share = max(1, budget.steps // len(setup.groups))
    for group in setup.groups:
        paths[f"single/{group}"] = student(setup, f"single-{group}", group=group, steps=share, store=store)
    return paths


def load_student(folder: Path) -> ExactChronos2Model:
    """Load the student that a stage left."""
    model: ExactChronos2Model = ChronoMoEPipeline.from_pretrained(folder / "model").model
    return model
