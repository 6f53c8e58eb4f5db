"""The last stage of a run: everything compared on the test windows, and what it costs."""

import copy
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from chronos.chronos2 import Chronos2Model
from torch.utils.data import Dataset

from chronomoe.data.windows import Window
from chronomoe.evaluation.comparison import (
    Comparison,
    drawn_forecasts,
    routing_summary,
    write_records,
)
from chronomoe.evaluation.cost import compare
from chronomoe.evaluation.inside import look_inside
from chronomoe.evaluation.tasks import Task
from chronomoe.evaluation.validation import differences, window_losses
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.models.sparse.upcycling import SparseChronos2Model
from chronomoe.recipe import RunConfig
from chronomoe.report.tables import AVERAGE_SINGLE
from chronomoe.stages.sparse import GENERALIST_BASE

CLAIMS = (("WQL", 0.90), ("MAE", 0.90))
"""Metrics of the claims, and the ratio to the average single that is aimed for."""
AVERAGE = "simple average of experts"
RIVALS = ("generalist-full", "generalist-wide", AVERAGE)
"""What each route's model should beat."""


def mixture_name(top_k: int) -> str:
    """Return what a mixture is called in tables."""
    return f"mixture K={top_k}"


class Contestants(NamedTuple):
    """What a run compares."""

    teacher: ExactChronos2Model
    students: Mapping[str, ExactChronos2Model]
    """By name; a name begins with its kind."""
    mixture: DistilledMoE | None
    """Of route 1."""
    grown: Mapping[str, ExactChronos2Model]
    """Of routes 2 and 3, by name, which is their kind."""
    training: Mapping[str, float]
    """Share of the budget that each model's training took, where it is known."""


def evaluate_run(
    folder: Path,
    tasks: Mapping[str, Task],
    validation: Mapping[str, Dataset[Window]],
    contestants: Contestants,
    *,
    config: RunConfig,
    progress: Callable[[int, int], None],
) -> None:
    """Write evaluation.jsonl, intervals.json, efficiency.json and forecasts.json.

    Also routing.json where there is a mixture, and routes.json, validation.json and moe.json where there are models of
    routes 2 and 3.
    """
    teacher, students, mixture, grown, _ = contestants
    mixtures = _mixtures(mixture, config)
    steps, done = len(students) + len(mixtures) + len(grown) + 5, itertools.count(1)
    comparison = Comparison(tasks, teacher.chronos_config.quantiles)
    comparison.add_naive()
    drawn = {"teacher": comparison.add("teacher", "teacher", teacher)}
    progress(next(done), steps)
    for name, student in students.items():
        comparison.add(name, name.split("/")[0].split("-")[0], student)
        progress(next(done), steps)
    for name, model in grown.items():
        drawn[name] = comparison.add(name, name, model)
        progress(next(done), steps)
    if mixture is not None:
        for top_k in mixtures:
            mixture.set_routing(replace(mixture.moe.routing, top_k=top_k))
            forecasts = comparison.add(mixture_name(top_k), "mixture", mixture)
            if top_k == config.moe.routing.top_k:
                drawn[mixture_name(top_k)] = forecasts
            progress(next(done), steps)
        mixture.set_routing(config.moe.routing)
        comparison.add_average(mixture)
        members = [name for name in students if name in {f"expert/{expert}" for expert in mixture.config.expert_names}]
        comparison.add_oracle(members)
        write_json(folder / "routing.json", routing_summary(mixture, tasks))
    progress(next(done), steps)
    write_records(comparison.records(), folder / "evaluation.jsonl")
    write_json(folder / "forecasts.json", drawn_forecasts(mixture, tasks, drawn, levels=comparison.levels))
    claims = _claims(comparison, contestants, config)
    write_json(folder / "intervals.json", claims)
    progress(next(done), steps)
    costs = _costs(contestants, config)
    write_json(folder / "efficiency.json", costs)
    progress(next(done), steps)
    if grown:
        rows = _validation_rows(contestants, validation, config)
        write_json(folder / "validation.json", {"rows": rows})
        write_json(folder / "routes.json", _routes(contestants, claims, costs, rows, config))
        inside = {
            name: look_inside(model, tasks) for name, model in grown.items() if isinstance(model, SparseChronos2Model)
        }
        write_json(folder / "moe.json", inside)
    progress(steps, steps)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON."""
    path.write_text(json.dumps(value, indent=1))


def _mixtures(mixture: DistilledMoE | None, config: RunConfig) -> list[int]:
    """Return every ``top_k`` that is evaluated."""
    if mixture is None:
        return []
    return sorted({mixture.top_k, *(k for k in config.evaluation.top_k if k <= len(mixture.experts))})


def main_models(contestants: Contestants, config: RunConfig) -> list[str]:
    """Return the name of each route's model."""
    mixture = [] if contestants.mixture is None else [mixture_name(config.moe.routing.top_k)]
    return [*mixture, *contestants.grown]


