"""A run of any of the three routes, from series to report."""

import json
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from chronomoe.data.domains import Domain
from chronomoe.data.fingerprint import fingerprint
from chronomoe.data.split import Part
from chronomoe.evaluation.comparison import MIXTURE, Candidate
from chronomoe.evaluation.tasks import Task, make_task
from chronomoe.pipeline import ChronoMoEPipeline
from chronomoe.recipe import RunConfig, dump
from chronomoe.report.page import write_report
from chronomoe.stages.evaluation import TEACHER, evaluate_run
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
    "speed.json",
    "efficiency.json",
    "recommendation.json",
    "forecasts.json",
    "curves.json",
)
"""Files of the evaluation stage that every run ends with."""
ROUTE_RESULTS = ("routing.json", "moe.json", "expansion.json", "held_out.jsonl")
"""Those that depend on routes and held-out domains."""
RECOMMENDED = "recommended"
MADE_BY = {"mixture": "mixture", "upcycle": "upcycled", "expand": "expanded"}
"""What each route makes."""


def run(config: RunConfig, out: Path, *, console: Console | None = None, command: str = "chronomoe run") -> Path:
    """Make the models of the recipe's routes, evaluate and report; return the path of the report.

    ``out`` ends with ``report.html``, ``report.md``, ``config.yaml``, ``moe/`` (the first route's checkpoint, those of
    further routes beside it as ``mixture/``, ``upcycled/`` or ``expanded/``), ``recommended/`` (the checkpoint to
    deploy, chosen on validation windows) and ``evaluation.jsonl``. Stages that are finished and unchanged are skipped,
    so the same command continues an interrupted run.

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
    copy_folder(recommended(evaluated, trained, stages) / "model", out / RECOMMENDED)
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
        "held_out": [fingerprint(domain) for domain in setup.held_out],
        "evaluation": asdict(options),
    }

    def make(folder: Path, report: Report) -> None:
        def tasks(domains: Sequence[Domain], part: Part) -> dict[str, Task]:
            return {
                domain.name: make_task(domain, setup.config.windows, part=part, limit=options.windows_per_domain)
                for domain in domains
            }

        evaluate_run(
            folder,
            _candidates(setup, trained, moe, grown),
            tasks=tasks(setup.domains, "test"),
            validation=tasks(setup.domains, "validation"),
            held_out=tasks(setup.held_out, "test"),
            horizon=setup.config.windows.horizon,
            top_k=options.top_k,
            draws=options.bootstrap_draws,
            repeats=options.latency_repeats,
            seed=setup.config.seed,
            progress=report,
        )
        (folder / "curves.json").write_text(json.dumps(_curves(trained, moe, grown)))
        if "expanded" in grown:
            shutil.copy(grown["expanded"].stage / "path.json", folder / "expansion.json")

    return setup.work.stage("evaluation", inputs, make)


def _candidates(
    setup: Setup, trained: dict[str, Path], moe: Path | None, grown: dict[str, Trained]
) -> dict[str, Candidate]:
    """Return everything that was trained, with the share of the budget and the core-seconds that it took."""
    threads, seconds = torch.get_num_threads(), setup.work.seconds

    def spent(*stages: str) -> float:
        return threads * sum(seconds.get(stage, 0.0) for stage in stages)

    steps, groups = setup.config.budget.steps, len(setup.groups)
    shares = {
        "generalist": setup.generalist_steps / steps,
        "expert": max(1, (steps - setup.generalist_steps) // groups) / steps,
        "single": max(1, steps // groups) / steps,
        "generalist-full": 1.0,
        GENERALIST_BASE: setup.config.expanding.base_share,
    }
    wide = setup.wide_size()
    if wide is not None:
        cost = setup.cost(wide)
        shares["generalist-wide"] = max(1, round(setup.budget / cost)) * cost / setup.budget
    found = {TEACHER: Candidate(model=setup.teacher, kind="teacher")}
    for name, path in trained.items():
        kind, _, domain = name.partition("/")
        branched = kind == "expert" and "generalist" in trained
        found["expert/generalist" if name == "generalist" else name] = Candidate(
            model=load_student(path),
            kind="expert" if name == "generalist" else kind.split("-")[0],
            domain=domain or None,
            training=shares[kind],
            core_seconds=spent(f"students/{path.name}"),
            needs=("expert/generalist",) if branched else (),
        )
    for name, made in grown.items():
        stages = [stage for stage in seconds if stage.startswith(f"{name}/")]
        stages += ["students/dense-start"] if name == "upcycled" else [f"students/{GENERALIST_BASE}"]
        found[name] = Candidate(
            model=load_student(made.stage), kind=name, training=made.training, core_seconds=spent(*stages)
        )
    if moe is not None:
        found[MIXTURE] = Candidate(
            model=ChronoMoEPipeline.from_pretrained(moe / "model").model,
            kind="mixture",
            training=setup.config.joint.steps / steps,
            core_seconds=spent("expert-forecasts", "router", "joint"),
            needs=tuple(name for name, one in found.items() if one.kind == "expert"),
        )
    return found


def recommended(folder: Path, trained: dict[str, Path], stages: dict[str, Path]) -> Path:
    """Return the stage that made the model which a finished evaluation recommends."""
    name = json.loads((folder / "recommendation.json").read_text())["model"]
    return (stages | trained)[name]


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
