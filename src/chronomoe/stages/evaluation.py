"""The last stage of a run: everything compared on the test windows, what it costs, and what to deploy."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chronos.chronos2 import Chronos2Model
from jaxtyping import Float
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel

from chronomoe.data.domains import Domain
from chronomoe.data.windows import EvaluationWindows, WindowConfig
from chronomoe.errors import InputError
from chronomoe.evaluation.claims import claims, speed_claim
from chronomoe.evaluation.comparison import (
    EXTERNAL,
    MIXTURE,
    ORACLE,
    OWN_SINGLE,
    Candidate,
    compare_models,
    kind_of,
    write_records,
)
from chronomoe.evaluation.cost import compare, cost_records
from chronomoe.evaluation.examples import drawn_forecasts
from chronomoe.evaluation.external import Forecaster, compare_on_sample
from chronomoe.evaluation.inside import look_inside
from chronomoe.evaluation.recommend import recommend
from chronomoe.evaluation.routing import confidence_bins, expert_use, routing_summary
from chronomoe.evaluation.tasks import Task, make_task
from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.models.sparse.upcycling import SparseChronos2Model
from chronomoe.pipeline import ChronoMoEPipeline, load_model
from chronomoe.stages.processes import check_one_process, choose_device, place_model
from chronomoe.stages.soft_targets import report_skipped

TEACHER, UPSTREAM = "teacher", "teacher, upstream code"
TIMED_WINDOWS = 64


def evaluate_run(
    folder: Path,
    candidates: Mapping[str, Candidate],
    *,
    tasks: Mapping[str, Task],
    validation: Mapping[str, Task],
    held_out: Mapping[str, Task],
    horizon: int,
    top_k: Sequence[int],
    draws: int,
    repeats: int,
    classical: Mapping[str, Forecaster],
    sample: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> None:
    """Write evaluation.jsonl, intervals.json, speed.json, efficiency.json, recommendation.json and forecasts.json.

    Also recommended/, the checkpoint to deploy; routing.json where there is a mixture, moe.json where a model has MoE
    layers, held_out.jsonl where there are held-out domains, and sample.jsonl where there are classical models.

    Args:
        folder: of the stage.
        candidates: everything that was trained, and the teacher.
        tasks: test windows by domain.
        validation: windows of the same domains by which models are chosen.
        held_out: windows of domains that nothing was trained on.
        horizon: future steps.
        top_k: fixed numbers of experts with which the mixture is scored too.
        draws: of the bootstrap.
        repeats: timed forecasts of each model.
        classical: forecasters that are too slow for all windows, by name.
        sample: windows of each domain that these are scored on.
        seed: of the bootstrap.
        progress: told how much is done.
    """
    levels = list(candidates[TEACHER].model.chronos_config.quantiles)
    main = [name for name, one in candidates.items() if one.kind in ("mixture", "upcycled", "expanded")]
    comparison = compare_models(
        candidates, tasks, validation, levels=levels, top_k=top_k, drawn=[*main, TEACHER], progress=progress
    )
    write_records(comparison.records(), folder / "evaluation.jsonl")
    write_json(folder / "forecasts.json", drawn_forecasts(comparison, main[0]))
    unseen = compare_models(candidates, held_out, levels=levels, top_k=top_k) if held_out else None
    if unseen is not None:
        write_records(unseen.records(), folder / "held_out.jsonl")

    context = timing_context(tasks)
    timed: dict[str, nn.Module] = {UPSTREAM: _upstream(candidates[TEACHER].model)}
    timed |= {name: one.model for name, one in comparison.models.items() if one.kind not in ("single", "expert")}
    singles = [one.model for one in candidates.values() if one.kind == "single"]
    timed |= dict([(OWN_SINGLE, model) for model in singles[:1]])
    measured = compare(timed, context, horizon=horizon, repeats=repeats)
    costs = cost_records(comparison, measured, context, horizon=horizon)
    for name, row in unseen.rows.items() if unseen is not None else ():
        if row.routed:
            used = float(np.mean([sum(expert_use(routing)) for routing in row.routed.values()]))
            next(cost for cost in costs if cost["model"] == name)["unseen_experts"] = used
    if classical:
        found, seconds = compare_on_sample(comparison, classical, limit=sample)
        write_records(found.records(), folder / "sample.jsonl")
        costs += [{"model": name, "kind": EXTERNAL, "window_ms": 1000 * seconds[name]} for name in classical]
    write_json(folder / "efficiency.json", costs)

    costs = [cost for cost in costs if cost["kind"] != EXTERNAL]
    write_json(folder / "intervals.json", claims(comparison, unseen, costs, main, draws=draws, seed=seed))
    write_json(folder / "speed.json", [speed_claim(main[0], measured, UPSTREAM, draws=draws, seed=seed)])
    deployable = [name for name, one in comparison.models.items() if one.kind != "teacher"]
    advice = recommend(comparison.rows, costs, deployable, draws=draws, seed=seed)
    write_json(folder / "recommendation.json", advice)
    ChronoMoEPipeline(comparison.models[advice["model"]].model).save_pretrained(folder / "recommended")
    model = candidates[MIXTURE].model if MIXTURE in candidates else None
    if isinstance(model, DistilledMoE):
        row = comparison.rows[MIXTURE]
        bins = confidence_bins(tasks, row.routed, row.test, comparison.rows[ORACLE].test)
        write_json(folder / "routing.json", routing_summary(model, row.routed) | {"confidence": bins})
    sparse = {name: candidates[name].model for name in main}
    inside = {name: look_inside(one, tasks) for name, one in sparse.items() if isinstance(one, SparseChronos2Model)}
    if inside:
        write_json(folder / "moe.json", inside)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON."""
    path.write_text(json.dumps(value, indent=1))


