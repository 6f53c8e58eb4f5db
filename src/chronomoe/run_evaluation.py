"""The last stage of a run: everything compared on the test windows, and what it costs."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from chronos.chronos2 import Chronos2Model

from chronomoe.evaluation.comparison import (
    Comparison,
    drawn_forecasts,
    routing_summary,
    write_records,
)
from chronomoe.evaluation.efficiency import compare
from chronomoe.evaluation.tables import AVERAGE_SINGLE
from chronomoe.evaluation.tasks import Task
from chronomoe.models.distilled_moe import DistilledMoE
from chronomoe.models.group_attention import ExactChronos2Model
from chronomoe.recipes import RunConfig

CLAIMS = (("WQL", 0.90), ("MAE", 0.90))
"""Metrics of the claims, and the ratio to the average single that is aimed for."""


def mixture_name(top_k: int) -> str:
    """Return what a mixture is called in tables."""
    return f"mixture K={top_k}"


def evaluate_run(
    folder: Path,
    tasks: Mapping[str, Task],
    *,
    teacher: ExactChronos2Model,
    students: Mapping[str, ExactChronos2Model],
    mixture: DistilledMoE,
    config: RunConfig,
    progress: Callable[[int, int], None],
) -> None:
    """Write evaluation.jsonl, intervals.json, efficiency.json, routing.json and forecasts.json."""
    main_k = mixture.top_k
    mixtures = sorted({main_k, *(k for k in config.evaluation.top_k if k <= len(mixture.experts))})
    steps = len(students) + len(mixtures) + 4
    comparison = Comparison(tasks, mixture.chronos_config.quantiles)
    comparison.add_naive()
    drawn = {"teacher": comparison.add("teacher", "teacher", teacher)}
    for done, (name, student) in enumerate(students.items()):
        progress(done, steps)
        comparison.add(name, name.split("/")[0].split("-")[0], student)
    for top_k in mixtures:
        routing = replace(mixture.moe.routing, top_k=top_k)
        mixture.set_routing(routing)
        forecasts = comparison.add(mixture_name(top_k), "mixture", mixture)
        if top_k == main_k:
            drawn[mixture_name(top_k)] = forecasts
    mixture.set_routing(replace(mixture.moe.routing, top_k=main_k))
    progress(steps - 3, steps)
    comparison.add_average(mixture)
    members = [name for name in students if name in {f"expert/{expert}" for expert in mixture.config.expert_names}]
    comparison.add_oracle(members)
    write_records(comparison.records(), folder / "evaluation.jsonl")
    (folder / "intervals.json").write_text(json.dumps(_claims(comparison, students, main_k, config), indent=1))
    (folder / "routing.json").write_text(json.dumps(routing_summary(mixture, tasks)))
    (folder / "forecasts.json").write_text(
        json.dumps(drawn_forecasts(mixture, tasks, drawn, levels=mixture.chronos_config.quantiles))
    )
    progress(steps - 2, steps)
    (folder / "efficiency.json").write_text(json.dumps(_costs(teacher, students, mixture, config), indent=1))
    progress(steps, steps)


def _claims(
    comparison: Comparison, students: Mapping[str, ExactChronos2Model], top_k: int, config: RunConfig
) -> list[dict[str, Any]]:
    name, options = mixture_name(top_k), {"draws": config.evaluation.bootstrap_draws, "seed": config.seed}
    singles = comparison.average_of("single")
    claims = [
        comparison.interval(f"{name} against the {AVERAGE_SINGLE}", name, singles, metric, target=target, **options)
        for metric, target in CLAIMS
    ]
    rivals = [rival for rival in ("generalist-full", "generalist-wide") if rival in students]
    for rival in (*rivals, "simple average of experts", "teacher"):
        target = None if rival == "teacher" else 1.0
        claims += [
            comparison.interval(
                f"{name} against {rival}", name, comparison.entries[rival].scores, metric, target=target, **options
            )
            for metric, _ in CLAIMS
        ]
    return claims


def _costs(
    teacher: ExactChronos2Model, students: Mapping[str, ExactChronos2Model], mixture: DistilledMoE, config: RunConfig
) -> list[dict[str, Any]]:
    upstream = Chronos2Model(copy.deepcopy(teacher.config))
    upstream.load_state_dict(teacher.state_dict())
    chosen = {"teacher, upstream code": ("teacher", upstream.eval()), "teacher": ("teacher", teacher)}
    for name in ("generalist-full", "generalist-wide"):
        if name in students:
            chosen[name] = ("generalist", students[name])
    single = next(name for name in students if name.startswith("single/"))
    chosen[single] = ("single", students[single])
    chosen[mixture_name(mixture.top_k)] = ("mixture", mixture)
    measured = compare(
        {name: model for name, (_, model) in chosen.items()},
        context_length=config.windows.context_length,
        horizon=config.windows.horizon,
        batch_size=64,
        repeats=config.evaluation.latency_repeats,
    )
    rows = []
    for name, cost in measured.items():
        size = sum(value.numel() * value.element_size() for value in chosen[name][1].state_dict().values()) / 1e6
        rows.append({"model": name, "kind": chosen[name][0], **asdict(cost), "checkpoint_mb": size, "batch_size": 64})
    return rows
