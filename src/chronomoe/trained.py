"""Everything that a run has trained, as its last stage compares it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from chronomoe.evaluation.comparison import MIXTURE, Candidate
from chronomoe.inputs import Inputs
from chronomoe.pipeline import load_model
from chronomoe.stages.evaluation import TEACHER
from chronomoe.stages.students import load_student, steps_taken

GENERALIST_BASE = "generalist-base"
"""The finished student that route 3 grows."""


class Grown(NamedTuple):
    """A finished model of route 2 or 3."""

    stage: Path
    """Holds ``model/`` and ``curve.json``, or ``path.json``."""
    training: float
    """Share of the budget that all its training took."""


def candidates(
    given: Inputs, trained: dict[str, Path], moe: Path | None, grown: dict[str, Grown]
) -> dict[str, Candidate]:
    """Return everything that was trained, with the share of the budget and the core-seconds that it took."""
    threads, seconds = torch.get_num_threads(), given.work.seconds

    def spent(*stages: str) -> float:
        return threads * sum(seconds.get(stage, 0.0) for stage in stages)

    steps, wide = given.config.budget.steps, given.budget.wide
    usual = given.budget.operations / steps
    price = {"generalist-wide": usual if wide is None else given.budget.cost_of_size(wide)}
    price[GENERALIST_BASE] = given.budget.cost_of_size(given.budget.active_size)
    found = {TEACHER: Candidate(model=given.teacher, kind="teacher")}
    for name, path in trained.items():
        kind, _, domain = name.partition("/")
        branched = kind == "expert" and "generalist" in trained
        begun = path.with_name(f"begun-{domain}")
        count = steps_taken(path) + (steps_taken(begun) if kind == "expert" else 0)
        found["expert/generalist" if name == "generalist" else name] = Candidate(
            model=load_student(path, given.device),
            kind="expert" if name == "generalist" else kind.split("-")[0],
            domain=domain or None,
            training=count * price.get(name, usual) / given.budget.operations,
            core_seconds=spent(f"students/{path.name}", *([f"students/{begun.name}"] if kind == "expert" else [])),
            needs=("expert/generalist",) if branched else (),
        )
    for name, made in grown.items():
        stages = [stage for stage in seconds if stage.startswith(f"{name}/")]
        stages += ["students/dense-start"] if name == "upcycled" else [f"students/{GENERALIST_BASE}"]
        found[name] = Candidate(
            model=load_student(made.stage, given.device), kind=name, training=made.training, core_seconds=spent(*stages)
        )
    if moe is not None:
        found[MIXTURE] = Candidate(
            model=load_model(moe / "model").to(given.device),
            kind="mixture",
            training=given.config.joint.steps / steps,
            core_seconds=spent("expert-forecasts", "router", "joint", "unfamiliar"),
            needs=tuple(name for name, one in found.items() if one.kind == "expert"),
        )
    return found


def curves(trained: dict[str, Path], moe: Path | None, grown: dict[str, Grown]) -> dict[str, Any]:
    """Return the training curves of everything by name."""
    found = {name: json.loads((path / "curve.json").read_text()) for name, path in trained.items()}
    if moe is not None:
        found["router"] = json.loads((moe.with_name("router") / "router.json").read_text())["curve"]
        if (joint := moe.with_name("joint") / "curve.json").exists():
            found["joint"] = json.loads(joint.read_text())
    if "upcycled" in grown:
        found["upcycled"] = json.loads((grown["upcycled"].stage / "curve.json").read_text())
    if "expanded" in grown:
        path = json.loads((grown["expanded"].stage / "path.json").read_text())
        found |= {f"expanded, layer {entry['layer']}": entry["curve"] for entry in path}
    return found
