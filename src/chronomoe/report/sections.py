"""Sections of the report, in the order in which they are read; the templates write each block as HTML or Markdown."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from markupsafe import Markup

from chronomoe.evaluation.comparison import KINDS
from chronomoe.report import charts, layer_tables, tables, words
from chronomoe.report.claims import Claim
from chronomoe.report.tables import Evaluation, Table

ROUTES = ("mixture", "upcycled", "expanded")
"""Kinds of models that the routes end with, route 1 first."""
SPECIALISTS = ("single", "expert")
"""Kinds whose many rows are folded away."""
MAIN = tuple(kind for kind in KINDS if kind not in SPECIALISTS)
PLOTTED = tuple(kind for kind in MAIN if kind != "average")
"""Kinds in the plot of error against cost: models off their domain would stretch it."""
AXES = (("flops", "GFLOPs a forecast", 1e9), ("latency_p50_ms", "Latency of one window, ms", 1))


class Block(NamedTuple):
    """A part of a section: ``shape`` says how templates write its content."""

    shape: Literal["text", "list", "heading", "legend", "figures", "fold", "claims", "bars", "code"]
    content: Any
    """Text, lines, (mark, meaning) pairs, figures, further blocks, (claim, chart) pairs or a run's routing."""
    style: str = ""
    """Class of a text, arrangement of figures, language of code."""
    title: str = ""
    """Of a fold."""
    level: int = 3
    """Of a heading."""
    chip: tuple[str, str] | None = None
    """Class and text of a verdict beside a heading."""


class Figure(NamedTuple):
    """A chart with its caption."""

    chart: Markup
    title: str = ""
    detail: str = ""
    chip: tuple[str, str] | None = None
    small: str = ""


class Section(NamedTuple):
    """A part of the page that the navigation leads to."""

    id: str
    title: str
    short: str
    blocks: Sequence[Any]


def sections(run: Mapping[str, Any], found: Evaluation, claims: Sequence[Claim]) -> list[Section]:
    """Build every section that the files of a run have something for.

    Args:
        run: content of its files by their names without endings.
        found: records at home.
        claims: those of the run, of speed too.
    """
    built = (
        Section("claims", "Claims", "Claims", list(_claims(claims))),
        Section("recommendation", "Recommendation", "Recommendation", list(_recommendation(run, claims))),
        Section("scatter", "Error against cost", "Error against cost", list(_scatter(run, found))),
        Section("overall", "Accuracy overall", "Accuracy", list(_overall(found, run["efficiency"]))),
        Section("held-out", "Unseen domains", "Unseen domains", list(_unseen(run["held_out"], run["efficiency"]))),
        Section("sample", "Classical models", "Classical models", list(_sample(run["sample"], run["efficiency"]))),
        Section("domains", "Accuracy by domain", "By domain", list(_domains(found))),
        Section("routing", "Which experts each domain uses", "Routing", list(_routing(run["routing"]))),
        Section("growth", "How the expanded model grew", "Growth", list(_growth(run["expansion"]))),
        Section("layers", "Inside the MoE layers", "MoE layers", list(_layers(run["moe"], run["curves"]))),
        Section("forecasts", "Forecasts", "Forecasts", list(_forecasts(run["forecasts"]))),
        Section("curves", "Training curves", "Training", list(_curves(run["curves"]))),
        Section("cost", "Cost", "Cost", [table for table in [tables.cost_table(run["efficiency"])] if table]),
        Section("time", "Where the time went", "Time", list(_time(run["run"]))),
        Section("repeat", "Repeat it", "Repeat it", list(_repeat(run["run"], run["config"]))),
    )
    return [section for section in built if section.blocks]


def _claims(claims: Sequence[Claim]) -> Iterator[Any]:
    drawn = [(claim, claim.draw(claims)) for claim in claims]
    unseen = [pair for pair in drawn if pair[0].unseen]
    if claims:
        yield Block("claims", [pair for pair in drawn if not pair[0].unseen])
    if unseen:
        yield Block("heading", "On unseen domains")
        yield Block("claims", unseen)
    if claims:
        yield Block("text", words.VERDICTS_NOTE, "note")


def _recommendation(run: Mapping[str, Any], claims: Sequence[Claim]) -> Iterator[Any]:
    advice, costs = run["recommendation"], run["efficiency"]
    if not (advice and costs):
        return
    yield Block("text", words.recommendation(advice, costs), "advice")
    if choice := words.when_another(claims, costs):
        yield Block("heading", "When to take another model")
        yield Block("list", choice)
    yield Block("heading", "Candidates within noise of the best, on validation windows")
    yield tables.validation_table(advice, near=True)
    if (others := tables.validation_table(advice, near=False)).rows:
        yield Block("fold", [others], title="Other candidates")


