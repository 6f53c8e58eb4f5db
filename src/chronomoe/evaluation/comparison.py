"""Every model on the same windows: what was trained, and what its user could make of it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel

from chronomoe.evaluation.baselines import (
    average_scores,
    ensemble,
    equal_average,
    greedy_portfolio,
    oracle,
    rerouted,
    seasonal_naive,
)
from chronomoe.evaluation.metrics import ERRORS, METRICS, WindowScores, aggregate, relative
from chronomoe.evaluation.remembering import sharing_forecasts
from chronomoe.evaluation.routing import task_routing
from chronomoe.evaluation.tasks import Task, forecast, score
from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.models.mixture.router import Routing
from chronomoe.models.sparse.insertion import MoEEnhancedChronos2
from chronomoe.models.sparse.upcycling import SparseChronos2Model

KINDS = (
    *("mixture", "upcycled", "expanded", "lookup", "chosen", "generalist", "student"),
    *("average", "single", "expert", "teacher", "external", "oracle", "naive"),
)
"""What a row is, in the order in which rows are shown: ``lookup`` needs the name of a series' domain, ``chosen`` was
chosen on validation windows."""
Scores = dict[str, WindowScores]
Part = Literal["validation", "test"]
Forecast = Float[np.ndarray, "row quantile horizon"]

MIXTURE, NAIVE, ORACLE = "mixture", "seasonal naive", "oracle over experts"
EXTERNAL = "external"
OWN_SINGLE, OWN_EXPERT, PORTFOLIO = "own single", "own expert", "greedy portfolio"
DYNAMIC = 0.8
"""Threshold of a row with dynamic K beside a mixture whose K is fixed."""
AVERAGE_SINGLE, AVERAGE_EXPERT, SIMPLE_AVERAGE = "average single", "average expert", "simple average of experts"
OF_KIND = {
    "single": (OWN_SINGLE, AVERAGE_SINGLE, "best single on validation"),
    "expert": (OWN_EXPERT, AVERAGE_EXPERT, "best expert on validation"),
}
"""Rows made of all models of a kind: that of a series' domain, a blind pick, and the best on validation windows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A trained model, and what its training took."""

    model: PreTrainedModel
    """As a checkpoint holds it."""
    kind: str
    """One of :data:`KINDS`."""
    domain: str | None = None
    """The one it was trained for."""
    training: float | None = None
    """Share of the training budget, without that of the models it needs."""
    core_seconds: float | None = None
    """Time its training took times threads, without that of the models it needs."""
    needs: tuple[str, ...] = ()
    """Candidates it was made from."""


@dataclass(eq=False)
class Row:
    """One line of the comparison: a candidate, or something made of several."""

    kind: str
    needs: tuple[str, ...]
    """Candidates that had to be trained for it."""
    test: Scores = field(default_factory=dict)
    """By domain."""
    validation: Scores = field(default_factory=dict)
    """By domain; empty where nothing is chosen."""
    runs: dict[str, float] = field(default_factory=dict)
    """How often each candidate runs for one forecast, domains counting alike; empty for a mixture, which is routed."""
    routed: dict[str, Routing] = field(default_factory=dict)
    """Of a mixture, on test windows, by domain."""


@dataclass(eq=False)
class Comparison:
    """Scores of everything compared, on the same windows."""

    candidates: Mapping[str, Candidate]
    tasks: Mapping[str, Task]
    """Test windows by domain."""
    levels: Sequence[float]
    """Quantile levels of the forecasts."""
    models: Mapping[str, Candidate] = field(default_factory=dict)
    """The candidates, and the mixture with other routings: every row that is one checkpoint."""
    rows: dict[str, Row] = field(default_factory=dict)
    """By name."""
    forecasts: dict[str, dict[str, Forecast]] = field(default_factory=dict)
    """Those kept to be drawn, by row, then domain."""

    def records(self) -> list[dict[str, Any]]:
        """One record for each row, domain and metric, on test windows.

        "overall" is the geometric mean over domains of the value relative to the seasonal naive forecast's, and for
        coverage and bias the plain mean. A metric that does not exist in some domain (no series to scale by, say) is
        left out.
        """
        records: list[dict[str, Any]] = []
        horizon = max(task.horizon for task in self.tasks.values())
        for name, row in self.rows.items():
            values = {domain: aggregate(row.test[domain]) for domain in self.tasks}
            for metric in METRICS:
                shared = {"model": name, "kind": row.kind, "metric": metric}
                if metric in ERRORS:
                    whole = relative(row.test, self.rows[NAIVE].test, metric)
                else:
                    whole = float(np.mean([values[domain][metric] for domain in self.tasks]))
                records += [
                    shared | {"domain": domain, "horizon": task.horizon, "value": values[domain][metric]}
                    for domain, task in self.tasks.items()
                ]
                records.append(shared | {"domain": "overall", "horizon": horizon, "value": whole})
        return [record for record in records if np.isfinite(record["value"])]

    def training(self, name: str) -> tuple[float | None, float | None]:
        """Return the share of the budget and the core-seconds that a row took, with all it was made from."""
        needed: set[str] = set()
        wanted = list(self.rows[name].needs)
        while wanted:
            if (one := wanted.pop()) not in needed:
                needed.add(one)
                wanted += self.candidates[one].needs
        parts = [self.candidates[one] for one in sorted(needed)]
        shares = [part.training for part in parts if part.training is not None]
        seconds = [part.core_seconds for part in parts if part.core_seconds is not None]
        return sum(shares) if shares else None, sum(seconds) if seconds else None


