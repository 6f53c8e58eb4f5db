"""What a run knows of the checkpoints it leaves, on their model cards: base model, data, results, cost."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from chronomoe.evaluation.comparison import NAIVE, OWN_SINGLE
from chronomoe.report.claims import Claim
from chronomoe.report.tables import Evaluation

RIVALS = (OWN_SINGLE, "generalist-full", "generalist-wide", "teacher", NAIVE)
"""What a checkpoint is shown beside: see docs/concepts/measured.md."""
METRICS = ("WQL", "MASE", "MAE")
MARK = "<!-- of the run -->"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def complete_card(card: Path, model: str, found: Evaluation, claims: Sequence[Claim], run: Mapping[str, Any]) -> None:
    """Write base model, data, results and cost into a card; what an earlier call wrote is replaced.

    Args:
        card: README.md of a checkpoint.
        model: its name in the records.
        found: the records of a run.
        claims: its ratios.
        run: its recipe as YAML, ``config``, and what each model costs, ``efficiency``.
    """
    config = yaml.safe_load(run["config"])
    _, head, body = card.read_text(encoding="utf-8").split("---\n", 2)
    facts = yaml.safe_load(head)
    teacher, data = str(config["teacher"]), [str(domain["data"]) for domain in config["domains"]]
    if HUB_ID.fullmatch(teacher) and not Path(teacher).exists():
        facts |= {"base_model": teacher, "base_model_relation": "finetune"}
    if hub := {"/".join(one.removeprefix("hub:").split("/")[:2]) for one in data if one.startswith("hub:")}:
        facts["datasets"] = sorted(hub)
    facts |= {
        "metrics": [metric.lower() for metric in METRICS],
        "model-index": [_index(card.parent.name, model, found)],
    }
    lines = [MARK, *_results(model, found, claims), *_cost(model, run["efficiency"]), *_data(data)]
    text = f"---\n{yaml.safe_dump(facts, sort_keys=False)}---\n{body.split(MARK)[0].rstrip()}\n\n" + "\n".join(lines)
    card.write_text(text.rstrip() + "\n", encoding="utf-8")


def _index(name: str, model: str, found: Evaluation) -> dict[str, Any]:
    """Return the results as the hub reads them: errors of each domain, not relative to anything."""
    results = [
        {
            "task": {"type": "time-series-forecasting"},
            "dataset": {"name": domain, "type": domain},
            "metrics": [
                {"type": metric.lower(), "name": f"{metric}, horizon {horizon}", "value": round(value, 6)}
                for horizon in sorted(horizons)
                for metric in METRICS
                if (value := found.values[model].get((domain, horizon, metric))) is not None
            ],
        }
        for domain, horizons in found.domains.items()
    ]
    return {"name": name, "results": results}


def _results(model: str, found: Evaluation, claims: Sequence[Claim]) -> list[str]:
    shown = [name for name in dict.fromkeys((model, *RIVALS)) if name in found.values]
    rows = [f"| {name} | " + " | ".join(f"{found.overall(name, metric):.3f}" for metric in METRICS) for name in shown]
    ratios = [
        f"- {claim.metric} against {claim.against}: {claim.span}"
        for claim in claims
        if claim.model == model and claim.against in RIVALS and claim.metric in METRICS and not claim.unseen
    ]
    return [
        "## Results",
        "",
        "Test windows (the last fifth of each series), which neither training nor any choice looked at. Errors "
        f"relative to the seasonal naive forecast, geometric mean over {', '.join(found.domains)}:",
        "",
        f"| model | {' | '.join(METRICS)} |",
        f"| --- |{' --- |' * len(METRICS)}",
        *(f"{row} |" for row in rows),
        "",
        *(["Ratios, below 1 where this model is better, with 95 % intervals:", "", *ratios, ""] if ratios else []),
    ]


def _cost(model: str, costs: Sequence[Mapping[str, Any]]) -> list[str]:
    known = {cost["model"]: cost for cost in costs}
    rows = [
        f"| {name} | {known[name]['experts']:.2f} | {known[name]['active_parameters'] / 1e6:.1f}M | "
        f"{known[name]['flops'] / 1e6:,.0f}M |"
        for name in dict.fromkeys((model, "teacher"))
        if name in known and {"experts", "active_parameters", "flops"} <= known[name].keys()
    ]
    head = ["| model | experts a series | active parameters | operations a forecast |", "| --- | --- | --- | --- |"]
    return ["## Cost", "", *head, *rows, ""] if rows else []


def _data(data: Sequence[str]) -> list[str]:
    return ["## Data", "", f"Distilled on the training part of {', '.join(f'`{one}`' for one in data)}."]
