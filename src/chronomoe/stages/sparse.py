"""The stages that make the models of routes 2 and 3, and the commands that make one from a checkpoint."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from chronomoe.data.domains import Domain
from chronomoe.data.soft_targets import revision
from chronomoe.data.windows import WindowConfig
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.models.precision import Precision
from chronomoe.models.sparse.config import MoEConfig
from chronomoe.models.sparse.upcycling import Chronos2MoEModel, upcycle
from chronomoe.models.student import StudentConfig, create_student_model
from chronomoe.pipeline import ChronoMoEPipeline, load_teacher
from chronomoe.stages.faults import room
from chronomoe.stages.processes import check_one_process, choose_device
from chronomoe.stages.soft_targets import Material, check_windows, label, open_store, report_skipped
from chronomoe.stages.students import load_student, train
from chronomoe.stages.workspace import Report, Workspace, check_new, folder_for, stage_key
from chronomoe.training.arguments import DistilConfig
from chronomoe.training.growing import ExpansionConfig, candidate_places
from chronomoe.training.growing import expand as grow
from chronomoe.training.trainer import check_levels


def upcycled_student(
    work: Workspace,
    teacher: ExactChronos2Model,
    material: Material,
    soft_targets: Path,
    training: DistilConfig,
    *,
    layers: MoEConfig,
    size: StudentConfig,
    aux_weight: float,
    start: Path | None,
) -> Path:
    """Upcycle the student of stage ``start``, or one of ``size`` cut from the teacher, and distil it (route 2)."""

    def build() -> ExactChronos2Model:
        dense = create_student_model(teacher, size) if start is None else load_student(start, teacher.device)
        return upcycle(dense, layers)

    inputs = {"layers": asdict(layers), "size": asdict(size), "start": stage_key(start), "aux_weight": aux_weight}
    return train(
        work, "upcycled/student", build, material, soft_targets, training, inputs=inputs, aux_weight=aux_weight
    )


def learned_targets(
    work: Workspace,
    teacher: ExactChronos2Model,
    material: Material,
    training: DistilConfig,
    *,
    layers: MoEConfig,
    aux_weight: float,
    precision: Precision,
) -> Path:
    """Upcycle the teacher, train it on the domains, and return the stage of its soft targets."""

    def build() -> ExactChronos2Model:
        return upcycle(teacher, layers)

    inputs = {"layers": asdict(layers), "aux_weight": aux_weight, "teacher": revision(teacher)}
    taught = train(work, "upcycled/teacher", build, material, None, training, inputs=inputs, aux_weight=aux_weight)
    return label(work, "upcycled/soft-targets", load_student(taught, teacher.device), material, precision=precision)


def expanded_student(
    work: Workspace,
    name: str,
    base: ExactChronos2Model,
    material: Material,
    soft_targets: Path | None,
    config: ExpansionConfig,
) -> Path:
    """Add MoE layers to a finished student (route 3); the stage holds ``model/`` and ``path.json``."""
    loss = replace(config.training.loss, hidden_weight=0.0)
    config = replace(config, training=replace(config.training, loss=loss))

    def make(folder: Path, report: Report) -> None:
        grown = grow(
            base,
            material.windows,
            material.watched(),
            config,
            folder / "layers",
            soft_targets=open_store(soft_targets),
            progress=report,
        )
        pipeline = ChronoMoEPipeline(grown.model)
        pipeline.save_pretrained(folder / "model", sections={"How it grew": path_table(grown.path)})
        (folder / "path.json").write_text(json.dumps(grown.path))
        shutil.rmtree(folder / "layers")

    inputs = {"expansion": asdict(config), "base": revision(base), "soft_targets": stage_key(soft_targets)}
    return work.stage(name, {**material.facts, **inputs}, make)


def path_table(path: Sequence[dict[str, Any]]) -> str:
    """Return the layers tried as a Markdown table."""
    lines = ["| layer | after block | validation loss without | with | kept |", "| --- | --- | --- | --- | --- |"]
    for entry in path:
        row = (entry["layer"], entry["after"], f"{entry['before']:.4f}", f"{entry['validation']:.4f}")
        lines.append(f"| {' | '.join(map(str, row))} | {'yes' if entry['kept'] else 'no'} |")
    return "\n".join(lines)


def upcycle_checkpoint(model: str, out: Path, config: MoEConfig) -> Chronos2MoEModel:
    """Turn feed-forward blocks of a dense checkpoint into MoE layers, write the result to ``out`` and return it.

    Args:
        model: hub id, folder, s3:// URL or "tiny".
        out: a new folder.
        config: experts, and the blocks that get them.
    """
    check_one_process("upcycle")
    check_new(out)
    upcycled = upcycle(load_teacher(model), config)
    with room(out.parent, out.name):
        ChronoMoEPipeline(upcycled).save_pretrained(out)
    return upcycled


def expand_checkpoint(
    model: str,
    domains: Sequence[Domain],
    out: Path,
    *,
    windows: WindowConfig,
    config: ExpansionConfig,
    teacher: str | None = None,
    pool: int = 8192,
    device: str = "auto",
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Add MoE layers to a finished student and write it to ``out``; resumable until then.

    Args:
        model: the student: hub id, folder, s3:// URL or "tiny".
        domains: layers learn from their training part and are judged on their validation part.
        out: a new folder.
        windows: context and horizon.
        config: layers and training.
        teacher: whose forecasts the layers follow as well; None trains on what happened alone.
        pool: training windows.
        device: see ``choose_device``.
        console: for progress.

    Returns:
        The path: see :class:`chronomoe.training.growing.Expansion`.
    """
    check_one_process("expand")
    check_new(out)
    place = choose_device(device)
    base = load_teacher(model).to(place)
    candidate_places(base, config)  # refused before anything is written
    check_windows(windows, base)
    guide = None if teacher is None else load_teacher(teacher).to(place)
    if guide is not None:
        check_windows(windows, guide)
        check_levels(guide, base)
    training = config.training
    size = min(pool, training.steps * training.batch_size)
    material = Material.of(domains, windows, size=size, seed=training.seed, facts={})
    report_skipped(console, material.windows.skipped)
    with folder_for(out, console=console) as work:
        store = None if guide is None else label(work, "soft-targets", guide, material)
        grown = expanded_student(work, "expansion", base, material, store, config)
        path: list[dict[str, Any]] = json.loads((grown / "path.json").read_text())
        work.publish(grown / "model", out)
    return path
