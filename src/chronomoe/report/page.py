"""The report of a run: one HTML page that needs nothing else, and the same in Markdown."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
import yaml

from chronomoe.errors import InputError
from chronomoe.evaluation.comparison import KINDS
from chronomoe.report import charts, words
from chronomoe.report.card import complete_card
from chronomoe.report.claims import Claim
from chronomoe.report.sections import facts, sections
from chronomoe.report.tables import read_records

RECORD = ("model", "kind", "domain", "horizon", "metric", "value")
REQUIRED = {
    "evaluation.jsonl": RECORD,
    "held_out.jsonl": RECORD,
    "sample.jsonl": RECORD,
    "intervals.json": ("claim", "metric", "ratio"),
    "speed.json": ("claim", "metric", "ratio"),
    "efficiency.json": ("model", "kind"),
    "forecasts.json": (
        *("domain", "item_id", "context", "context_timestamps"),
        *("target", "target_timestamps", "levels", "models"),
    ),
    "recommendation.json": ("model", "kind", "error", "ratio", "low", "high", "near", "flops", "domains"),
    "expansion.json": ("layer", "after", "before", "validation", "kept"),
    "moe.json": ("block", "num_experts", "top_k", "load"),
}
"""By file, what each of its records has: its rows, the layers of each model, or a recommendation's candidates."""
FILES: dict[str, Any] = {
    **{name: [] for name in ("intervals", "speed", "efficiency", "forecasts")},
    **{name: None for name in ("recommendation", "routing", "expansion", "moe")},
    **{name: {} for name in ("curves", "run")},
}
"""JSON files of a run, and what stands for those that are missing."""
MADE_BY = {"mixture": "mixture", "upcycle": "upcycled", "expand": "expanded"}
"""What each route makes, as records and folders call it."""


def write_report(folder: Path) -> Path:
    """Write ``report.html`` and ``report.md`` from the files of a run folder; return the path of the page.

    Only ``evaluation.jsonl`` is needed; a section whose file is missing is left out. Values come from the files alone:
    nothing is forecast or timed here. The model cards of the run's checkpoints get its results, cost and data.
    """
    folder = Path(folder)
    found = read_records(_read_lines(folder / "evaluation.jsonl"))
    run = {name: _read(folder / f"{name}.json", missing) for name, missing in FILES.items()}
    config = folder / "config.yaml"
    run["config"] = config.read_text(encoding="utf-8") if config.exists() else None
    for name in ("held_out", "sample"):
        path = folder / f"{name}.jsonl"
        run[name] = read_records(_read_lines(path)) if path.exists() else None
    claims = [Claim.read(claim) for claim in (*run["intervals"], *run["speed"])]
    page = {
        "name": run["run"].get("name") or folder.resolve().name,
        "horizons": sorted(set(found.horizons).union(*found.domains.values())),
        "domains": list(found.domains),
        "models": found.models,
        "facts": facts(found, claims, run["efficiency"]),
        "sections": sections(run, found, claims),
        "kinds": KINDS,
        "colours": charts.COLOURS,
    }
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
    for name, model in _checkpoints(run).items():
        if (folder / name / "README.md").exists():
            complete_card(folder / name / "README.md", model, found, claims, run)
    return folder / "report.html"


def _checkpoints(run: dict[str, Any]) -> dict[str, str]:
    """Return the folders of checkpoints that a run leaves, each with its name in the records."""
    if run["config"] is None:
        return {}
    routes = yaml.safe_load(run["config"])["routes"]
    folders = {"moe" if place == 0 else MADE_BY[route]: MADE_BY[route] for place, route in enumerate(routes)}
    return folders | ({"recommended": run["recommendation"]["model"]} if run["recommendation"] else {})


def recommendation(folder: Path) -> str | None:
    """Return what a finished run recommends, in words; None where it was evaluated before runs recommended anything."""
    advice, costs = (_read(folder / name, None) for name in ("recommendation.json", "efficiency.json"))
    return words.recommendation(advice, costs) if advice and costs else None


def markdown_cell(text: str) -> str:
    """Keep a name from being read as a table border, markup or a new line."""
    text = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return "".join(f"\\{letter}" if letter in "*_`[]" else letter for letter in text)


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


def _read(path: Path, missing: Any) -> Any:
    if not path.exists():
        return missing
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
