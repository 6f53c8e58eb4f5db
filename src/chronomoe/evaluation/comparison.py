"""Many models on many domains: records, intervals, routing shares and drawn forecasts."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from transformers import PreTrainedModel

from chronomoe.data.windows import collate
from chronomoe.evaluation.baselines import average_scores, equal_average, oracle, seasonal_naive
from chronomoe.evaluation.metrics import METRICS, WindowScores, aggregate, bootstrap_relative, relative
from chronomoe.evaluation.tasks import Task, forecast, score
from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.models.mixture.router import Routing

NAIVE = "seasonal naive"
Scores = dict[str, WindowScores]
Progress = Callable[[int, int], None]


class Entry(NamedTuple):
    """One compared model: its kind and its scores in each domain."""

    kind: str
    scores: Scores


@dataclass
class Comparison:
    """Scores of everything compared on the same windows."""

    tasks: Mapping[str, Task]
    """By domain."""
    levels: Sequence[float]
    """Quantile levels of the forecasts."""
    entries: dict[str, Entry] = field(default_factory=dict)
    """By model name."""

    def add(self, name: str, kind: str, model: PreTrainedModel) -> dict[str, Float[np.ndarray, "row quantile horizon"]]:
        """Forecast every task with a model, keep the scores and return the forecasts."""
        forecasts = {domain: forecast(model, task) for domain, task in self.tasks.items()}
        scores = {
            domain: score(task, forecasts[domain], levels=list(self.levels)) for domain, task in self.tasks.items()
        }
        self.entries[name] = Entry(kind, scores)
        return forecasts

    def add_naive(self) -> None:
        """Score the seasonal naive forecast, which everything is relative to."""
        scores = {
            domain: score(task, seasonal_naive(task, levels=self.levels), levels=list(self.levels))
            for domain, task in self.tasks.items()
        }
        self.entries[NAIVE] = Entry("naive", scores)

    def add_oracle(self, names: Sequence[str]) -> None:
        """Score the best of some models on each window, chosen in hindsight."""
        scores = {domain: oracle([self.entries[name].scores[domain] for name in names]) for domain in self.tasks}
        self.entries["oracle over experts"] = Entry("oracle", scores)

    def add_average(self, mixture: DistilledMoE) -> None:
        """Score the plain average of all experts of a mixture."""
        self.add("simple average of experts", "average", equal_average(mixture))

    def average_of(self, kind: str) -> Scores:
        """Mean errors of all models of a kind: what to expect of one of them picked blindly."""
        members = [entry.scores for entry in self.entries.values() if entry.kind == kind]
        return {domain: average_scores([scores[domain] for scores in members]) for domain in self.tasks}

    def records(self) -> list[dict[str, Any]]:
        """One record for each model, domain and metric.

        "overall" is the geometric mean over domains of the value relative to the seasonal naive forecast's, and for
        coverage the plain mean. A metric that does not exist in some domain (no series to scale by, say) is left out.
        """
        naive = self.entries[NAIVE].scores
        records = []
        for name, (kind, scores) in self.entries.items():
            values = {domain: aggregate(scores[domain]) for domain in self.tasks}
            for domain, task in self.tasks.items():
                records += [
                    _record(name, kind, domain, task.horizon, metric, value) for metric, value in values[domain].items()
                ]
            horizon = max(task.horizon for task in self.tasks.values())
            for metric in METRICS:
                if metric == "coverage80":
                    value = float(np.mean([values[domain][metric] for domain in self.tasks]))
                else:
                    value = relative(scores, naive, metric)
                records.append(_record(name, kind, "overall", horizon, metric, value))
        return [record for record in records if np.isfinite(record["value"])]

    def interval(
        self, claim: str, name: str, against: Scores, metric: str, *, target: float | None, draws: int, seed: int
    ) -> dict[str, Any]:
        """A claim about a ratio of errors, with its bootstrap interval."""
        found = bootstrap_relative(self.entries[name].scores, against, metric, draws=draws, seed=seed)
        return {
            "claim": claim,
            "metric": metric,
            "ratio": found.ratio,
            "low": found.low,
            "high": found.high,
            "target": None if target is None else f"at most {target:.2f}",
            "target_ratio": target,
        }


def _record(model: str, kind: str, domain: str, horizon: int, metric: str, value: float) -> dict[str, Any]:
    return {"model": model, "kind": kind, "domain": domain, "horizon": horizon, "metric": metric, "value": value}


def write_records(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def task_routing(mixture: DistilledMoE, task: Task, *, batch_size: int = 256) -> list[Routing]:
    """Return the routing of each window of a task, one row each."""
    patch_size = mixture.chronos_config.output_patch_size
    routed = []
    for start in range(0, len(task.windows), batch_size):
        windows = task.windows[start : start + batch_size]
        batch = collate(windows, patch_size=patch_size)
        with torch.no_grad():
            routing = mixture.route(batch["context"], group_ids=batch["group_ids"])
        first = np.cumsum([0, *(len(window.context) for window in windows[:-1])])
        routed += [Routing(*(part[row : row + 1] for part in routing)) for row in first]
    return routed


def routing_summary(mixture: DistilledMoE, tasks: Mapping[str, Task]) -> dict[str, Any]:
    """Which experts each domain uses: shares of choices, mean gates and the entropy of the router, from 0 to 1."""
    num_experts = len(mixture.experts)
    domains = {}
    for name, task in tasks.items():
        routed = task_routing(mixture, task)
        expert, gate, prob = (torch.cat([getattr(one, part) for one in routed]) for part in ("expert", "gate", "prob"))
        used = (gate > 0).float()
        share = torch.zeros(num_experts).index_add(0, expert.flatten(), used.flatten())
        weight = torch.zeros(num_experts).index_add(0, expert.flatten(), gate.flatten())
        entropy = -(prob * prob.clamp(min=1e-12).log()).sum(dim=1).mean() / np.log(max(2, num_experts))
        domains[name] = {
            "share": (share / share.sum()).tolist(),
            "gate": (weight / weight.sum()).tolist(),
            "entropy": float(entropy),
        }
    return {"experts": list(mixture.config.expert_names), "domains": domains}


def drawn_forecasts(
    mixture: DistilledMoE | None,
    tasks: Mapping[str, Task],
    forecasts: Mapping[str, Mapping[str, Float[np.ndarray, "row quantile horizon"]]],
    *,
    levels: Sequence[float],
    places: Sequence[float] = (0.35, 0.8),
) -> list[dict[str, Any]]:
    """Windows of each domain for a report, at fixed places of the list of windows so that none is picked for its looks.

    Args:
        mixture: says which experts it used, where there is one.
        tasks: by domain.
        forecasts: by model, then domain.
        levels: quantile levels.
        places: shares of the way through each task's rows.
    """
    drawn = []
    for name, task in tasks.items():
        routed = [] if mixture is None else task_routing(mixture, task)
        for place in places:
            row = int(place * (len(task.target) - 1))
            owner = int(task.window[row])
            series, cutoff = task.places[owner]
            variate = int(row - np.flatnonzero(task.window == owner)[0])
            source = task.domain.series[series]
            context = task.windows[owner].context[variate][-4 * task.horizon :]
            times = source.timestamps()
            used = {}
            if mixture is not None:
                chosen = routed[owner]
                names = [mixture.config.expert_names[index] for index in chosen.expert[0].tolist()]
                used = {"experts": names, "gates": chosen.gate[0].tolist()}
            drawn.append(
                {
                    "domain": name,
                    "item_id": source.item_id,
                    "freq": source.freq,
                    "context_timestamps": [str(time) for time in times[cutoff - len(context) : cutoff]],
                    "context": _listed(context),
                    "target_timestamps": [str(time) for time in times[cutoff : cutoff + task.horizon]],
                    "target": _listed(task.target[row]),
                    "levels": list(levels),
                    "models": {model: parts[name][row].tolist() for model, parts in forecasts.items()},
                }
                | used
            )
    return drawn


def _listed(values: Float[np.ndarray, " time"]) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
