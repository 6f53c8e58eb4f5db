"""What each part of a mixture is worth: a run made again with one thing changed, judged on validation windows."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from chronomoe.evaluation.metrics import WindowScores, relative
from chronomoe.evaluation.routing import expert_use, task_routing
from chronomoe.evaluation.tasks import Task, forecast, make_task, score
from chronomoe.inputs import Inputs
from chronomoe.pipeline import ChronoMoEPipeline
from chronomoe.recipe import RunConfig
from chronomoe.run import experts, mixture
from chronomoe.stages.soft_targets import label
from chronomoe.stages.workspace import MARKER

LIMIT = 400
"""Validation windows of a domain, at most; a horizon apart."""


def ablate(configs: Mapping[str, RunConfig], finished: Path, out: Path) -> dict[str, Any]:
    """Make the mixture of each configuration and compare it with that of the first.

    Every other one starts from the stages of the first, which starts from those of a finished run, so that only what a
    change touches is made again. The first weights of routers and the order of windows are the same in all.

    Args:
        configs: the first is what the others are compared with.
        finished: run of the first.
        out: for their stages.

    Returns:
        For each: WQL relative to the first, geometric mean over domains, and the mean number of experts of a series.
    """
    first, reference, found = None, None, {}
    for number, (name, config) in enumerate(configs.items()):
        folder = out / str(number)
        if not (folder / "stages").exists():
            link(first or finished, folder)
        scores, count = judged(config, folder)
        first, reference = first or folder, reference or scores
        found[name] = {"ratio": relative(scores, reference, "WQL"), "experts": count}
    return found


def link(source: Path, target: Path) -> None:
    """Give a folder the stages of another without copying their files."""
    target.mkdir(parents=True)
    shutil.copy(source / MARKER, target / MARKER)
    skip = shutil.ignore_patterns("evaluation", "*.partial")
    shutil.copytree(source / "stages", target / "stages", copy_function=os.link, ignore=skip)


def judged(config: RunConfig, folder: Path) -> tuple[dict[str, WindowScores], float]:
    """Make a mixture and score it on validation windows of each domain."""
    given = Inputs(config, folder)
    store = label(given.work, "soft-targets", given.teacher, given.material)
    made = mixture(given, store, experts(given, store))
    model = ChronoMoEPipeline.from_pretrained(made / "model").model
    levels = list(model.chronos_config.quantiles)
    scores, used = {}, []
    for domain in given.domains:
        task: Task = make_task(domain, config.windows, part="validation", limit=LIMIT)
        scores[domain.name] = score(task, forecast(model, task), levels=levels)
        used.append(sum(expert_use(task_routing(model, task))))
    return scores, float(np.mean(used))
