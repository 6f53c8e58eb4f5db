"""Tables of the report: built once, written as HTML and as Markdown by the templates."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from chronomoe.errors import InputError, nearest
from chronomoe.evaluation.comparison import KINDS
from chronomoe.evaluation.metrics import ERRORS, METRICS
from chronomoe.report.charts import Number

REFERENCES = ("teacher", "oracle")
"""Kinds that no small model is expected to beat: they are shown, but not ranked."""
SHOWN_METRICS = ("WQL", "SQL", "MASE", "MAE", "MSE", "MAPE", "coverage80", "bias")
METRIC_NAMES = {"coverage80": "Coverage", "bias": "Bias"}
GAP = "–"
NOMINAL_COVERAGE = 0.8
UNSHADED = 0.5  # a value this much worse than the best of its column has no shade left

Key = tuple[str, int, str]
Costs = Sequence[Mapping[str, Any]]
Write = Callable[[float], str]


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
    style: str = ""
    shape: str = "table"


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
    """Collect evaluation records."""
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
    return found


def fixed(places: int, unit: float = 1, suffix: str = "") -> Write:
    """Return what writes a number with so many places, counted in a unit."""
    return lambda value: f"{value / unit:,.{places}f}{suffix}"


TAKEN: Mapping[str, tuple[str, Write]] = {
    "experts": ("Experts", fixed(2)),
    "active_parameters": ("Active", fixed(2, 1e6, " M")),
    "flops": ("GFLOPs", fixed(3, 1e9)),
    "training": ("Training", lambda value: f"{value:.0%}"),
    "core_seconds": ("Core-s", fixed(0)),
    "unseen_experts": ("Experts", fixed(2)),
    "window_ms": ("ms a window", fixed(1)),
}
"""What stands beside an error, so that a reader sees how equal a comparison is."""
AT_HOME = ("experts", "active_parameters", "flops", "training", "core_seconds")
COSTS: Mapping[str, tuple[str, Write]] = {
    "latency_p50_ms": ("p50, ms", fixed(1)),
    "latency_p95_ms": ("p95, ms", fixed(1)),
    "throughput": ("Windows/s", fixed(1)),
    "speed-up": ("× teacher", fixed(1, suffix="×")),
    "memory_mb": ("Memory, MB", fixed(1)),
    "checkpoint_mb": ("Disk, MB", fixed(1)),
    "parameters": ("Parameters", fixed(2, 1e6, " M")),
}


def overall_table(
    found: Evaluation, horizon: int, costs: Costs, *, kinds: Sequence[str], beside: Sequence[str] = AT_HOME
) -> Table:
    """Accuracy relative to seasonal naive with some of what it takes, one row per model."""
    metrics = [
        name for name in SHOWN_METRICS if any(("overall", horizon, name) in found.values[m] for m in found.models)
    ]
    cost = {row["model"]: row for row in costs}
    shown = {name: TAKEN[name] for name in beside if any(row.get(name) is not None for row in costs)}
    columns: list[Mapping[str, Cell]] = [
        {model: _cell(cost.get(model, {}).get(name), write) for model in found.models}
        for name, (_, write) in shown.items()
    ]
    columns += [_column(found, ("overall", horizon, metric)) for metric in metrics]
    note = (
        "Geometric mean over domains of each metric divided by seasonal naive's: below 1 is better than seasonal "
        "naive. Coverage (of the 80% band) and bias (forecast minus target, over the target's size) are plain means. "
        "Bold: best apart from the teacher and the oracle."
    )
    if "experts" in shown:
        note += (
            " Experts: models that run for one forecast, on average over test windows; active parameters and GFLOPs "
            "are counted at it. Training: share of the budget of training operations, with all that a row was made "
            "from; core-s: time its training took times threads, without the teacher's soft targets, which all share."
        )
    return Table(
        title=f"Horizon {horizon}",
        columns=[*(title for title, _ in shown.values()), *(METRIC_NAMES.get(name, name) for name in metrics)],
        rows=[row for row in _model_rows(found, columns) if row.kind in kinds],
        note=note,
        style="wide",
    )


def validation_table(found: Mapping[str, Any], *, near: bool) -> Table:
    """What the recommendation was chosen from: models within noise of the best, or the others."""
    rows = []
    for one in (one for one in found["candidates"] if (one["near"] or one["model"] == found["model"]) == near):
        picked = one["model"] == found["model"]
        ratio = Cell("1") if one["model"] == found["best"] else estimate(one["ratio"], one["low"], one["high"])
        cells = [Cell(f"{one['error']:.3f}", best=picked), ratio, Cell(f"{one['flops'] / 1e9:.3f}")]
        rows.append(
            Row(one["model"], [*cells, *(Cell(f"{value:.3f}") for value in one["domains"].values())], one["kind"])
        )
    return Table(
        title="Candidates on validation windows",
        columns=[found["metric"], "Ratio to the best", "GFLOPs", *found["candidates"][0]["domains"]],
        rows=rows,
        note=f"{found['metric']} relative to seasonal naive, on validation windows that no training watched; less is "
        "better. Ratio: with a 95% interval by paired bootstrap. Bold: recommended."
        if near
        else "",
    )


def confidence_table(bins: Sequence[Mapping[str, Number]]) -> Table:
    """How right the router is when it is sure."""
    rows = []
    for part in bins:
        left = f"{part['SQL'] / part['best_SQL'] - 1:.1%}" if part["best_SQL"] else GAP
        cells = [f"{part['windows']:,}", f"{part['SQL']:.3f}", f"{part['best_SQL']:.3f}", left]
        rows.append(Row(f"{part['low']:.2f} to {part['high']:.2f}", [Cell(text) for text in cells]))
    return Table(
        title="Router confidence against error",
        head="Confidence",
        columns=["Windows", "SQL", "Best expert in hindsight", "Left to gain"],
        rows=rows,
        note="Confidence: probability of the most probable expert; windows ranked by it and cut into equal parts. SQL: "
        "quantile loss scaled by the seasonal error, the same unit in every domain. A router that knows when it is "
        "wrong leaves more to gain at the top than at the bottom.",
    )


def domain_tables(found: Evaluation, horizon: int) -> list[Table]:
    """Each error by model and domain, metrics in the order in which they are shown."""
    domains = [domain for domain, horizons in found.domains.items() if horizon in horizons]
    recorded = {metric for values in found.values.values() for domain, _, metric in values if domain != "overall"}
    return [
        Table(
            title=f"{metric}, horizon {horizon}",
            columns=domains,
            rows=_model_rows(found, [_column(found, (domain, horizon, metric), shaded=True) for domain in domains]),
            note="The metric itself, lower is better. Shade: full at the best of a column, none from "
            f"{UNSHADED:.0%} worse on. Bold: best apart from the teacher and the oracle.",
        )
        for metric in SHOWN_METRICS
        if metric in recorded and metric in ERRORS
    ]


def routing_table(routing: Mapping[str, Any]) -> Table:
    """Which experts each domain uses."""
    rows = []
    for domain, used in routing["domains"].items():
        most = max(used["share"], default=0.0)
        cells = [
            Cell(f"{share:.0%} ({gate:.2f})", best=share == most, shade=share)
            for share, gate in zip(used["share"], used["gate"], strict=True)
        ]
        rows.append(Row(domain, [*cells, Cell(f"{used['experts']:.2f}"), Cell(f"{used['entropy']:.2f}")]))
    return Table(
        title="Routing",
        head="Domain",
        columns=[*routing["experts"], "Experts a window", "Router entropy"],
        rows=rows,
        note="Share of a domain's choices that fall on an expert, and its mean gate. Router entropy: 0 when the router "
        "is sure, 1 when all experts are equally probable.",
    )


def cost_table(costs: Costs) -> Table | None:
    """Cost of each model that was timed, throughput as a multiple of the teacher's too; None where none was."""
    timed = sorted((cost for cost in costs if cost.get("throughput")), key=lambda cost: KINDS.index(cost["kind"]))
    if not timed:
        return None
    base = next((cost["throughput"] for cost in timed if cost["kind"] == "teacher"), None)
    rows = [dict(cost) | ({"speed-up": cost["throughput"] / base} if base else {}) for cost in timed]
    shown = {name: column for name, column in COSTS.items() if any(row.get(name) is not None for row in rows)}
    best = {
        name: write((max if name == "throughput" else min)(row[name] for row in rows if row.get(name) is not None))
        for name, (_, write) in shown.items()
        if name != "speed-up"
    }
    cells = {
        row["model"]: [_cell(row.get(name), write, best=best.get(name)) for name, (_, write) in shown.items()]
        for row in rows
    }
    measured = {(cost.get("threads"), cost.get("batch_size")) for cost in timed}
    threads, batch = measured.pop() if len(measured) == 1 else ("several", "several sizes")
    return Table(
        title="Cost",
        columns=[title for title, _ in shown.values()],
        rows=[Row(row["model"], cells[row["model"]], row["kind"]) for row in rows],
        note=f"Latency (p50, p95): of one test window. Windows/s: in batches of {batch}, and as a multiple of the "
        "teacher's. Memory: weights and the most that tensors take while a batch is forecast. Disk and parameters: of "
        f"a whole checkpoint. Threads: {threads}. Bold: best of the column.",
    )