def _claims(comparison: Comparison, contestants: Contestants, config: RunConfig) -> list[dict[str, Any]]:
    options = {"draws": config.evaluation.bootstrap_draws, "seed": config.seed}
    claims = []
    for name in main_models(contestants, config):
        rivals = [rival for rival in RIVALS if rival in comparison.entries]
        if name in contestants.grown:
            rivals = [rival for rival in rivals if rival != AVERAGE]
            rivals += [GENERALIST_BASE] if name == "expanded" else []
        else:
            singles = comparison.average_of("single")
            claims += [
                comparison.interval(
                    f"{name} against the {AVERAGE_SINGLE}", name, singles, metric, target=aim, **options
                )
                for metric, aim in CLAIMS
            ]
        for rival in (*rivals, "teacher"):
            target = None if rival == "teacher" else 1.0
            scores = comparison.entries[rival].scores
            claims += [
                comparison.interval(f"{name} against {rival}", name, scores, metric, target=target, **options)
                for metric, _ in CLAIMS
            ]
    return claims


def _validation_rows(
    contestants: Contestants, validation: Mapping[str, Dataset[Window]], config: RunConfig
) -> list[dict[str, Any]]:
    """Compare validation losses: each route's model with the dense one, and a grown one with its base."""
    models: dict[str, ExactChronos2Model | DistilledMoE] = {**contestants.students, **contestants.grown}
    if contestants.mixture is not None:
        models[mixture_name(config.moe.routing.top_k)] = contestants.mixture
    pairs = [(name, equal_rival(contestants)) for name in main_models(contestants, config)]
    if "expanded" in contestants.grown:
        pairs.append(("expanded", GENERALIST_BASE))
    losses = {
        name: {domain: window_losses(models[name], windows) for domain, windows in validation.items()}
        for name in dict.fromkeys(itertools.chain(*pairs))
    }
    options = {"draws": config.evaluation.bootstrap_draws, "seed": config.seed}
    return [row for name, rival in pairs for row in differences(name, rival, losses[name], losses[rival], **options)]


def equal_rival(contestants: Contestants) -> str:
    """Return the dense student of the same active compute and budget."""
    return "generalist-wide" if "generalist-wide" in contestants.students else "generalist-full"


def _routes(
    contestants: Contestants,
    claims: Sequence[Mapping[str, Any]],
    costs: Sequence[Mapping[str, Any]],
    validation: Sequence[Mapping[str, Any]],
    config: RunConfig,
) -> dict[str, Any]:
    """Put each route's model beside the dense student of the same active compute and budget."""
    rival = equal_rival(contestants)
    found = {(claim["claim"], claim["metric"]): claim for claim in claims}
    cost = {row["model"]: row for row in costs}
    rows = []
    for name in (*main_models(contestants, config), rival):
        row = {key: cost[name][key] for key in ("model", "kind", "parameters", "active_parameters", "flops")}
        row |= {"training": contestants.training.get(name), "against": rival}
        for metric, _ in CLAIMS:
            claim = found.get((f"{name} against {rival}", metric))
            row[metric.lower()] = claim and {key: claim[key] for key in ("ratio", "low", "high")}
        whole = [part for part in validation if (part["model"], part["against"]) == (name, rival)]
        overall = next((part for part in whole if part["domain"] == "overall"), None)
        row["validation"] = overall and {key: overall[key] for key in ("difference", "low", "high")}
        rows.append(row)
    return {"rows": rows, "against": rival}


def _costs(contestants: Contestants, config: RunConfig) -> list[dict[str, Any]]:
    teacher, students, mixture, grown, _ = contestants
    upstream = Chronos2Model(copy.deepcopy(teacher.config))
    upstream.load_state_dict(teacher.state_dict())
    chosen = {"teacher, upstream code": ("teacher", upstream.eval()), "teacher": ("teacher", teacher)}
    chosen |= {name: ("generalist", model) for name, model in students.items() if name.startswith("generalist-")}
    chosen |= dict([(name, ("single", model)) for name, model in students.items() if name.startswith("single/")][:1])
    if mixture is not None:
        chosen[mixture_name(mixture.top_k)] = ("mixture", mixture)
    chosen |= {name: (name, model) for name, model in grown.items()}
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
