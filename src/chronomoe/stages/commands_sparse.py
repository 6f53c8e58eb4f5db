"""What the commands upcycle and expand do (routes 2 and 3), as functions."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from chronomoe.checkpoints.writing import work_folder
from chronomoe.data.domains import Domain
from chronomoe.data.fingerprint import fingerprint
from chronomoe.data.soft_targets import SoftTargetStore, revision
from chronomoe.data.windows import EvaluationWindows, JoinedWindows, TrainingWindows, WindowConfig
from chronomoe.models.sparse.config import MoEConfig
from chronomoe.models.sparse.upcycling import Chronos2MoEModel, upcycle
from chronomoe.pipeline import ChronoMoEPipeline, load_teacher
from chronomoe.stages.commands import VALIDATION_LIMIT, check_new, say_skipped
from chronomoe.stages.setup import check_windows
from chronomoe.stages.workspace import Report, Workspace, check_folder, copy_folder, room
from chronomoe.training.growing import ExpansionConfig, candidate_places, expand
from chronomoe.training.moe_trainer import check_levels


def upcycle_checkpoint(model: str, out: Path, config: MoEConfig) -> Chronos2MoEModel:
    """Turn feed-forward blocks of a dense checkpoint into MoE layers, write the result to ``out`` and return it.

    Args:
        model: hub id, folder, s3:// URL or "tiny".
        out: a new folder.
        config: experts, and the blocks that get them.
    """
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
        console: for progress.

    Returns:
        The path: see :class:`chronomoe.training.growing.Expansion`.
    """
    check_new(out)
    base = load_teacher(model)
    candidate_places(base, config)  # refused before anything is written
    check_windows(windows, base)
    guide = None if teacher is None else load_teacher(teacher)
    if guide is not None:
        check_windows(windows, guide)
        check_levels(guide, base)
    training = config.training
    pool_windows = TrainingWindows(
        domains, windows, size=min(pool, training.steps * training.batch_size), seed=training.seed
    )
    validation = JoinedWindows(
        [EvaluationWindows(domain, windows, part="validation", limit=VALIDATION_LIMIT) for domain in domains]
    )
    scratch = work_folder(out)
    check_folder(scratch)
    say_skipped(console, pool_windows.skipped)
    work = Workspace(scratch, console=console)
    inputs = {
        "data": [fingerprint(domain) for domain in domains],
        "model": revision(base),
        "teacher": None if guide is None else revision(guide),
        "windows": asdict(windows),
        "config": asdict(config),
        "pool": len(pool_windows),
    }
    store: Path | None = None
    if guide is not None:

        def ask(folder: Path, report: Report) -> None:
            SoftTargetStore.build(folder / "store", guide, pool_windows, progress=report)

        store = work.stage("soft-targets", inputs, ask)

    def grow(folder: Path, report: Report) -> None:
        grown = expand(
            base,
            pool_windows,
            validation,
            config,
            folder / "layers",
            soft_targets=None if store is None else SoftTargetStore(store / "store"),
            progress=report,
        )
        ChronoMoEPipeline(grown.model).save_pretrained(
            folder / "model", sections={"How it grew": path_table(grown.path)}
        )
        (folder / "path.json").write_text(json.dumps(grown.path))

    grown = work.stage("expansion", inputs, grow)
    path: list[dict[str, Any]] = json.loads((grown / "path.json").read_text())
    copy_folder(grown / "model", out)
    shutil.rmtree(scratch)
    return path


def path_table(path: Sequence[dict[str, Any]]) -> str:
    """Return the layers tried as a Markdown table."""
    lines = ["| layer | after block | validation loss without | with | kept |", "| --- | --- | --- | --- | --- |"]
    for entry in path:
        row = (entry["layer"], entry["after"], f"{entry['before']:.4f}", f"{entry['validation']:.4f}")
        lines.append(f"| {' | '.join(map(str, row))} | {'yes' if entry['kept'] else 'no'} |")
    return "\n".join(lines)
