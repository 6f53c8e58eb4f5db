"""Tables of the report: built once, written as HTML and as Markdown by the templates."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from chronomoe.errors import InputError, nearest
from chronomoe.evaluation.comparison import AVERAGE_SINGLE, KINDS
from chronomoe.report.charts import Number

ROUTES = ("mixture", "upcycled", "expanded")
"""Kinds of models that the routes end with, route 1 first."""
REFERENCES = ("teacher", "oracle")
"""Kinds that no small model is expected to beat: they are shown, but not ranked."""
SHOWN_METRICS = ("WQL", "MASE", "MAE", "MSE", "MAPE", "SQL", "coverage80")
NOMINAL_COVERAGE = 0.8
UNSHADED = 0.5  # a value this much worse than the best of its column has no shade left

Key = tuple[str, int, str]


@dataclass(frozen=True)
class Cell:
    """A value as text, and how it stands in its column."""

    text: str
    best: bool = False
    shade: float | None = None  # strength of the colour, 1 for full; below 0 that of the other colour
    span: str = ""  # the interval of the value
    worse: bool = False


@dataclass(frozen=True)
class Row:
    """A line of a table; ``kind`` is empty where rows are not models.

    A line parts rows of different groups, or kinds where they have no group; rows with neither all stand apart.
    """

    name: str
    cells: Sequence[Cell]
    kind: str = ""
    group: str = ""


@dataclass(frozen=True)
class Table:
    """A table with what must be said about it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Row]
    note: str = ""
    head: str = "Model"


