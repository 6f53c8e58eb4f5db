"""The report of a run: one HTML page that needs nothing else, and the same tables in Markdown."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from chronomoe.errors import InputError
from chronomoe.evaluation.comparison import KINDS
from chronomoe.report import charts, layer_tables, tables
from chronomoe.report.claims import VERDICTS, Claim
from chronomoe.report.tables import Evaluation, Table

REQUIRED = {
    "evaluation.jsonl": ("model", "kind", "domain", "horizon", "metric", "value"),
    "intervals.json": ("claim", "metric", "ratio"),
    "speed.json": ("claim", "metric", "ratio"),
    "efficiency.json": ("model", "kind"),
    "forecasts.json": (
        "domain",
        "item_id",
        "context",
        "context_timestamps",
        "target",
        "target_timestamps",
        "levels",
        "models",
    ),
    "recommendation.json": ("model", "kind", "error", "ratio", "low", "high", "near", "flops", "domains"),
    "held_out.jsonl": ("model", "kind", "domain", "horizon", "metric", "value"),
    "expansion.json": ("layer", "after", "before", "validation", "kept"),
    "moe.json": ("block", "num_experts", "top_k", "load"),
}
"""By file, what each of its records has: its rows, the layers of each model, or a recommendation's candidates."""
SPECIALISTS = ("single", "expert")
"""Kinds whose many rows are folded away."""
PLOTTED = tuple(kind for kind in KINDS if kind not in (*SPECIALISTS, "average"))
"""Kinds in the plot of error against cost: models of one domain, off their domain, would stretch it."""


MOST_FACTS = 4
"""Errors at the top of the page."""


def write_report(folder: Path) -> Path:
    """Write ``report.html`` and ``report.md`` from the files of a run folder; return the path of the page.

    Only ``evaluation.jsonl`` is needed; a section whose file is missing is left out. Values come from the files alone:
    nothing is forecast or timed here.
    """
    folder = Path(folder)
    found = tables.read_records(_read_lines(folder / "evaluation.jsonl"))
    page = _page(folder, found)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["markdown"] = markdown_cell
    for name in ("report.md", "report.html"):
        part = folder / f".{name}.part"
        part.write_text(environment.get_template(name).render(page), encoding="utf-8")
        part.replace(folder / name)
    return folder / "report.html"


def recommendation(folder: Path) -> str | None:
    """Return what a finished run recommends, in words; None where it was evaluated before runs recommended anything."""
    advice, costs = (_read(folder / name) for name in ("recommendation.json", "efficiency.json"))
    return tables.recommendation_words(advice, costs) if advice and costs else None


def markdown_cell(text: str) -> str:
    """Keep a name from being read as a table border, markup or a new line."""
    text = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return "".join(f"\\{letter}" if letter in "*_`[]" else letter for letter in text)


def _page(folder: Path, found: Evaluation) -> dict[str, Any]:
    run = _read(folder / "run.json") or {}
    files = ("intervals.json", "speed.json")
    claims = [Claim(**_known(claim)) for file in files for claim in _read(folder / file) or []]
    costs = _read(folder / "efficiency.json") or []
    routing = _read(folder / "routing.json")
    advice = _read(folder / "recommendation.json")
    growth = _read(folder / "expansion.json")
    curves = _read(folder / "curves.json") or {}
    config, unseen = folder / "config.yaml", folder / "held_out.jsonl"
    held_out = tables.read_records(_read_lines(unseen)) if unseen.exists() else None
    folded = tables.overall_table(found, found.horizons[0], costs, kinds=SPECIALISTS) if found.horizons else None
    return {
        "name": run.get("name") or folder.resolve().name,
        "horizons": sorted(set(found.horizons).union(*found.domains.values())),
        "domains": list(found.domains),
        "models": found.models,
        "machine": run.get("machine") or {},
        "command": run.get("command"),
        "facts": _facts(found, claims, costs),
        "claims": [(claim, claim.draw(claims)) for claim in claims],
        "verdicts": VERDICTS,
        "kinds": KINDS,
        "advice": recommendation(folder),
        "validation": tables.validation_table(advice) if advice else None,
        "overall": [
            tables.overall_table(found, horizon, costs, kinds=[kind for kind in KINDS if kind not in SPECIALISTS])
            for horizon in found.horizons
        ],
        "specialists": folded if folded and folded.rows else None,
        "held_out": held_out and [tables.overall_table(held_out, horizon) for horizon in held_out.horizons],
        "held_out_domains": list(held_out.domains) if held_out else [],
        "by_domain": _domain_tables(found),
        "routing": routing,
        "routing_table": tables.routing_table(routing) if routing else None,
        "confidence": tables.confidence_table(routing["confidence"]) if routing and routing.get("confidence") else None,
        "growth": layer_tables.growth_table(growth) if growth else None,
        "layers": layer_tables.model_layers(_read(folder / "moe.json") or {}),
        "entropies": [(name, chart) for name, curve in curves.items() if (chart := charts.entropy_chart(curve))],
        "depths": [layer_tables.ordinal(place) for place in range(1, _most_layers(curves) + 1)],
        "layer_colours": charts.LAYER_COLOURS,
        "scatters": _scatters(found, costs, advice["model"] if advice else ""),
        "scatter_kinds": [kind for kind in PLOTTED if any(cost["kind"] == kind for cost in costs)],
        "forecasts": [_forecast(forecast) for forecast in _read(folder / "forecasts.json") or []],
        "curves": [(name, charts.curve_chart(curve)) for name, curve in curves.items()],
        "costs": tables.cost_table(costs) if any(cost.get("throughput") for cost in costs) else None,
        "times": tables.time_table(run["seconds"]) if run.get("seconds") else None,
        "config": config.read_text(encoding="utf-8") if config.exists() else None,
    }