def _scatter(run: Mapping[str, Any], found: Evaluation) -> Iterator[Any]:
    costs, recommended = run["efficiency"], (run["recommendation"] or {}).get("model", "")
    figures, drawn = [], set()
    for name, title, unit in AXES:
        points = [
            charts.Point(cost["model"], cost["kind"], cost[name] / unit, y, cost["model"] == recommended)
            for cost in costs
            if cost.get(name) and (cost["kind"] in PLOTTED or cost["model"] == recommended)
            if cost["model"] in found.values and math.isfinite(y := found.overall(cost["model"]))
        ]
        points.sort(key=lambda point: (not point.marked, KINDS.index(point.kind)))
        if len(points) > 1:
            chart = charts.scatter_chart(points, x_title=title, y_title="WQL relative to seasonal naive")
            figures.append(Figure(chart))
            drawn |= {point.kind for point in points}
    if figures:
        yield Block("legend", [(dot(kind), kind) for kind in KINDS if kind in drawn])
        yield Block("figures", figures, "pair")
        ring = " Ring: recommended, from validation windows." if recommended else ""
        yield Block(
            "text",
            "Best is at the lower left: a smaller error for less. Line: the Pareto front, models that no other beats "
            f"in both.{ring} Errors are those on test windows.",
            "note",
        )


def _overall(found: Evaluation, costs: tables.Costs) -> Iterator[Any]:
    for place, horizon in enumerate(found.horizons):
        if place == 0:
            yield Block("text", "Relative to seasonal naive; less is better.", "soft")
        if len(found.horizons) > 1:
            yield Block("heading", f"Horizon {horizon}")
        yield tables.overall_table(found, horizon, costs, kinds=MAIN)
        folded = tables.overall_table(found, horizon, costs, kinds=SPECIALISTS)
        if folded.rows:
            yield Block("fold", [folded], title="Every single and every expert, on all domains")


def _unseen(found: Evaluation | None, costs: tables.Costs) -> Iterator[Any]:
    if found is None:
        return
    names = ", ".join(found.domains)
    yield Block(
        "text", f"Nothing was trained or chosen on {names}. Relative to seasonal naive; less is better.", "soft"
    )
    for horizon in found.horizons:
        yield tables.overall_table(found, horizon, costs, kinds=MAIN, beside=["unseen_experts"])
        folded = tables.overall_table(found, horizon, (), kinds=SPECIALISTS)
        if folded.rows:
            yield Block("fold", [folded], title="Every single and every expert")


def _sample(found: Evaluation | None, costs: tables.Costs) -> Iterator[Any]:
    if found is not None:
        yield Block("text", "Fitted to each window of a sample, beside all others on the same windows.", "soft")
        for horizon in found.horizons:
            yield tables.overall_table(found, horizon, costs, kinds=MAIN, beside=["window_ms"])


def _domains(found: Evaluation) -> Iterator[Any]:
    for horizon in sorted(set().union(*found.domains.values())):
        every = [(Block("heading", table.title), table) for table in tables.domain_tables(found, horizon)]
        if every:
            yield from every[0]
        if every[1:]:
            yield Block(
                "fold",
                [part for pair in every[1:] for part in pair],
                title=f"Other metrics by domain, horizon {horizon}",
            )


def _routing(routing: Mapping[str, Any] | None) -> Iterator[Any]:
    if not routing:
        return
    yield Block("legend", [(dot(f"e{place % charts.COLOURS}"), name) for place, name in enumerate(routing["experts"])])
    yield Block("bars", routing)
    yield tables.routing_table(routing)
    if bins := routing.get("confidence"):
        yield Block("heading", "Router confidence against error")
        yield Block("legend", [(line("accent"), "mixture"), (line("rival", "dash"), "best expert in hindsight")])
        yield Block("figures", [Figure(charts.confidence_chart(bins))], "grid")
        yield tables.confidence_table(bins)


def _growth(path: Sequence[Mapping[str, Any]] | None) -> Iterator[Table]:
    if path:
        yield layer_tables.growth_table(path)


