"""Recalibrating the bands of a checkpoint on windows that no training saw."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from chronomoe.data.domains import Domain
from chronomoe.data.split import Part
from chronomoe.data.windows import EvaluationWindows, WindowConfig
from chronomoe.errors import InputError
from chronomoe.evaluation.routing import task_routing
from chronomoe.evaluation.tasks import Task, forecast, make_task
from chronomoe.models.bands import Bands, fit_bands, middle_of
from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.pipeline import ChronoMoEPipeline
from chronomoe.stages.processes import check_one_process, choose_device
from chronomoe.stages.soft_targets import check_windows, report_skipped
from chronomoe.stages.workspace import check_new

OVERLAP = 8
"""Windows that each step of the calibration part is forecast in, at most."""


def recalibrate_checkpoint(
    name: str | Path,
    domains: Sequence[Domain],
    out: Path,
    *,
    windows: WindowConfig,
    part: Part = "validation",
    limit: int = 2000,
    device: str = "auto",
    console: Console | None = None,
) -> Bands:
    """Fit bands to forecasts of a checkpoint, and write it with them; see ``models.bands`` for the method.

    Args:
        name: a checkpoint that trains: no exported graph. Bands that it has are replaced.
        domains: series to calibrate on.
        out: a new folder.
        windows: context, and the horizon up to which each step gets its own factors.
        part: of the series: what no training saw and no table reports.
        limit: windows of each domain, at most.
        device: see ``choose_device``.
        console: for messages.

    Raises:
        InputError: the model has no pairs of levels around a median, or there are too few windows.
    """
    check_one_process("recalibrate")
    check_new(out)
    if limit < 1:
        raise InputError(f"limit must be at least 1 window, got {limit}")
    pipeline = ChronoMoEPipeline.from_pretrained(name)
    if not isinstance(pipeline.model, torch.nn.Module):
        raise InputError(
            "an exported graph keeps its bands; recalibrate the checkpoint it was made of, and export that"
        )
    model: Any = pipeline.model
    middle_of(model.chronos_config.quantiles)
    check_windows(windows, model)
    model.to(choose_device(device))
    model.bands = None
    stride = max(1, windows.horizon // OVERLAP)
    report_skipped(console, {one.name: EvaluationWindows(one, windows, part=part).skipped for one in domains})
    tasks = [make_task(domain, windows, part=part, limit=limit, stride=stride) for domain in domains]
    order = np.argsort(model.chronos_config.quantiles)
    bands = fit_bands(
        np.concatenate([forecast(pipeline, task)[:, order] for task in tasks]),
        np.concatenate([task.target for task in tasks]),
        expert=np.concatenate([_leading_experts(model, task) for task in tasks]),
        num_experts=len(model.config.expert_names) if isinstance(model, DistilledMoE) else 1,
        levels=[model.chronos_config.quantiles[place] for place in order],
    )
    model.bands = bands
    pipeline.save_pretrained(out)
    return bands


def _leading_experts(model: Any, task: Task) -> np.ndarray:
    """Return the expert with the largest gate for each row of a task."""
    if not isinstance(model, DistilledMoE):
        return np.zeros(len(task.target), dtype=np.int64)
    leading: np.ndarray = task_routing(model, task).expert[:, 0].numpy()[task.window]
    return leading
