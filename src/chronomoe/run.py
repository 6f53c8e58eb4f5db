"""A run of any of the three routes, from series to report: which stages, in which order."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from chronomoe.data.domains import Domain
from chronomoe.data.fingerprint import fingerprint
from chronomoe.data.soft_targets import SoftTargetStore
from chronomoe.data.split import Part
from chronomoe.data.windows import CHOSEN_BY, TrainingWindows
from chronomoe.evaluation.external import classical
from chronomoe.evaluation.tasks import Task, make_task
from chronomoe.inputs import GENERALIST, Inputs
from chronomoe.models.precision import settled
from chronomoe.models.student import StudentConfig
from chronomoe.plan import plan
from chronomoe.recipe import RunConfig, dump
from chronomoe.report.page import MADE_BY, write_report
from chronomoe.stages.budget import allocate, late_gain
from chronomoe.stages.evaluation import evaluate_run
from chronomoe.stages.mixture import guarded, joint, route
from chronomoe.stages.processes import first_process, meet
from chronomoe.stages.soft_targets import Material, label
from chronomoe.stages.sparse import expanded_student, learned_targets, upcycled_student
from chronomoe.stages.students import distil_student, load_student
from chronomoe.stages.trial import machine
from chronomoe.stages.workspace import Report, stage_key, write_atomically
from chronomoe.trained import GENERALIST_BASE, Grown, candidates, curves
from chronomoe.training.growing import ExpansionConfig

RESULTS = (
    "evaluation.jsonl",
    "intervals.json",
    "efficiency.json",
    "speed.json",
    "recommendation.json",
    "forecasts.json",
    "curves.json",
)
"""Files of the evaluation stage that every run ends with."""
ROUTE_RESULTS = ("routing.json", "moe.json", "expansion.json", "held_out.jsonl", "sample.jsonl")
"""Those that depend on routes, held-out domains and classical models."""
RECOMMENDED = "recommended"


def run(config: RunConfig, out: Path, *, console: Console | None = None, command: str = "chronomoe run") -> Path:
    """Make the models of the recipe's routes, evaluate and report; return the path of the report.

    ``out`` ends with ``report.html``, ``report.md``, ``config.yaml``, ``moe/`` (the first route's checkpoint, those of
    further routes beside it as ``mixture/``, ``upcycled/`` or ``expanded/``), ``recommended/`` (the checkpoint to
    deploy, chosen on validation windows) and ``evaluation.jsonl``. Stages that are finished and unchanged are skipped,
    so the same command continues an interrupted run.

    Raises:
        InputError: the recipe, the data or ``out`` break a rule; nothing is written before all of them were read.
    """
    given = Inputs(config, out.expanduser(), console=console)
    given.check_routes()
    for model in config.evaluation.classical:
        classical(model)  # refused before anything is trained where statsforecast is missing
    if first_process() and not (out.expanduser() / "stages").exists():
        (console or Console(stderr=True)).print(plan(given).words(), soft_wrap=True)
    work = given.work
    if first_process():
        write_atomically(work.root / "config.yaml", dump(config))
    dtype, engine = config.label_dtype, config.label_engine
    store = label(work, "soft-targets", given.guide, given.material, precision=dtype, engine=engine)
    trained = students(given, store)
    grown: dict[str, Grown] = {}
    if "upcycle" in config.routes:
        grown["upcycled"] = upcycled(given, store)
    if "expand" in config.routes:
        trained[GENERALIST_BASE] = expansion_base(given, store)
        grown["expanded"] = expanded(given, store, trained[GENERALIST_BASE])
    moe = mixture(given, store, trained) if "mixture" in config.routes else None
    evaluated = evaluate(given, trained, moe, grown)
    made = {name: one.stage for name, one in grown.items()} | ({} if moe is None else {"mixture": moe})
    for place, route_name in enumerate(config.routes):
        name = MADE_BY[route_name]
        work.publish(made[name] / "model", work.root / ("moe" if place == 0 else name))
    work.publish(evaluated / RECOMMENDED, work.root / RECOMMENDED)
    if first_process():
        for name in (*RESULTS, *ROUTE_RESULTS):
            if (evaluated / name).exists():
                write_atomically(work.root / name, (evaluated / name).read_text())
            else:
                (work.root / name).unlink(missing_ok=True)  # left by a run of other routes
        write_atomically(work.root / "run.json", json.dumps(_facts(given, command, store), indent=2))
        write_report(work.root)
    meet(f"{work.name}/run")  # others may read what the first has written
    return work.root / "report.html"


def student(
    given: Inputs,
    name: str,
    store: Path,
    *,
    steps: int,
    group: str | None = None,
    start: Path | None = None,
    size: StudentConfig | None = None,
    schedule: Any = "cosine",
) -> Path:
    """Distil one student of a group, or of all domains."""
    budget = given.config.budget
    rate = budget.learning_rate if start is None else budget.expert_learning_rate
    return distil_student(
        given.work,
        name,
        given.guide,
        given.material,
        store,
        given.training(name, steps, rate, schedule),
        size=size or given.budget.size,
        seed=given.seed("initial weights"),
        rows=None if group is None else given.rows_of(group),
        watched=None if group is None else [part.name for part in given.groups[group]],
        start=start,
    )


def students(given: Inputs, store: Path) -> dict[str, Path]:
    """Distil everything that is compared, by name.

    The mixture's budget of steps goes to a generalist and the experts that branch from it. ``single`` students get
    one expert's share of the same budget straight from the teacher; two generalists get all of it, one of the
    experts' size and one of ``top_k`` times the layers, which takes fewer steps of more compute each.
    """
    budget, wanted = given.config.budget, given.config.baselines
    paths = experts(given, store) if "mixture" in given.config.routes else {}
    if paths and "single" in wanted:
        for group in given.groups:
            paths[f"single/{group}"] = student(given, f"single-{group}", store, steps=given.single_steps, group=group)
    if "generalist-full" in wanted:
        paths["generalist-full"] = student(given, "generalist-full", store, steps=budget.steps)
    if (wide := given.budget.wide) is not None and "generalist-wide" in wanted:
        steps = given.budget.steps_of(wide)
        paths["generalist-wide"] = student(given, "generalist-wide", store, steps=steps, size=wide)
    return paths


def experts(given: Inputs, store: Path) -> dict[str, Path]:
    """Distil the generalist that experts branch from, and the experts."""
    shared, own = given.generalist_steps, given.expert_steps
    paths: dict[str, Path] = {}
    start = None
    if shared:
        schedule = given.config.budget.generalist_schedule
        start = paths[GENERALIST] = student(given, GENERALIST, store, steps=shared, schedule=schedule)
    if not given.begun_steps:
        for group in given.groups:
            paths[f"expert/{group}"] = student(given, f"expert-{group}", store, steps=own, group=group, start=start)
    else:
        paths |= _experts_by_gain(given, store, start)
    return paths


def _experts_by_gain(given: Inputs, store: Path, start: Path | None) -> dict[str, Path]:
    """Distil experts for half of the steps alike, and spend the other half where validation says that it pays."""
    half = given.begun_steps
    begun = {
        group: student(given, f"begun-{group}", store, steps=half, group=group, start=start, schedule="constant")
        for group in given.groups
    }
    gains = {group: late_gain(json.loads((path / "curve.json").read_text())) for group, path in begun.items()}
    left = allocate((given.expert_steps - half) * len(begun), gains)
    return {
        f"expert/{group}": student(given, f"expert-{group}", store, steps=left[group], group=group, start=path)
        for group, path in begun.items()
    }


def mixture(given: Inputs, store: Path, students: Mapping[str, Path]) -> Path:
    """Make a mixture of the experts among some students; return the stage that holds its checkpoint."""
    config = given.config
    names = [name for name in students if name.startswith("expert/")]
    if given.has_generalist_member:
        names.insert(0, GENERALIST)
    watched = given.material.watched()
    if config.experts.clusters is not None:
        watched = Material.of(given.domains, config.windows, size=1, seed=0, facts={}).watched()
    routed = route(
        given.work,
        {name.removeprefix("expert/"): load_student(students[name], given.device) for name in names},
        TrainingWindows(
            given.domains,
            config.windows,
            size=config.router_windows,
            seed=given.seed("router windows"),
            part=config.router_part,
        ),
        watched,
        config.moe,
        replace(config.router, seed=given.seed("router")),
        inputs={
            **given.material.facts,
            "experts": {name: stage_key(students[name]) for name in names},
            "router windows": [config.router_windows, given.seed("router windows"), config.router_part],
        },
        select=config.experts.select,
    )
    if config.joint.steps:
        routed = joint(
            given.work,
            routed,
            given.material,
            store,
            given.training("joint", config.joint.steps, config.joint.learning_rate),
            expert_learning_rate=config.joint.expert_learning_rate,
            device=given.device,
        )
    if config.unfamiliar.forecast_by == "teacher":
        routed = guarded(given.work, routed, given.teacher, config.unfamiliar)
    return routed


def upcycled(given: Inputs, store: Path) -> Grown:
    """Make the student of route 2: distilled dense, upcycled, and distilled on.

    Where ``teacher_share`` says so, the teacher is upcycled and learns the domains first, and both parts of the
    student follow that teacher.
    """
    config, plan, start = given.config.upcycling, given.upcycling_plan(), None
    if "teacher" in plan.steps:
        store = learned_targets(
            given.work,
            given.guide,
            given.material,
            given.training("upcycled teacher", plan.steps["teacher"], config.learning_rate),
            layers=given.seeded(config.teacher_layers, "upcycled teacher"),
            aux_weight=config.aux_weight,
            precision=given.config.label_dtype,
        )
    size = given.budget.active_size
    if "dense" in plan.steps:
        start = student(given, "dense-start", store, steps=plan.steps["dense"], size=size, schedule="constant")
    made = upcycled_student(
        given.work,
        given.guide,
        given.material,
        store,
        given.training("upcycled", plan.steps["student"], config.learning_rate),
        layers=given.seeded(config.layers, "upcycled"),
        size=size,
        aux_weight=config.aux_weight,
        start=start,
    )
    return Grown(made, plan.training)


def expansion_base(given: Inputs, store: Path) -> Path:
    """Distil the student that route 3 grows, to its end."""
    steps = given.expanding_plan().steps["base"]
    return student(given, GENERALIST_BASE, store, steps=steps, size=given.budget.active_size)


def expanded(given: Inputs, store: Path, base: Path) -> Grown:
    """Make the student of route 3: ``base`` grown by MoE layers."""
    config, plan = given.config.expanding, given.expanding_plan()
    expansion = ExpansionConfig(
        layer=given.seeded(config.layers, "expanded"),
        max_layers=config.max_layers,
        probe_steps=config.probe_steps,
        min_gain=config.min_gain,
        training=given.training("expanded", plan.steps["layer"], config.learning_rate),
        aux_weight=config.aux_weight,
    )
    made = expanded_student(
        given.work, "expanded/student", load_student(base, given.device), given.material, store, expansion
    )
    return Grown(made, plan.training)


def evaluate(given: Inputs, trained: dict[str, Path], moe: Path | None, grown: dict[str, Grown]) -> Path:
    """Score everything on the test windows and measure what it costs."""
    options = given.config.evaluation
    inputs = {
        **given.material.facts,
        "held out": [fingerprint(domain) for domain in given.held_out],
        "moe": stage_key(moe),
        "students": {name: stage_key(path) for name, path in trained.items()},
        "grown": {name: stage_key(made.stage) for name, made in grown.items()},
        "evaluation": asdict(options),
        "device": str(given.device),
    }

    def make(folder: Path, report: Report) -> None:
        def tasks(domains: list[Domain], part: Part, half: int | None = None) -> dict[str, Task]:
            limit = options.windows_per_domain
            return {
                domain.name: make_task(domain, given.config.windows, part=part, limit=limit, half=half)
                for domain in domains
            }

        evaluate_run(
            folder,
            candidates(given, trained, moe, grown),
            tasks=tasks(given.domains, "test"),
            validation=tasks(given.domains, "validation", CHOSEN_BY),
            held_out=tasks(given.held_out, "test"),
            horizon=given.config.windows.horizon,
            top_k=options.top_k,
            draws=options.bootstrap_draws,
            repeats=options.latency_repeats,
            classical={name: classical(name) for name in options.classical},
            sample=options.classical_windows,
            seed=given.config.seed,
            progress=report,
        )
        (folder / "curves.json").write_text(json.dumps(curves(trained, moe, grown)))
        if "expanded" in grown:
            shutil.copy(grown["expanded"].stage / "path.json", folder / "expansion.json")

    return given.work.stage("evaluation", inputs, make)


def _facts(given: Inputs, command: str, store: Path) -> dict[str, Any]:
    return {
        "name": given.work.root.name,
        "seconds": given.work.seconds,
        "command": command,
        "device": str(given.device),
        "label_dtype": SoftTargetStore(store / "store").meta["compute_dtype"].removeprefix("torch."),
        "train_dtype": str(settled(given.config.train_dtype, given.teacher)).removeprefix("torch."),
        "machine": machine(),
    }
