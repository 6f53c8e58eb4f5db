"""A run of any of the three routes, from series to report."""

import json
import os
import platform
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from chronomoe.evaluation.tasks import make_task
from chronomoe.pipeline import ChronoMoEPipeline
from chronomoe.recipe import RunConfig, dump
from chronomoe.report.page import write_report
from chronomoe.stages.evaluation import Contestants, evaluate_run, mixture_name
from chronomoe.stages.mixture import mixture
from chronomoe.stages.setup import Setup
from chronomoe.stages.sparse import (
    GENERALIST_BASE,
    Trained,
    check_routes,
    expanded,
    expansion_base,
    upcycled,
)
from chronomoe.stages.students import load_student, soft_targets, students
from chronomoe.stages.workspace import Report, copy_folder, stage_key, write_atomically

RESULTS = (
    "evaluation.jsonl",
    "intervals.json",
    "efficiency.json",
    "routing.json",
    "forecasts.json",
    "curves.json",
)
"""Files of the evaluation stage that a run ends with; ``routing.json`` only where there is a mixture."""
ROUTE_RESULTS = ("routes.json", "validation.json", "moe.json", "expansion.json")
"""Further ones of routes 2 and 3; the last of route 3 alone."""
MADE_BY = {"mixture": "mixture", "upcycle": "upcycled", "expand": "expanded"}
"""What each route makes."""


def run(config: RunConfig, out: Path, *, console: Console | None = None, command: str = "chronomoe run") -> Path:
    """Make the models of the recipe's routes, evaluate and report; return the path of the report.

    ``out`` ends with ``report.html``, ``report.md``, ``config.yaml``, ``moe/`` (the first route's checkpoint, those of
    further routes beside it as ``mixture/``, ``upcycled/`` or ``expanded/``) and ``evaluation.jsonl``. Stages that are
    finished and unchanged are skipped, so the same command continues an interrupted run.

    Raises:
        InputError: the recipe, the data or ``out`` break a rule; nothing is written before all of them were read.
    """
    setup = Setup(config, out, console=console)
    check_routes(setup)
    write_atomically(setup.work.root / "config.yaml", dump(config))
    store = soft_targets(setup)
    trained = students(setup, store)
    grown: dict[str, Trained] = {}
    if "upcycle" in config.routes:
        grown["upcycled"] = upcycled(setup, store)
    if "expand" in config.routes:
        trained[GENERALIST_BASE] = expansion_base(setup, store)
        grown["expanded"] = expanded(setup, trained[GENERALIST_BASE], store)
    moe = mixture(setup, trained) if "mixture" in config.routes else None
    evaluated = evaluate(setup, trained, moe, grown)
    stages = {name: made.stage for name, made in grown.items()} | ({} if moe is None else {"mixture": moe})
    for place, route in enumerate(config.routes):
        name = MADE_BY[route]
        copy_folder(stages[name] / "model", out / ("moe" if place == 0 else name))
    for name in (*RESULTS, *ROUTE_RESULTS):
        if (evaluated / name).exists():
            write_atomically(out / name, (evaluated / name).read_text())
        else:
            (out / name).unlink(missing_ok=True)  # left by a run of other routes
    write_atomically(out / "run.json", json.dumps(_facts(setup, out, command), indent=2))
    return write_report(out)


def evaluate(setup: Setup, trained: dict[str, Path], moe: Path | None, grown: dict[str, Trained]) -> Path:
    """Score everything on the test windows and measure what it costs."""
    options = setup.config.evaluation
    inputs = setup.base | {
        "moe": None if moe is None else stage_key(moe),
        "students": {name: stage_key(path) for name, path in trained.items()},
        "grown": {name: stage_key(made.stage) for name, made in grown.items()},
        "evaluation": asdict(options),
    }

    def make(folder: Path, report: Report) -> None:
        tasks = {
            domain.name: make_task(domain, setup.config.windows, limit=options.windows_per_domain)
            for domain in setup.domains
        }
        contestants = Contestants(
            teacher=setup.teacher,
            students={
                "expert/generalist" if name == "generalist" else name: load_student(path)
                for name, path in trained.items()
            },
            mixture=None if moe is None else ChronoMoEPipeline.from_pretrained(moe / "model").model,
            grown={name: load_student(made.stage) for name, made in grown.items()},
            training=_training(setup, grown),
        )
        evaluate_run(
            folder,
            tasks,
            setup.validation_parts(),
            contestants,
            config=setup.config,
            progress=report,
        )
        (folder / "curves.json").write_text(json.dumps(_curves(trained, moe, grown)))
        if "expanded" in grown:
            shutil.copy(grown["expanded"].stage / "path.json", folder / "expansion.json")

    return setup.work.stage("evaluation", inputs, make)


def _training(setup: Setup, grown: dict[str, Trained]) -> dict[str, float]:
    """Return the share of the budget that the training of each route's model, and of its rivals, took."""
    shares = {name: made.training for name, made in grown.items()}
    shares[mixture_name(setup.config.moe.routing.top_k)] = shares["generalist-full"] = 1.0
    wide = setup.wide_size()
    if wide is not None:
        cost = setup.cost(wide)
        shares["generalist-wide"] = max(1, round(setup.budget / cost)) * cost / setup.budget
    return shares


def _curves(trained: dict[str, Path], moe: Path | None, grown: dict[str, Trained]) -> dict[str, Any]:
    curves = {name: json.loads((path / "curve.json").read_text()) for name, path in trained.items()}
    if moe is not None:
        curves["router"] = json.loads((moe.with_name("router") / "router.json").read_text())["curve"]
        if (moe / "curve.json").exists():
            curves["joint"] = json.loads((moe / "curve.json").read_text())
    if "upcycled" in grown:
        curves["upcycled"] = json.loads((grown["upcycled"].stage / "curve.json").read_text())
    if "expanded" in grown:
        path = json.loads((grown["expanded"].stage / "path.json").read_text())
        curves |= {f"expanded, layer {entry['layer']}": entry["curve"] for entry in path}
    return curves


def _facts(setup: Setup, out: Path, command: str) -> dict[str, Any]:
    return {
        "name": out.name,
        "seconds": setup.work.seconds,
        "command": command,
        "machine": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "chronos": version("chronos-forecasting"),
            "python": platform.python_version(),
        },
    }
