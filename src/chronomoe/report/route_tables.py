"""Tables of the report that set the routes against a dense student, and the path of route 3."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from chronomoe.report.charts import Number, is_number
from chronomoe.report.tables import ROUTES, Cell, Evaluation, Row, Table

SHOWN = ("WQL", "MAE")
"""Metrics of the routes, overall and as ratios to the rival's."""
MARKS = "with a 95% interval by paired bootstrap: bold where it says that the model is better, italic where worse"
GAP = "–"


def routes_table(routes: Mapping[str, Any], found: Evaluation) -> Table | None:
    """Each route and the rival, at equal active parameters and equal training; None where there is no route."""
    rows, rival = routes["rows"], routes["against"]
    numbers = sorted({ROUTES.index(row["kind"]) + 1 for row in rows if row["kind"] in ROUTES})
    if not numbers:
        return None
    if len(numbers) == len(ROUTES):
        title = "The three routes"
    else:
        title = f"Route{'s' * (len(numbers) > 1)} {' and '.join(map(str, numbers))} against {rival}"
    overall = [_overall_column([row["model"] for row in rows], found, metric) for metric in SHOWN]
    return Table(
        title=title,
        columns=[
            *("Parameters", "Active", "GFLOPs", "Training"),
            *(*SHOWN, *(f"{metric} ratio" for metric in SHOWN), "Loss difference"),
        ],
        rows=[
            Row(
                row["model"],
                [*_size_cells(row), *(column[place] for column in overall), *_rival_cells(row)],
                row["kind"],
            )
            for place, row in enumerate(rows)
        ],
        note="Active: parameters that one forecast uses. GFLOPs: of one forecast. Training: compute used, as a share "
        f"of the budget of all. {', '.join(SHOWN)}: relative to seasonal naive, geometric mean over domains, less is "
        f"better; bold: best of the column. Ratio: to the error of {rival} on the same test windows. Loss difference: "
        f"validation loss minus that of {rival}, in normalised space. Ratios and differences {MARKS}.",
    )


def terms(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say how equal the comparison is: how far the largest of the models is from the smallest."""
    spreads = {}
    for name, what in (("active_parameters", "active parameters"), ("training", "training")):
        values = [row[name] for row in rows if row.get(name)]
        if len(values) > 1:
            spreads[what] = max(values) / min(values) - 1
    if not spreads:
        return ""
    apart = ", ".join(f"{what} within {spread:.0%}" for what, spread in spreads.items())
    return f"One budget for all; between the largest and the smallest: {apart}."


def _size_cells(row: Mapping[str, Any]) -> list[Cell]:
    def cell(name: str, form: str, unit: Number) -> Cell:
        return Cell(GAP if row.get(name) is None else form.format(row[name] / unit))

    return [
        cell("parameters", "{:.2f} M", 1e6),
        cell("active_parameters", "{:.2f} M", 1e6),
        cell("flops", "{:.3f}", 1e9),
        cell("training", "{:.0%}", 1),
    ]


def _overall_column(models: Sequence[str], found: Evaluation, metric: str) -> list[Cell]:
    values = [found.overall(model, metric) if model in found.values else math.nan for model in models]
    best = min(filter(is_number, values), default=None)
    return [Cell(f"{value:.3f}" if is_number(value) else GAP, best=value == best) for value in values]


def _rival_cells(row: Mapping[str, Any]) -> list[Cell]:
    ratios = [row.get(metric.lower()) for metric in SHOWN]
    cells = [
        estimate(ratio["ratio"], ratio["low"], ratio["high"], even=1, form="{:.3f}") if ratio else Cell(GAP)
        for ratio in ratios
    ]
    loss = row.get("validation")
    if not loss:
        return [*cells, Cell(GAP)]
    return [*cells, estimate(loss["difference"], loss["low"], loss["high"], even=0, form="{:+.4f}")]


def validation_table(rows: Sequence[Mapping[str, Any]], kinds: Mapping[str, str]) -> Table:
    """Validation losses of models and their rivals by domain, and what lies between the two."""
    names = list(dict.fromkeys(row["domain"] for row in rows))
    domains = sorted(names, key=lambda name: name != "overall")  # first: with many domains the last are out of sight
    pairs: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        pairs.setdefault((row["model"], row["against"]), {})[row["domain"]] = row
    lines = []
    for (model, rival), losses in pairs.items():
        group, found = f"{model}, {rival}", [losses.get(domain) for domain in domains]
        for name, key in ((model, "loss"), (rival, "against_loss")):
            cells = [Cell(_loss(row[key]) if row else GAP) for row in found]
            lines.append(Row(name, cells, kinds.get(name, ""), group))
        gaps = [
            estimate(row["difference"], row["low"], row["high"], even=0, form="{:+.4f}") if row else Cell(GAP)
            for row in found
        ]
        lines.append(Row("difference", gaps, group=group))
    return Table(
        title="Validation loss",
        columns=domains,
        rows=lines,
        note="Hard loss in normalised space, mean over the validation windows, less is better. Difference: the first "
        f"model's minus the second's, {MARKS}.",
    )


def growth_table(path: Sequence[Mapping[str, Any]]) -> Table:
    """Each layer that was tried on the way to the expanded model."""
    places = sorted({probe["after"] for layer in path for probe in layer.get("probes") or []})
    rows = []
    for layer in path:
        before, reached, kept = layer["before"], layer["validation"], layer["kept"]
        cells = [
            Cell(f"block {layer['after']}"),
            Cell(_loss(before)),
            Cell(_loss(reached)),
            Cell(_signed("{:+.2%}", reached / before - 1) if before else GAP, best=kept),
            Cell("kept" if kept else "left out", best=kept),
            Cell(f"{layer['steps']:,}" if layer.get("steps") is not None else GAP),
        ]
        probed = {probe["after"]: probe["validation"] for probe in layer.get("probes") or []}
        cells += [
            Cell(_loss(probed[place]) if place in probed else GAP, best=place in probed and place == layer["after"])
            for place in places
        ]
        rows.append(Row(f"layer {layer['layer']}", cells))
    note = "Validation loss (hard loss in normalised space) before a layer was added and with it, tuned; it stays only "
    note += "if the loss falls. Blocks and layers are counted from 0."
    if places:
        note += " Probe: validation loss after a short training of a layer behind that block; bold: the place chosen."
    return Table(
        title="How the expanded model grew",
        head="Layer",
        columns=["After", "Loss before", "Loss with it", "Change", "Outcome", "Steps", *(f"Probe {p}" for p in places)],
        rows=rows,
        note=note,
    )


def estimate(value: Number, low: Number | None, high: Number | None, *, even: Number, form: str) -> Cell:
    """Write an estimate with its interval, marked where the interval excludes ``even``; less is better."""
    if low is None or high is None or not (is_number(low) and is_number(high)):
        return Cell(_signed(form, value) if is_number(value) else GAP)
    span = f"{_signed(form, low)} to {_signed(form, high)}"
    return Cell(_signed(form, value), best=high < even, worse=low > even, span=span)


def _loss(value: Number) -> str:
    return f"{value:.4f}" if is_number(value) else GAP


def _signed(form: str, value: Number) -> str:
    return form.format(value).replace("-", "−")
