"""The report of a run: one HTML page that needs nothing else, and the same tables in Markdown."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from chronomoe.errors import InputError
from chronomoe.evaluation.comparison import AVERAGE_SINGLE, KINDS
from chronomoe.report import charts, layer_tables, route_tables, tables
from chronomoe.report.claims import VERDICTS, Claim
from chronomoe.report.tables import Evaluation, Table

REQUIRED = {
    "evaluation.jsonl": ("model", "kind", "domain", "horizon", "metric", "value"),
    "intervals.json": ("claim", "metric", "ratio"),
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
    "routes.json": ("model", "kind"),
    "validation.json": ("model", "against", "domain", "loss", "against_loss", "difference", "low", "high"),
    "expansion.json": ("layer", "after", "before", "validation", "kept"),
    "moe.json": ("block", "num_experts", "top_k", "load"),
}
"""By file, what each of its records has: its rows, or in moe.json the layers of each model."""
LABELLED = (*tables.ROUTES, "generalist", "teacher", "average")


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


def markdown_cell(text: str) -> str:
    """Keep a name from being read as a table border, markup or a new line."""
    text = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return "".join(f"\\{letter}" if letter in "*_`[]" else letter for letter in text)


def _page(folder: Path, found: Evaluation) -> dict[str, Any]:
    run = _read(folder / "run.json") or {}
    claims = [Claim(**_known(claim)) for claim in _read(folder / "intervals.json") or []]
    costs = _read(folder / "efficiency.json") or []
    routing = _read(folder / "routing.json")
    routes = _read(folder / "routes.json")
    validation = _read(folder / "validation.json")
    growth = _read(folder / "expansion.json")
    curves = _read(folder / "curves.json") or {}
    config = folder / "config.yaml"
    return {
        "name": run.get("name") or folder.resolve().name,
        "horizons": sorted(set(found.horizons).union(*found.domains.values())),
        "domains": list(found.domains),
        "models": [model for model in found.models if model != AVERAGE_SINGLE],
        "machine": run.get("machine") or {},
        "command": run.get("command"),
        "facts": _facts(found, costs),
        "claims": [(claim, claim.draw(claims)) for claim in claims],
        "verdicts": VERDICTS,
        "kinds": KINDS,
        "overall": [tables.overall_table(found, horizon) for horizon in found.horizons],
        "routes": route_tables.routes_table(routes, found) if routes else None,
        "terms": route_tables.terms(routes["rows"]) if routes else "",
        "validation": route_tables.validation_table(rows, found.kinds)
        if validation and (rows := validation["rows"])
        else None,
        "by_domain": _domain_tables(found),
        "routing": routing,
        "routing_table": tables.routing_table(routing) if routing else None,
        "growth": route_tables.growth_table(growth) if growth else None,
        "layers": layer_tables.model_layers(_read(folder / "moe.json") or {}),
        "entropies": [(name, chart) for name, curve in curves.items() if (chart := charts.entropy_chart(curve))],
        "depths": [layer_tables.ordinal(place) for place in range(1, _most_layers(curves) + 1)],
        "layer_colours": charts.LAYER_COLOURS,
        "scatters": _scatters(found, costs),
        "scatter_kinds": [kind for kind in KINDS if any(cost["kind"] == kind for cost in costs)],
        "forecasts": [_forecast(forecast) for forecast in _read(folder / "forecasts.json") or []],
        "curves": [(name, charts.curve_chart(curve)) for name, curve in curves.items()],
        "costs": tables.cost_table(costs) if costs else None,
        "times": tables.time_table(run["seconds"]) if run.get("seconds") else None,
        "config": config.read_text(encoding="utf-8") if config.exists() else None,
    }


def _facts(found: Evaluation, costs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return what a reader wants to know first: the name of the first route's model, then its numbers.

    Of several models of a route, the first whose cost is known.
    """
    costed = {cost["model"] for cost in costs}
    ours = [model for model in found.models if found.kinds[model] in tables.ROUTES]
    if not ours:
        return []
    main = min(ours, key=lambda model: (tables.ROUTES.index(found.kinds[model]), model not in costed))
    facts = []
    cost = next((cost for cost in costs if cost["model"] == main), {})
    teacher = next((cost for cost in costs if cost["kind"] == "teacher"), {})
    scores = [("seasonal naive's WQL", found.overall(main))]
    for kind in ("generalist", "teacher"):
        rivals = [found.overall(model) for model in found.models if found.kinds[model] == kind]
        if rivals:
            which = "best " if len(rivals) > 1 else ""
            scores.append((f"the {which}{kind}'s WQL", found.overall(main) / min(rivals)))
    facts += [(f"{value:.3f}×", what) for what, value in scores if math.isfinite(value)]
    if cost.get("throughput") and teacher.get("throughput"):
        facts.append((f"{cost['throughput'] / teacher['throughput']:.1f}×", "the teacher's windows a second"))
    if cost.get("active_parameters"):
        active, every = (f"{cost[name] / 1e6:.1f} M" for name in ("active_parameters", "parameters"))
        facts.append((active, f"active parameters of {every}"))
    return [(main, "")] + facts


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


def _scatters(found: Evaluation, costs: Sequence[Mapping[str, Any]]) -> list[str]:
    drawn: list[str] = []
    for name, title in (("latency_p50_ms", "Latency of one window, ms"), ("active_parameters", "Active parameters")):
        points = [
            charts.Point(cost["model"], cost["kind"], cost[name], y, cost["kind"] in LABELLED)
            for cost in costs
            if cost.get(name) and cost["model"] in found.values and math.isfinite(y := found.overall(cost["model"]))
        ]
        points.sort(key=lambda point: KINDS.index(point.kind))
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
        "chosen": ", ".join(f"{expert} {gate:.2f}" for expert, gate in chosen),
        "chart": charts.forecast_chart(forecast, model=model, teacher=teacher),
    }


def _known(claim: Mapping[str, Any]) -> dict[str, Any]:
    return {name: claim.get(name) for name in Claim.__dataclass_fields__}


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
    if path.name in ("routes.json", "validation.json"):
        content = content.get("rows") if isinstance(content, dict) else None
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