def timing_context(tasks: Mapping[str, Task]) -> Float[Tensor, "batch time"]:
    """Return contexts of test windows, domains taking turns, to time models on."""
    each = -(-TIMED_WINDOWS // len(tasks))
    rows = [
        [task.windows[place].context[0] for place in np.linspace(0, len(task.windows) - 1, each).astype(int)]
        for task in tasks.values()
    ]
    turns = [row for turn in zip(*rows, strict=True) for row in turn][:TIMED_WINDOWS]
    longest = max(len(row) for row in turns)
    padded = [np.pad(row, (longest - len(row), 0), constant_values=np.nan) for row in turns]
    return torch.from_numpy(np.stack(padded))


def _upstream(teacher: PreTrainedModel) -> Chronos2Model:
    """Return the teacher as chronos-forecasting runs it."""
    upstream = Chronos2Model(copy.deepcopy(teacher.config))
    upstream.load_state_dict(teacher.state_dict())
    return upstream.to(teacher.device).eval()


def evaluate_checkpoints(
    models: Sequence[str],
    domains: Sequence[Domain],
    *,
    horizon: int,
    context_length: int,
    limit: int,
    device: str = "auto",
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Score checkpoints and the seasonal naive forecast on the test part of some domains.

    Returns:
        Records: ``model``, ``kind``, ``domain``, ``horizon``, ``metric``, ``value``.

    Raises:
        InputError: the checkpoints forecast other quantile levels, so that their WQL cannot be compared.
    """
    check_one_process("evaluate")
    choose_device(device)  # refuse one that is not there before anything is read
    names = [domain.name for domain in domains]
    if len(set(names)) < len(names):
        raise InputError(f"every data set needs a name of its own, got {names}; rename a file")
    if limit < 1:
        raise InputError(f"limit must be at least 1 window, got {limit}")
    windows = WindowConfig(context_length=context_length, horizon=horizon, min_context_length=min(32, context_length))
    skipped = {domain.name: EvaluationWindows(domain, windows, part="test").skipped for domain in domains}
    report_skipped(console, skipped)
    tasks = {domain.name: make_task(domain, windows, limit=limit) for domain in domains}
    loaded = {name: load_model(name) for name in models}
    for model in loaded.values():
        place_model(model, device)
    levels = {name: tuple(model.chronos_config.quantiles) for name, model in loaded.items()}
    if len(set(levels.values())) > 1:
        counts = ", ".join(f"{name} {len(own)}" for name, own in levels.items())
        raise InputError(f"compared models must have the same quantile levels, got {counts}; compare them one by one")
    candidates = {name: Candidate(model=model, kind=kind_of(model)) for name, model in loaded.items()}
    return compare_models(candidates, tasks, levels=next(iter(levels.values()))).records()