def _facts(found: Evaluation, claims: Sequence[Claim], costs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return what a reader wants to know first: the name of the first route's model, then its numbers."""
    main = next((model for model in found.models if found.kinds[model] in tables.ROUTES), None)
    if main is None:
        return []
    facts = [(f"{value:.3f}×", "seasonal naive's WQL")] if math.isfinite(value := found.overall(main)) else []
    for claim in claims:
        if claim.model == main and claim.metric == "WQL" and not claim.unseen and len(facts) < MOST_FACTS:
            facts.append((f"{claim.ratio:.3f}×", f"the WQL of {claim.against}"))
    fast = [claim for claim in claims if claim.higher_is_better and claim.model == main]
    facts += [(f"{claim.ratio:.1f}×", f"the windows a second of {claim.against}") for claim in fast]
    experts = next((cost.get("experts") for cost in costs if cost["model"] == main), None)
    if experts is not None:
        facts.append((f"{experts:.2f}", "experts a forecast, on average"))
    return [(main, ""), *facts]


def _most_layers(curves: Mapping[str, Mapping[str, Any]]) -> int:
    return max((len(curve["entropy"][0]) for curve in curves.values() if curve.get("entropy")), default=0)


def _domain_tables(found: Evaluation) -> list[tuple[int, Table, list[Table]]]:
    """Return, by horizon, the table shown first and those folded away."""
    metrics = tables.domain_metrics(found)
    if not metrics:
        return []
    horizons = sorted(set().union(*found.domains.values()))
    by_horizon = [[tables.domain_table(found, horizon, metric) for metric in metrics] for horizon in horizons]
    return [(horizon, first, rest) for horizon, (first, *rest) in zip(horizons, by_horizon, strict=True)]


def _scatters(found: Evaluation, costs: Sequence[Mapping[str, Any]], recommended: str) -> list[str]:
    drawn: list[str] = []
    for name, title, unit in (("flops", "GFLOPs a forecast", 1e9), ("latency_p50_ms", "Latency of one window, ms", 1)):
        points = [
            charts.Point(cost["model"], cost["kind"], cost[name] / unit, y, cost["model"] == recommended)
            for cost in costs
            if cost.get(name) and cost["kind"] in PLOTTED and cost["model"] in found.values
            if math.isfinite(y := found.overall(cost["model"]))
        ]
        points.sort(key=lambda point: (not point.marked, PLOTTED.index(point.kind)))
        if len(points) > 1:
            drawn.append(charts.scatter_chart(points, x_title=title, y_title="WQL relative to seasonal naive"))
    return drawn


def _forecast(forecast: dict[str, Any]) -> dict[str, Any]:
    names = list(forecast["models"])
    ours = (name for kind in tables.ROUTES for name in names if name.lower().startswith(kind))
    model = next(ours, names[0])
    teacher = next((name for name in names if name.lower().startswith("teacher") and name != model), None)
    chosen = zip(forecast.get("experts") or [], forecast.get("gates") or [], strict=False)  # of route 1 alone
    return {
        "domain": forecast["domain"],
        "item_id": forecast["item_id"],
        "model": model,
        "teacher": teacher,
        "worst": forecast.get("why") == "worst",
        "chosen": ", ".join(f"{expert} {gate:.2f}" for expert, gate in chosen),
        "chart": charts.forecast_chart(forecast, model=model, teacher=teacher),
    }


def _known(claim: Mapping[str, Any]) -> dict[str, Any]:
    return {name: claim[name] for name in Claim.__dataclass_fields__ if name in claim}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        raise InputError(
            f"a report needs {path.name} in {str(path.parent)!r}, which is not there; evaluate the run first"
        )
    lines = path.read_text(encoding="utf-8").splitlines()
    records = [_parse(line, where=f"{path}, line {row}") for row, line in enumerate(lines, start=1) if line.strip()]
    if not records:
        raise InputError(f"{path} has no record; evaluate the run again")
    return _checked(records, path)


def _read(path: Path) -> Any:
    if not path.exists():
        return None
    content = _parse(path.read_text(encoding="utf-8"), where=str(path))
    if path.name in REQUIRED:
        _checked(_records(content, path), path)
    return content


def _records(content: Any, path: Path) -> list[dict[str, Any]]:
    if path.name == "recommendation.json":
        content = content.get("candidates") if isinstance(content, dict) else None
    elif path.name == "moe.json" and isinstance(content, dict):
        content = [layer for inside in content.values() for layer in inside["layers"]]
    if not isinstance(content, list):
        raise InputError(f"{path} holds no list of records; evaluate the run again")
    return content


def _checked(records: Iterable[Any], path: Path) -> list[dict[str, Any]]:
    for place, record in enumerate(records, start=1):
        missing = [name for name in REQUIRED[path.name] if name not in record]
        if missing:
            raise InputError(f"{path}, record {place}: {', '.join(missing)} missing, got {sorted(record)}")
    return list(records)


def _parse(text: str, *, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error}); write the file again") from None