@dataclass(frozen=True)
class Evaluation:
    """The records of a run, by model: ``values[model][domain, horizon, metric]``."""

    values: dict[str, dict[Key, float]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        """All models, kinds together, in the order of the records within a kind."""
        return sorted(self.values, key=lambda model: KINDS.index(self.kinds[model]))

    @property
    def horizons(self) -> list[int]:
        """Horizons with an overall value, shortest first."""
        return sorted({horizon for values in self.values.values() for name, horizon, _ in values if name == "overall"})

    @property
    def domains(self) -> dict[str, set[int]]:
        """All domains, in the order of the records, with their horizons."""
        found: dict[str, set[int]] = {}
        for name, horizon, _ in (key for values in self.values.values() for key in values if key[0] != "overall"):
            found.setdefault(name, set()).add(horizon)
        return found

    def overall(self, model: str, metric: str = "WQL") -> float:
        """Return a model's overall value, the geometric mean over horizons if there are several."""
        values = [self.values[model].get(("overall", horizon, metric), math.nan) for horizon in self.horizons]
        return math.exp(fmean(math.log(value) for value in values)) if values and min(values) > 0 else math.nan


def read_records(records: Iterable[Mapping[str, Any]]) -> Evaluation:
    """Collect evaluation records and add the mean of all ``single`` models as one more."""
    found = Evaluation()
    for record in records:
        model, kind = str(record["model"]), record["kind"]
        if kind not in KINDS:
            raise InputError(
                f"Unknown kind {kind!r} of model {model!r}. Available: {', '.join(KINDS)}.{nearest(kind, KINDS)}"
            )
        key = (str(record["domain"]), int(record["horizon"]), str(record["metric"]))
        if key in found.values.setdefault(model, {}) or found.kinds.setdefault(model, kind) != kind:
            raise InputError(
                f"evaluation records name model {model!r} twice for {key} or with two kinds; evaluate again"
            )
        found.values[model][key] = math.nan if record["value"] is None else float(record["value"])
    singles = [model for model in found.models if found.kinds[model] == "single"]
    if len(singles) > 1 and AVERAGE_SINGLE not in found.values:
        keys = [key for key in found.values[singles[0]] if all(key in found.values[model] for model in singles)]
        mean = {key: fmean(found.values[model][key] for model in singles) for key in keys}
        before = {model: found.values.pop(model) for model in list(found.values)}
        found.values.update({AVERAGE_SINGLE: mean, **before})  # first of its kind
        found.kinds[AVERAGE_SINGLE] = "single"
    return found


def overall_table(found: Evaluation, horizon: int) -> Table:
    """Accuracy relative to seasonal naive, one row per model."""
    metrics = [
        name for name in SHOWN_METRICS if any(("overall", horizon, name) in found.values[m] for m in found.values)
    ]
    columns = [_column(found, ("overall", horizon, metric)) for metric in metrics]
    return Table(
        title=f"Horizon {horizon}",
        columns=["Coverage of 80%" if name == "coverage80" else name for name in metrics],
        rows=_model_rows(found, columns),
        note="Geometric mean over domains of each metric divided by seasonal naive's: below 1 is better than seasonal "
        "naive. Coverage is the plain mean share of steps inside the 80% band. Bold: best apart from the teacher and "
        "the oracle."
        + (f" “{AVERAGE_SINGLE}” is the mean of the single rows." if AVERAGE_SINGLE in found.values else ""),
    )


def domain_table(found: Evaluation, horizon: int, metric: str) -> Table:
    """One metric by model and domain."""
    domains = [domain for domain, horizons in found.domains.items() if horizon in horizons]
    columns = [_column(found, (domain, horizon, metric), shaded=True) for domain in domains]
    return Table(
        title=f"{metric}, horizon {horizon}",
        columns=domains,
        rows=_model_rows(found, columns),
        note="The metric itself, lower is better. Shade: full at the best of a column, none from "
        f"{UNSHADED:.0%} worse on. Bold: best apart from the teacher and the oracle.",
    )


def domain_metrics(found: Evaluation) -> list[str]:
    """Metrics that were recorded by domain, errors only."""
    recorded = {metric for values in found.values.values() for domain, _, metric in values if domain != "overall"}
    return [metric for metric in SHOWN_METRICS if metric in recorded and metric != "coverage80"]


def routing_table(routing: Mapping[str, Any]) -> Table:
    """Which experts each domain uses."""
    rows = []
    for domain, used in routing["domains"].items():
        most = max(used["share"], default=0.0)
        cells = [
            Cell(f"{share:.0%} ({gate:.2f})", best=share == most, shade=share)
            for share, gate in zip(used["share"], used["gate"], strict=True)
        ]
        rows.append(Row(domain, [*cells, Cell(f"{used['entropy']:.2f}")]))
    return Table(
        title="Routing",
        head="Domain",
        columns=[*routing["experts"], "Router entropy"],
        rows=rows,
        note="Share of a domain's choices that fall on an expert, and its mean gate. Router entropy: 0 when the router "
        "is sure, 1 when all experts are equally probable.",
    )


COSTS: tuple[tuple[str, str, Callable[[float], str], bool], ...] = (
    ("Parameters", "parameters", lambda value: f"{value / 1e6:.2f} M", False),
    ("Active", "active_parameters", lambda value: f"{value / 1e6:.2f} M", False),
    ("GFLOPs", "flops", lambda value: f"{value / 1e9:.3f}", False),
    ("p50, ms", "latency_p50_ms", lambda value: f"{value:.1f}", False),
    ("p95, ms", "latency_p95_ms", lambda value: f"{value:.1f}", False),
    ("Windows/s", "throughput", lambda value: f"{value:,.1f}", True),
    ("Disk, MB", "checkpoint_mb", lambda value: f"{value:.1f}", False),
)


def cost_table(costs: Sequence[Mapping[str, Any]]) -> Table:
    """Cost of each model; throughput also as a multiple of the teacher's."""
    ordered = sorted(costs, key=lambda cost: KINDS.index(cost["kind"]))
    shown = [column for column in COSTS if any(cost.get(column[1]) is not None for cost in costs)]
    base = next((cost["throughput"] for cost in costs if cost["kind"] == "teacher" and cost.get("throughput")), None)
    columns = [_cost_column(ordered, name, text, more=more) for _, name, text, more in shown]
    if base:
        columns.append(
            [Cell(f"{cost['throughput'] / base:.1f}×" if cost.get("throughput") else "–") for cost in ordered]
        )
    measured = {(cost.get("threads"), cost.get("batch_size")) for cost in costs}
    threads, batch = measured.pop() if len(measured) == 1 else ("several", "several sizes")
    return Table(
        title="Cost",
        columns=[column[0] for column in shown] + (["× teacher"] if base else []),
        rows=[Row(cost["model"], [column[i] for column in columns], cost["kind"]) for i, cost in enumerate(ordered)],
        note="Active: parameters that one forecast uses. GFLOPs and latency (p50, p95): of one window. Windows/s: in "
        f"batches of {batch}, and as a multiple of the teacher's. Threads: {threads}. Bold: best of the column.",
    )


def _cost_column(
    costs: Sequence[Mapping[str, Any]], name: str, text: Callable[[float], str], *, more: bool
) -> list[Cell]:
    known = [float(cost[name]) for cost in costs if cost.get(name) is not None]
    best = text(max(known) if more else min(known))
    written = ["–" if cost.get(name) is None else text(float(cost[name])) for cost in costs]
    return [Cell(value, best=value == best) for value in written]


def time_table(seconds: Mapping[str, Number]) -> Table:
    """Where the time of a run went."""
    total = sum(seconds.values()) or 1.0
    rows = [Row(stage, [Cell(duration(value)), Cell(f"{value / total:.0%}")]) for stage, value in seconds.items()]
    whole = Row("all stages", [Cell(duration(sum(seconds.values())), best=True), Cell("")])
    return Table(title="Time", head="Stage", columns=["Time", "Share"], rows=[*rows, whole])


def duration(seconds: Number) -> str:
    """Write seconds as people say them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    (hours, minutes), rest = divmod(round(seconds) // 60, 60), round(seconds) % 60
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def number(value: Number) -> str:
    """Write a metric's value with about four figures."""
    if not math.isfinite(value):
        return "–"
    limits = ((1000, 0), (100, 1), (10, 2), (1, 3), (0.001, 4))
    places = next((places for limit, places in limits if abs(value) >= limit), None)
    return f"{value:,.{places}f}" if places is not None else f"{value:.2e}" if value else "0"


def _model_rows(found: Evaluation, columns: Sequence[Mapping[str, Cell]]) -> list[Row]:
    rows = [Row(model, [column[model] for column in columns], found.kinds[model]) for model in found.models]
    return [row for row in rows if any(cell.text != "–" for cell in row.cells)]


def _column(found: Evaluation, key: Key, *, shaded: bool = False) -> dict[str, Cell]:
    values = {model: found.values[model].get(key, math.nan) for model in found.models}
    coverage, overall = key[2] == "coverage80", key[0] == "overall"
    write = (lambda value: f"{value:.1%}") if coverage else (lambda value: f"{value:.3f}") if overall else number
    off = {
        m: abs(value - NOMINAL_COVERAGE) if coverage else value for m, value in values.items() if math.isfinite(value)
    }
    ranked = [off[model] for model in off if found.kinds[model] not in REFERENCES]
    best, least = min(ranked, default=math.nan), min(off.values(), default=math.nan)
    cells = {}
    for model, value in values.items():
        if (gap := off.get(model)) is None:
            cells[model] = Cell("–")
        else:
            shade = max(0.0, 1 - (gap / least - 1) / UNSHADED) if shaded and least > 0 else None
            cells[model] = Cell(write(value), best=found.kinds[model] not in REFERENCES and gap == best, shade=shade)
    return cells
