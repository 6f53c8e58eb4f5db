"""Tables of the report: built once, written as HTML and as Markdown by the templates."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from chronomoe.errors import InputError, nearest
from chronomoe.evaluation.comparison import KINDS
from chronomoe.evaluation.metrics import ERRORS
from chronomoe.report.charts import Number

ROUTES = ("mixture", "upcycled", "expanded")
"""Kinds of models that the routes end with, route 1 first."""
REFERENCES = ("teacher", "oracle")
"""Kinds that no small model is expected to beat: they are shown, but not ranked."""
SHOWN_METRICS = ("WQL", "SQL", "MASE", "MAE", "MSE", "MAPE", "coverage80", "bias")
METRIC_NAMES = {"coverage80": "Coverage", "bias": "Bias"}
GAP = "–"
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


def overall_table(
    found: Evaluation, horizon: int, costs: Sequence[Mapping[str, Any]] = (), *, kinds: Sequence[str] = KINDS
) -> Table:
    """Accuracy relative to seasonal naive and what it takes, one row per model."""
    metrics = [
        name for name in SHOWN_METRICS if any(("overall", horizon, name) in found.values[m] for m in found.values)
    ]
    cost = {row["model"]: row for row in costs}
    shown = [column for column in TAKEN if any(row.get(column[1]) is not None for row in costs)]
    columns: list[Mapping[str, Cell]] = [
        {model: _cost_cell(cost.get(model, {}), name, text) for model in found.models} for _, name, text in shown
    ]
    columns += [_column(found, ("overall", horizon, metric)) for metric in metrics]
    rows = [row for row in _model_rows(found, columns) if row.kind in kinds]
    note = "Geometric mean over domains of each metric divided by seasonal naive's: below 1 is better than seasonal "
    note += (
        "naive. Coverage (of the 80% band) and bias (forecast minus target, over the target's size) are plain means. "
    )
    note += "Bold: best apart from the teacher and the oracle."
    if shown:
        note += (
            " Experts: models that run for one forecast, on average over test windows; active parameters and GFLOPs "
        )
        note += "are counted at it. Training: share of the budget of training operations, with all that a row was made "
        note += (
            "from; core-s: time its training took times threads, without the teacher's soft targets, which all share."
        )
    return Table(
        title=f"Horizon {horizon}",
        columns=[*(column[0] for column in shown), *(METRIC_NAMES.get(name, name) for name in metrics)],
        rows=rows,
        note=note,
    )


TAKEN: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("Experts", "experts", lambda value: f"{value:.2f}"),
    ("Active", "active_parameters", lambda value: f"{value / 1e6:.2f} M"),
    ("GFLOPs", "flops", lambda value: f"{value / 1e9:.3f}"),
    ("Training", "training", lambda value: f"{value:.0%}"),
    ("Core-s", "core_seconds", lambda value: f"{value:,.0f}"),
)
"""What stands beside an error, so that a reader sees how equal a comparison is."""


def _cost_cell(cost: Mapping[str, Any], name: str, text: Callable[[float], str]) -> Cell:
    return Cell(GAP if cost.get(name) is None else text(float(cost[name])))


def validation_table(found: Mapping[str, Any]) -> Table:
    """What the recommendation was chosen from."""
    rows = []
    for one in found["candidates"]:
        picked = one["model"] == found["model"]
        ratio = Cell("1") if one["model"] == found["best"] else estimate(one["ratio"], one["low"], one["high"])
        cells = [Cell(f"{one['error']:.3f}", best=picked), ratio, Cell("yes" if one["near"] else "no")]
        cells += [Cell(f"{one['flops'] / 1e9:.3f}"), *(Cell(f"{value:.3f}") for value in one["domains"].values())]
        rows.append(Row(one["model"], cells, one["kind"]))
    domains = list(found["candidates"][0]["domains"])
    return Table(
        title="Candidates on validation windows",
        columns=[found["metric"], "Ratio to the best", "Within noise", "GFLOPs", *domains],
        rows=rows,
        note=f"{found['metric']} relative to seasonal naive on validation windows; less is better. Ratio: with a 95% "
        "interval by paired bootstrap. Within noise: within one standard error of the best. Bold: recommended.",
    )


def recommendation_words(found: Mapping[str, Any], costs: Sequence[Mapping[str, Any]]) -> str:
    """Say in plain words what to deploy, why, and how sure that is."""
    cost = next(row for row in costs if row["model"] == found["model"])
    words = f"Deploy {found['model']}: it is {found['rule']}. Expect {found['error']:.3f} of seasonal naive's "
    words += f"{found['metric']} ({found['low']:.3f} to {found['high']:.3f} on validation windows) for "
    words += (
        f"{found['flops'] / 1e9:.3f} GFLOPs and {cost['active_parameters'] / 1e6:.2f} M active parameters a forecast."
    )
    if found["rival"] != found["model"]:
        words += f" In {found['sure']:.0%} of bootstrap draws it is no worse than {found['rival']}, the best other."
    return words + " No test window had a say. The checkpoint is in recommended/."


def confidence_table(bins: Sequence[Mapping[str, Number]]) -> Table:
    """How right the router is when it is sure."""
    rows = [
        Row(
            f"{part['low']:.2f} to {part['high']:.2f}",
            [
                Cell(f"{part['windows']:,}"),
                Cell(f"{part['SQL']:.3f}"),
                Cell(f"{part['best_SQL']:.3f}"),
                Cell(f"{part['SQL'] / part['best_SQL'] - 1:.1%}" if part["best_SQL"] else GAP),
            ],
        )
        for part in bins
    ]
    return Table(
        title="Router confidence against error",
        head="Confidence",
        columns=["Windows", "SQL", "Best expert in hindsight", "Left to gain"],
        rows=rows,
        note="Confidence: probability of the most probable expert; windows ranked by it and cut into equal parts. SQL: "
        "quantile loss scaled by the seasonal error, the same unit in every domain. A router that knows when it is "
        "wrong leaves more to gain at the top than at the bottom.",
    )


def estimate(value: Number, low: Number, high: Number, *, even: Number = 1, form: str = "{:.3f}") -> Cell:
    """Write an estimate with its interval, marked where the interval excludes ``even``; less is better."""
    span = f"{signed(form, low)} to {signed(form, high)}"
    return Cell(signed(form, value), best=high < even, worse=low > even, span=span)


def signed(form: str, value: Number) -> str:
    """Write a number with a true minus sign."""
    return form.format(value).replace("-", "−")


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
    return [metric for metric in SHOWN_METRICS if metric in recorded and metric in ERRORS]


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


COSTS: tuple[tuple[str, str, Callable[[float], str], bool], ...] = (
    ("p50, ms", "latency_p50_ms", lambda value: f"{value:.1f}", False),
    ("p95, ms", "latency_p95_ms", lambda value: f"{value:.1f}", False),
    ("Windows/s", "throughput", lambda value: f"{value:,.1f}", True),
    ("Memory, MB", "memory_mb", lambda value: f"{value:,.1f}", False),
    ("Disk, MB", "checkpoint_mb", lambda value: f"{value:,.1f}", False),
    ("Parameters", "parameters", lambda value: f"{value / 1e6:.2f} M", False),
)


def cost_table(costs: Sequence[Mapping[str, Any]]) -> Table:
    """Cost of each model; throughput also as a multiple of the teacher's."""
    costs = [cost for cost in costs if cost.get("throughput")]
    ordered = sorted(costs, key=lambda cost: KINDS.index(cost["kind"]))
    shown = [column for column in COSTS if any(cost.get(column[1]) is not None for cost in costs)]
    base = next((cost["throughput"] for cost in costs if cost["kind"] == "teacher" and cost.get("throughput")), None)
    columns = [_cost_column(ordered, name, text, more=more) for _, name, text, more in shown]
    if base:
        columns.append(
            [Cell(f"{cost['throughput'] / base:.1f}×" if cost.get("throughput") else GAP) for cost in ordered]
        )
    measured = {(cost.get("threads"), cost.get("batch_size")) for cost in costs}
    threads, batch = measured.pop() if len(measured) == 1 else ("several", "several sizes")
    return Table(
        title="Cost",
        columns=[column[0] for column in shown] + (["× teacher"] if base else []),
        rows=[Row(cost["model"], [column[i] for column in columns], cost["kind"]) for i, cost in enumerate(ordered)],
        note=f"Latency (p50, p95): of one test window. Windows/s: in batches of {batch}, and as a multiple of the "
        "teacher's. Memory: weights and the most that tensors take while a batch is forecast. Disk and parameters: of "
        f"a whole checkpoint. Threads: {threads}. Bold: best of the column.",
    )


