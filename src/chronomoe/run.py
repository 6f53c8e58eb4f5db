"""A run of route 1, from series to report."""

import json
import os
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from chronomoe.evaluation.report import write_report
from chronomoe.evaluation.tasks import make_task
from chronomoe.pipeline import ChronoMoEPipeline
from chronomoe.recipes import RunConfig, dump
from chronomoe.run_evaluation import evaluate_run
from chronomoe.run_mixture import mixture
from chronomoe.run_setup import Setup
from chronomoe.run_students import load_student, students
from chronomoe.stages import Report, copy_folder, stage_key, write_atomically

RESULTS = (
    "evaluation.jsonl",
    "intervals.json",
    "efficiency.json",
    "routing.json",
    "forecasts.json",
    "curves.json",
)
"""Files of the evaluation stage that a run ends with."""


def run(config: RunConfig, out: Path, *, console: Console | None = None, command: str = "chronomoe run") -> Path:
    """Distil experts, train the router, evaluate and report; return the path of the report.

    ``out`` ends with ``report.html``, ``report.md``, ``config.yaml``, ``moe/`` (the checkpoint) and
    ``evaluation.jsonl``. Stages that are finished and unchanged are skipped, so the same command continues an
    interrupted run.

    Raises:
        InputError: the recipe, the data or ``out`` break a rule; nothing is written before all of them were read.
    """
    setup = Setup(config, out, console=console)
    write_atomically(out / "config.yaml", dump(config))
    trained = students(setup)
    moe = mixture(setup, trained)
    evaluated = evaluate(setup, trained, moe)
    copy_folder(moe / "model", out / "moe")
    for name in RESULTS:
        write_atomically(out / name, (evaluated / name).read_text())
    write_atomically(out / "run.json", json.dumps(_facts(setup, out, command), indent=2))
    return write_report(out)


def evaluate(setup: Setup, trained: dict[str, Path], moe: Path) -> Path:
    """Score everything on the test windows and measure what it costs."""
    options = setup.config.evaluation
    inputs = setup.base | {
        "moe": stage_key(moe),
        "students": {name: stage_key(path) for name, path in trained.items()},
        "evaluation": asdict(options),
    }

    def make(folder: Path, report: Report) -> None:
        tasks = {
            domain.name: make_task(domain, setup.config.windows, limit=options.windows_per_domain)
            for domain in setup.domains
        }
        evaluate_run(
            folder,
            tasks,
            teacher=setup.teacher,
            students={
                "expert/generalist" if name == "generalist" else name: load_student(path)
                for name, path in trained.items()
            },
            mixture=ChronoMoEPipeline.from_pretrained(moe / "model").model,
            config=setup.config,
            progress=report,
        )
        (folder / "curves.json").write_text(json.dumps(_curves(trained, moe)))

    return setup.work.stage("evaluation", inputs, make)


def _curves(trained: dict[str, Path], moe: Path) -> dict[str, Any]:
    curves = {name: json.loads((path / "curve.json").read_text()) for name, path in trained.items()}
    curves["router"] = json.loads((moe.with_name("router") / "router.json").read_text())["curve"]
    if (moe / "curve.json").exists():
        curves["joint"] = json.loads((moe / "curve.json").read_text())
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