def time_table(seconds: Mapping[str, Number]) -> Table:
    """Where the time of a run went."""
    total = sum(seconds.values())
    rows = [Row(stage, [Cell(duration(own)), Cell(f"{own / (total or 1):.0%}")]) for stage, own in seconds.items()]
    whole = Row("all stages", [Cell(duration(total), best=True), Cell("")])
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
        return GAP
    limits = ((1000, 0), (100, 1), (10, 2), (1, 3), (0.001, 4))
    places = next((places for limit, places in limits if abs(value) >= limit), None)
    return f"{value:,.{places}f}" if places is not None else f"{value:.2e}" if value else "0"


def estimate(value: Number, low: Number, high: Number, *, even: Number = 1, form: str = "{:.3f}") -> Cell:
    """Write an estimate with its interval, marked where the interval excludes ``even``; less is better."""
    span = f"{signed(form, low)} to {signed(form, high)}"
    return Cell(signed(form, value), best=high < even, worse=low > even, span=span)


def signed(form: str, value: Number) -> str:
    """Write a number with a true minus sign."""
    return form.format(value).replace("-", "−")


def _cell(value: Number | None, write: Write, *, best: str | None = None) -> Cell:
    text = GAP if value is None else write(float(value))
    return Cell(text, best=text == best)