def _cost_column(
    costs: Sequence[Mapping[str, Any]], name: str, text: Callable[[float], str], *, more: bool
) -> list[Cell]:
    known = [float(cost[name]) for cost in costs if cost.get(name) is not None]
    best = text(max(known) if more else min(known))
    written = [GAP if cost.get(name) is None else text(float(cost[name])) for cost in costs]
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
        return GAP
    limits = ((1000, 0), (100, 1), (10, 2), (1, 3), (0.001, 4))
    places = next((places for limit, places in limits if abs(value) >= limit), None)
    return f"{value:,.{places}f}" if places is not None else f"{value:.2e}" if value else "0"


def _model_rows(found: Evaluation, columns: Sequence[Mapping[str, Cell]]) -> list[Row]:
    rows = [Row(model, [column[model] for column in columns], found.kinds[model]) for model in found.models]
    return [row for row in rows if any(cell.text != GAP for cell in row.cells)]


def _column(found: Evaluation, key: Key, *, shaded: bool = False) -> dict[str, Cell]:
    values = {model: found.values[model].get(key, math.nan) for model in found.models}
    share, overall = key[2] not in ERRORS, key[0] == "overall"
    nominal = NOMINAL_COVERAGE if key[2] == "coverage80" else 0.0
    write = (lambda value: signed("{:.1%}", value)) if share else (lambda value: f"{value:.3f}") if overall else number
    off = {m: abs(value - nominal) if share else value for m, value in values.items() if math.isfinite(value)}
    ranked = [off[model] for model in off if found.kinds[model] not in REFERENCES]
    best, least = min(ranked, default=math.nan), min(off.values(), default=math.nan)
    cells = {}
    for model, value in values.items():
        if (gap := off.get(model)) is None:
            cells[model] = Cell(GAP)
        else:
            shade = max(0.0, 1 - (gap / least - 1) / UNSHADED) if shaded and least > 0 else None
            cells[model] = Cell(write(value), best=found.kinds[model] not in REFERENCES and gap == best, shade=shade)
    return cells
