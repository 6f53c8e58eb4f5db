"""The stages of a run that make the models of routes 2 and 3, on the same budget of operations as the mixture."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from chronomoe.data.soft_targets import SoftTargetStore
from chronomoe.errors import InputError
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.models.sparse.config import MoEConfig
from chronomoe.models.sparse.insertion import MoEEnhancedChronos2, MoEInsertionConfig
from chronomoe.models.sparse.upcycling import upcycle
from chronomoe.models.student import create_student_model
from chronomoe.pipeline import ChronoMoEPipeline
from chronomoe.stages.setup import Setup
from chronomoe.stages.students import load_student, student
from chronomoe.stages.workspace import Report, stage_key
from chronomoe.training.distillation import DistilConfig, distil, save_curve
from chronomoe.training.growing import ExpansionConfig, candidate_places, expand

GENERALIST_BASE = "generalist-base"
"""The finished student that route 3 grows."""


class Trained(NamedTuple):
    """A finished model of a route."""

    stage: Path
    """Holds ``model/`` and ``curve.json``."""
    training: float
    """Share of the budget that all its training took."""


class _Plan(NamedTuple):
    """Steps of each part of a route's training, and the share of the budget they take together."""

    steps: dict[str, int]
    training: float


def check_routes(setup: Setup) -> None:
    """Refuse settings of routes 2 and 3 that this teacher, these sizes or this budget cannot meet.

    Raises:
        InputError: widths do not divide, a block is not there, or a part of the budget is less than one step.
    """
    if "upcycle" in setup.config.routes:
        upcycling_plan(setup)
    if "expand" in setup.config.routes:
        expanding_plan(setup)


def upcycling_plan(setup: Setup) -> _Plan:
    """Divide the budget between the teacher, the dense student and the one with MoE layers."""
    config = setup.config.upcycling
    dense = create_student_model(setup.teacher, setup.active_size)
    costs = {"teacher": 0.0, "dense": setup.cost_of(dense), "student": setup.cost_of(upcycle(dense, config.layers))}
    shares = {"teacher": config.teacher_share, "dense": config.dense_share}
    if config.teacher_share:
        costs["teacher"] = setup.cost_of(upcycle(setup.teacher, config.teacher_layers))
    shares["student"] = 1 - sum(shares.values())
    return _plan(setup, {part: share for part, share in shares.items() if share > 0}, costs)


def expanding_plan(setup: Setup) -> _Plan:
    """Divide the budget between the base and each layer, whose probes count."""
    config = setup.config.expanding
    base = create_student_model(setup.teacher, setup.active_size)
    places = len(candidate_places(base, ExpansionConfig(layer=config.layers)))
    blocks = tuple(range(places)) * config.max_layers
    grown = MoEEnhancedChronos2(base, MoEInsertionConfig(after=blocks[: config.max_layers], layer=config.layers))
    costs = {"base": setup.cost_of(base), "layer": config.max_layers * setup.cost_of(grown)}
    plan = _plan(setup, {"base": config.base_share, "layer": 1 - config.base_share}, costs)
    probes = places * config.probe_steps if places > 1 else 0
    if plan.steps["layer"] <= probes:
        raise InputError(
            f"expanding leaves {plan.steps['layer']} steps for each layer, of which {probes} go to probes of {places} "
            "places; lower base_share, probe_steps or max_layers, or raise the budget"
        )
    return plan._replace(steps=plan.steps | {"layer": plan.steps["layer"] - probes})


def _plan(setup: Setup, shares: dict[str, float], costs: dict[str, float]) -> _Plan:
    steps = {part: round(share * setup.budget / costs[part]) for part, share in shares.items()}
    for part, count in steps.items():
        if count < 1:
            raise InputError(f"the budget of {setup.config.budget.steps} steps leaves none for the {part}; raise it")
    return _Plan(steps, sum(count * costs[part] for part, count in steps.items()) / setup.budget)