def kind_of(model: PreTrainedModel) -> str:
    """Tell what a checkpoint is: a dense model does not say what it was trained on."""
    if isinstance(model, DistilledMoE):
        return "mixture"
    if isinstance(model, MoEEnhancedChronos2):
        return "expanded"
    return "upcycled" if isinstance(model, SparseChronos2Model) else "student"


def compare_models(
    candidates: Mapping[str, Candidate],
    tasks: Mapping[str, Task],
    validation: Mapping[str, Task] | None = None,
    *,
    levels: Sequence[float],
    top_k: Sequence[int] = (),
    drawn: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Forecast with every candidate and add the rows that follow: lookups, averages, choices, oracle, naive.

    Args:
        candidates: by name; one called ``mixture`` is scored with other routings too.
        tasks: test windows by domain, each reported once.
        validation: windows of the same domains, by which the rows of kind ``chosen`` choose.
        levels: quantile levels of all candidates.
        top_k: fixed numbers of experts with which to score the mixture.
        drawn: rows whose test forecasts are kept.
        progress: told how many domains are done.
    """
    comparison = Comparison(candidates, tasks, levels, _with_routings(candidates, top_k))
    for place, (domain, task) in enumerate(tasks.items()):
        parts: dict[Part, Task] = {"test": task}
        if validation is not None:
            parts["validation"] = validation[domain]
        forecasts: dict[Part, dict[str, Forecast]] = {}
        for part, of in parts.items():
            models = sharing_forecasts({name: one.model for name, one in comparison.models.items()})
            forecasts[part] = {name: forecast(model, of) for name, model in models.items()}
        _score_domain(comparison, parts, forecasts, domain)
        for name in drawn:
            comparison.forecasts.setdefault(name, {})[domain] = forecasts["test"][name]
        progress(place + 1, len(tasks))
    return comparison


def _with_routings(candidates: Mapping[str, Candidate], top_k: Sequence[int]) -> dict[str, Candidate]:
    """Add the mixture with fixed numbers of experts, with a dynamic one, and with equal gates."""
    found = dict(candidates)
    mixture = candidates.get(MIXTURE)
    if mixture is None or not isinstance(mixture.model, DistilledMoE):
        return found
    own, num_experts = mixture.model.moe.routing, len(mixture.model.experts)
    routings = {f"mixture K={k}": replace(own, top_k=k, threshold=None) for k in sorted(set(top_k)) if k < num_experts}
    routings["mixture, all experts"] = replace(own, top_k=num_experts, threshold=None)
    if own.threshold is None:
        routings["mixture, dynamic K"] = replace(own, threshold=DYNAMIC)
    for name, routing in routings.items():
        if routing != own:
            found[name] = replace(mixture, model=rerouted(mixture.model, routing), needs=(MIXTURE,))
    found[SIMPLE_AVERAGE] = replace(mixture, kind="average", model=equal_average(mixture.model), needs=(MIXTURE,))
    return found


def _score_domain(
    comparison: Comparison, parts: Mapping[Part, Task], forecasts: Mapping[Part, dict[str, Forecast]], domain: str
) -> None:
    models, levels = comparison.models, list(comparison.levels)
    scores = {
        part: {name: score(task, forecasts[part][name], levels=levels) for name in models}
        for part, task in parts.items()
    }

    def add(name: str, kind: str, found: Mapping[Part, WindowScores], needs: Sequence[str], runs: Sequence[str]) -> Row:
        row = comparison.rows.setdefault(name, Row(kind, tuple(needs)))
        for part, own in found.items():
            getattr(row, part)[domain] = own
        for run in set(runs):
            row.runs[run] = row.runs.get(run, 0.0) + 1 / len(comparison.tasks)
        return row

    def of(name: str) -> dict[Part, WindowScores]:
        return {part: scores[part][name] for part in parts}

    naive = {part: score(task, seasonal_naive(task, levels=levels), levels=levels) for part, task in parts.items()}
    add(NAIVE, "naive", naive, (), ())
    for name, model in models.items():
        needs = (name,) if name in comparison.candidates else model.needs
        row = add(name, model.kind, of(name), needs, () if isinstance(model.model, DistilledMoE) else (name,))
        if isinstance(model.model, DistilledMoE):
            row.routed[domain] = task_routing(model.model, parts["test"])
    for kind, (own_name, average_name, best_name) in OF_KIND.items():
        group = [name for name, model in models.items() if model.kind == kind]
        specialists = [name for name in group if models[name].domain is not None]
        own = next((name for name in specialists if models[name].domain == domain), None)
        if own is not None:
            add(own_name, "lookup", of(own), specialists, [own])
        if len(specialists) > 1 and (kind == "single" or own is None):
            mean = {part: average_scores([scores[part][name] for name in specialists]) for part in parts}
            row = add(average_name, "average", mean, specialists, ())
            row.runs |= {name: 1 / len(specialists) for name in specialists}
        if "validation" in parts and len(group) > 1:
            best = min(group, key=lambda name: aggregate(scores["validation"][name])["WQL"])
            add(best_name, "chosen", of(best), group, [best])
    small = [name for name, model in models.items() if model.kind in (*OF_KIND, "generalist")]
    if "validation" in parts and len(small) > 1:
        seen = {name: forecasts["validation"][name] for name in small}
        chosen = greedy_portfolio(seen, parts["validation"], levels=levels)
        found = {part: score(task, ensemble(forecasts[part], chosen), levels=levels) for part, task in parts.items()}
        add(PORTFOLIO, "chosen", found, small, chosen)
    experts = [name for name, model in models.items() if model.kind == "expert"]
    if experts and MIXTURE in models:
        add(ORACLE, "oracle", {part: oracle([scores[part][name] for name in experts]) for part in parts}, (), ())


def write_records(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