def _model_rows(found: Evaluation, columns: Sequence[Mapping[str, Cell]]) -> list[Row]:
    rows = [Row(model, [column[model] for column in columns], found.kinds[model]) for model in found.models]
    return [row for row in rows if any(cell.text != GAP for cell in row.cells)]


def _column(found: Evaluation, key: Key, *, shaded: bool = False) -> dict[str, Cell]:
    """Write one value of every model; the best is marked, models of no rank apart."""
    values = {model: found.values[model].get(key, math.nan) for model in found.models}
    share, overall = key[2] in set(METRICS) - set(ERRORS), key[0] == "overall"
    nominal = NOMINAL_COVERAGE if key[2] == "coverage80" else 0.0
    write = (lambda value: signed("{:.1%}", value)) if share else fixed(3) if overall else number
    off = {m: abs(value - nominal) if share else value for m, value in values.items() if math.isfinite(value)}
    ranked = [gap for model, gap in off.items() if found.kinds[model] not in REFERENCES]
    best, least = min(ranked, default=math.nan), min(off.values(), default=math.nan)
    cells = {}
    for model, value in values.items():
        if (gap := off.get(model)) is None:
            cells[model] = Cell(GAP)
        else:
            shade = max(0.0, 1 - (gap / least - 1) / UNSHADED) if shaded and least > 0 else None
            cells[model] = Cell(write(value), best=found.kinds[model] not in REFERENCES and gap == best, shade=shade)
    return cells