def _layers(moe: Mapping[str, Any] | None, curves: Mapping[str, Any]) -> Iterator[Any]:
    models = layer_tables.model_layers(moe or {})
    if models:
        yield Block(
            "text",
            "Shares of the choices that fall on each expert (E0, E1, …): of all tokens, of the tokens of each domain, "
            "and by their place in the window. Layers stand in order of depth; blocks are counted from 0. Italic: an "
            "expert that is hardly ever chosen.",
            "soft",
        )
        swatches = [(Markup('<i class="swatch"></i>'), "chosen more than evenly")]
        less = "chosen less; full colour at four times and a quarter of an even share"
        yield Block("legend", [*swatches, (Markup('<i class="swatch below"></i>'), less)])
    for model in models:
        yield Block(
            "heading", model.model, chip=("not-met", "Dead expert") if model.dead else ("met", "No dead expert")
        )
        yield Block("text", model.balance, "note")
        first, *rest = [part for table in model.tables for part in (Block("heading", table.title, level=4), table)]
        yield from (first, rest.pop(0))
        if rest:
            yield Block("fold", rest, title=f"Further layers of {model.model}: {len(rest) // 2}")
    entropies = [Figure(chart, name) for name, curve in curves.items() if (chart := charts.entropy_chart(curve))]
    if entropies:
        depths = range(max(len(curve["entropy"][0]) for curve in curves.values() if curve.get("entropy")))
        yield Block("heading", "Router entropy over training")
        yield Block(
            "legend",
            [(line(f"e{depth % charts.COLOURS}"), f"{layer_tables.ordinal(depth + 1)} layer") for depth in depths],
        )
        yield Block("figures", entropies, "grid")
        yield Block("text", "1 where all experts are equally probable, 0 where the router is sure.", "note")


def _forecasts(forecasts: Sequence[dict[str, Any]]) -> Iterator[Any]:
    figures = []
    model = teacher = None
    for forecast in forecasts:
        names = list(forecast["models"])
        ours = (name for kind in ROUTES for name in names if name.lower().startswith(kind))
        model = next(ours, names[0])
        teacher = next((name for name in names if name.lower().startswith("teacher") and name != model), None)
        chosen = zip(forecast.get("experts") or [], forecast.get("gates") or [], strict=False)  # of route 1 alone
        used = ", ".join(f"{expert} {gate:.2f}" for expert, gate in chosen)
        figures.append(
            Figure(
                charts.forecast_chart(forecast, model=model, teacher=teacher),
                forecast["domain"],
                f" · {forecast['item_id']}",
                EXTREMES.get(forecast.get("why", "")),
                f"experts: {used}" if used else "",
            )
        )
    if figures:
        entries = [(line("soft"), "context"), (line("ink"), "what followed"), (line("accent"), f"median of {model}")]
        entries.append((Markup('<s class="fill"></s>'), "its 50% and 80% bands"))
        yield Block("legend", [*entries, (line("rival", "dash"), "median of the teacher")] if teacher else entries)
        yield Block("figures", figures, "pair")
        yield Block(
            "text",
            "Windows at fixed places of each domain, and those with the smallest and the largest scaled error.",
            "note",
        )


EXTREMES = {"best": ("met", "Best"), "worst": ("not-met", "Worst")}


def _curves(curves: Mapping[str, Any]) -> Iterator[Any]:
    if curves:
        yield Block("legend", [(line("soft"), "training loss"), (line("accent"), "validation loss")])
        yield Block("figures", [Figure(charts.curve_chart(curve), name) for name, curve in curves.items()], "grid")


def _time(run: Mapping[str, Any]) -> Iterator[Table]:
    if run.get("seconds"):
        yield tables.time_table(run["seconds"])


def _repeat(run: Mapping[str, Any], config: str | None) -> Iterator[Any]:
    if machine := run.get("machine"):
        yield Block("text", f"Made with {', '.join(f'{name} {value}' for name, value in machine.items())}.", "soft")
    for text, language in ((run.get("command"), "sh"), (config, "yaml")):
        if text:
            yield Block("code", text, language)


def dot(name: str) -> Markup:
    """Return a dot in one of the page's colours."""
    return Markup('<i class="dot" style="--kind: var(--{})"></i>').format(name)


def line(name: str, style: str = "") -> Markup:
    """Return a short line in one of the page's colours."""
    return Markup('<s class="{}" style="color: var(--{})"></s>').format(style, name)


def facts(found: Evaluation, claims: Iterable[Claim], costs: tables.Costs) -> list[tuple[str, str]]:
    """Return what a reader wants to know first: the name of the first route's model, then its numbers."""
    main = next((model for model in found.models if found.kinds[model] in ROUTES), None)
    if main is None:
        return []
    own = [claim for claim in claims if claim.model == main and not claim.unseen]
    errors = [(f"{value:.3f}×", "seasonal naive's WQL")] if math.isfinite(value := found.overall(main)) else []
    errors += [(f"{claim.ratio:.3f}×", f"the WQL of {claim.against}") for claim in own if claim.metric == "WQL"]
    fast = [(f"{one.ratio:.1f}×", f"the windows a second of {one.against}") for one in own if one.higher_is_better]
    experts = next((cost.get("experts") for cost in costs if cost["model"] == main), None)
    used = [] if experts is None else [(f"{experts:.2f}", "experts a forecast, on average")]
    return [(main, ""), *errors[:MOST_ERRORS], *fast, *used]


MOST_ERRORS = 4
"""At the top of the page."""