def upcycled(setup: Setup, store: Path) -> Trained:
    """Make the student of route 2: distilled dense, upcycled, and distilled on.

    Where ``teacher_share`` says so, the teacher is upcycled and learns the domains first, and both parts of the student
    follow that teacher.
    """
    config, plan = setup.config.upcycling, upcycling_plan(setup)
    if "teacher" in plan.steps:
        store = _learned_targets(setup, plan.steps["teacher"])
    start = None
    if "dense" in plan.steps:
        start = student(
            setup,
            "dense-start",
            group=None,
            steps=plan.steps["dense"],
            store=store,
            size=setup.active_size,
            schedule="constant",
        )
    training = _training(setup, plan.steps["student"], "upcycled", config.learning_rate)

    def make(folder: Path, report: Report) -> None:
        dense = create_student_model(setup.teacher, setup.active_size) if start is None else load_student(start)
        model = upcycle(dense, _seeded(config.layers, setup, "upcycled"))
        _distil(setup, model, store, training, folder, aux_weight=config.aux_weight, report=report)

    inputs = _inputs(setup, training, store) | {
        "upcycling": asdict(config),
        "size": asdict(setup.active_size),
        "start": None if start is None else stage_key(start),
    }
    return Trained(setup.work.stage("upcycled/student", inputs, make), plan.training)


def _learned_targets(setup: Setup, steps: int) -> Path:
    """Let the upcycled teacher learn the domains, and ask it for soft targets."""
    config = setup.config.upcycling
    training = _training(setup, steps, "upcycled teacher", config.learning_rate)

    def learn(folder: Path, report: Report) -> None:
        model = upcycle(setup.teacher, _seeded(config.teacher_layers, setup, "upcycled teacher"))
        _distil(setup, model, None, training, folder, aux_weight=config.aux_weight, report=report)

    inputs = _inputs(setup, training, None) | {"upcycling": asdict(config)}
    teacher = setup.work.stage("upcycled/teacher", inputs, learn)

    def ask(folder: Path, report: Report) -> None:
        SoftTargetStore.build(folder / "store", load_student(teacher), setup.pool(), progress=report)

    return setup.work.stage("upcycled/soft-targets", setup.base | {"by": stage_key(teacher)}, ask)


def expanded(setup: Setup, base: Path, store: Path) -> Trained:
    """Make the student of route 3: ``base`` grown by MoE layers, whose path is in ``path.json``."""
    config, plan = setup.config.expanding, expanding_plan(setup)
    expansion = ExpansionConfig(
        layer=_seeded(config.layers, setup, "expanded"),
        max_layers=config.max_layers,
        probe_steps=config.probe_steps,
        min_gain=config.min_gain,
        training=_training(setup, plan.steps["layer"], "expanded", config.learning_rate),
        aux_weight=config.aux_weight,
    )

    def make(folder: Path, report: Report) -> None:
        grown = expand(
            load_student(base),
            setup.pool(),
            setup.validation(),
            expansion,
            folder / "layers",
            soft_targets=SoftTargetStore(store / "store"),
            progress=report,
        )
        ChronoMoEPipeline(grown.model).save_pretrained(folder / "model")
        (folder / "path.json").write_text(json.dumps(grown.path))
        shutil.rmtree(folder / "layers")

    inputs = _inputs(setup, expansion.training, store) | {"expansion": asdict(expansion), "start": stage_key(base)}
    return Trained(setup.work.stage("expanded/student", inputs, make), plan.training)


def expansion_base(setup: Setup, store: Path) -> Path:
    """Distil the student that route 3 grows, to its end."""
    steps = expanding_plan(setup).steps["base"]
    return student(setup, GENERALIST_BASE, group=None, steps=steps, store=store, size=setup.active_size)


def _training(setup: Setup, steps: int, name: str, learning_rate: float) -> DistilConfig:
    return DistilConfig(
        steps=steps,
        batch_size=setup.config.budget.batch_size,
        learning_rate=learning_rate,
        loss=replace(setup.config.loss, hidden_weight=0.0),  # MoE layers follow no single layer of the teacher
        checkpoint_steps=max(50, steps // 4),
        seed=setup.seed("order", name),
    )


def _seeded(layers: MoEConfig, setup: Setup, name: str) -> MoEConfig:
    return replace(layers, seed=setup.seed("layers", name, str(layers.seed)))


def _inputs(setup: Setup, training: DistilConfig, store: Path | None) -> dict[str, Any]:
    return setup.base | {"config": asdict(training), "soft_targets": None if store is None else stage_key(store)}


def _distil(
    setup: Setup,
    model: ExactChronos2Model,
    store: Path | None,
    training: DistilConfig,
    folder: Path,
    *,
    aux_weight: float,
    report: Report,
) -> None:
    """Train a model on all domains and write its checkpoint and its curve."""
    curve = distil(
        model,
        setup.pool(),
        None if store is None else SoftTargetStore(store / "store"),
        training,
        folder / "checkpoints",
        validation=setup.validation(),
        aux_weight=aux_weight,
        progress=report,
    )
    ChronoMoEPipeline(model).save_pretrained(folder / "model")
    save_curve(curve, folder / "curve.json")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
