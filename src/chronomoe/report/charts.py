"""Charts of the report, as inline SVG.

Drawn by hand rather than by a plotting library: every colour is a CSS variable of the page, so that charts follow its
light and dark scheme, text stays text, and a chart is a few kilobytes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
from markupsafe import Markup, escape

TEXT_WIDTH = 5.9  # average width of a character at the charts' font size
COLOURS = 8  # of the page; further layers take them again
BANDS = ((0.1, 0.9), (0.25, 0.75))  # drawn widest first

Number = int | float  # run-time type checks take "float" at its word
Values = Sequence[Number | None]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Maps values to places along one side of a chart."""

    low: Number
    high: Number
    start: Number
    stop: Number
    log: bool = False

    def __call__(self, value: Number) -> float:
        """Return the place of a value."""
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (self.stop - self.start) * (value - low) / ((high - low) or 1.0)

    def ticks(self, count: int = 4) -> list[Number]:
        """Return about ``count`` round values inside the axis."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            every = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
            inside = [tick for tick in every if self.low <= tick <= self.high]
            return inside if len(inside) <= 2 * count else [tick for tick in inside if f"{tick:e}"[0] == "1"]
        span = (self.high - self.low) or 1.0
        step = 10.0 ** math.floor(math.log10(span / count))
        step *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / (step * factor) <= count + 0.5)
        first = math.ceil(self.low / step)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


class Point(NamedTuple):
    """One model in a scatter chart."""

    name: str
    kind: str
    x: Number
    y: Number
    marked: bool


def compact(value: Number) -> str:
    """Write a number shortly: 1200000 as 1.2M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}" if value else "0"


def is_number(value: Number | None) -> bool:
    """Tell finite numbers from gaps."""
    return value is not None and math.isfinite(value)


def interval_chart(
    *, ratio: Number, low: Number | None, high: Number | None, target: Number | None, bounds: tuple[Number, Number]
) -> Markup:
    """Draw an estimate with its interval, the place where both are equal and the target."""
    x = Axis(low=bounds[0], high=bounds[1], start=14, stop=306)
    parts = ['<line class="axis" x1="14" x2="306" y1="22" y2="22"/>', _mark(x(1.0), "equal", "even")]
    if target is not None and target != 1.0:
        parts.append(_mark(x(target), f"{target:g}", "goal", above=True))
    if low is not None and high is not None:
        parts.append(f'<line class="range" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="22" y2="22"/>')
    parts.append(f'<circle class="dot" cx="{x(ratio):.1f}" cy="22" r="5.5"/>')
    span = f", interval {low:.3f} to {high:.3f}" if low is not None and high is not None else ""
    return _svg(parts, width=320, height=48, title=f"ratio {ratio:.3f}{span}", name="interval")


def scatter_chart(points: Sequence[Point], *, x_title: str, y_title: str) -> Markup:
    """Draw accuracy (lower is better) against a cost, one dot per model, and the line of those that none beats in both.

    The first points are on top and named first; a marked one has a ring.
    """
    width, height, left, top, right, bottom = 480, 320, 44, 34, 16, 40
    xs, ys = [point.x for point in points], [point.y for point in points]
    log = min(xs) > 0 and max(xs) / min(xs) > 5
    room = (max(xs) / min(xs)) ** 0.08 if log else (max(xs) - min(xs)) * 0.08 or 1.0
    x_low, x_high = (min(xs) / room, max(xs) * room) if log else (min(xs) - room, max(xs) + room)
    pad = (max(ys) - min(ys)) * 0.1 or 0.05
    x = Axis(low=x_low, high=x_high, start=left, stop=width - right, log=log)
    y = Axis(low=min(ys) - pad, high=max(ys) + pad, start=height - bottom, stop=top)
    parts = _y_axis(y, left=left, right=width - right)
    for tick in x.ticks():
        parts.append(f'<text x="{x(tick):.1f}" y="{height - bottom + 16}" text-anchor="middle">{compact(tick)}</text>')
    parts.append(f'<text class="title" x="0" y="14">{escape(y_title)}</text>')
    parts.append(f'<text class="title" x="{width - right}" y="{height - 6}" text-anchor="end">{escape(x_title)}</text>')
    taken = [(x(p.x) - 6, y(p.y) - 6, x(p.x) + 6, y(p.y) + 6) for p in points]
    front = [p for p in points if not any((q.x, q.y) != (p.x, p.y) and q.x <= p.x and q.y <= p.y for q in points)]
    parts.append(f'<path class="front" d="{_path([(x(p.x), y(p.y)) for p in sorted(front, key=lambda p: p.x)])}"/>')
    for point in reversed(points):
        about = f"{point.name}: {compact(point.x)}, {point.y:.3f}"
        parts.append(
            f'<circle class="kind-{escape(point.kind)}" cx="{x(point.x):.1f}" cy="{y(point.y):.1f}" '
            f'r="6"><title>{escape(about)}</title></circle>'
        )
        if point.marked:
            parts.append(f'<circle class="ring" cx="{x(point.x):.1f}" cy="{y(point.y):.1f}" r="10"/>')
    inside = (left, top, width, height - bottom)
    for point in points:
        parts += _label(point.name, x(point.x), y(point.y), gap=14 if point.marked else 10, taken=taken, inside=inside)
    return _svg(parts, width=width, height=height, title=f"{y_title} against {x_title}", name="scatter")


def forecast_chart(forecast: dict[str, Any], *, model: str, teacher: str | None) -> Markup:
    """Draw the end of a context, what followed, and a forecast with its bands; the teacher's median dashed."""
    width, height, left, top, right, bottom = 420, 190, 40, 10, 6, 24
    target, levels = forecast["target"], forecast["levels"]
    shown = min(len(forecast["context"]), max(2 * len(target), 24))
    context = forecast["context"][-shown:]
    stamps = forecast["context_timestamps"][-shown:] + forecast["target_timestamps"]
    quantiles = {round(level, 6): row for level, row in zip(levels, forecast["models"][model], strict=True)}
    bands = [(quantiles[low], quantiles[high]) for low, high in BANDS if low in quantiles and high in quantiles]
    median = quantiles[0.5]
    teacher_median = forecast["models"][teacher][levels.index(0.5)] if teacher else []

    drawn = [*context, *target, *median, *teacher_median, *(value for band in bands for row in band for value in row)]
    numbers = [value for value in drawn if value is not None and math.isfinite(value)] or [0.0]
    pad = (max(numbers) - min(numbers)) * 0.05 or 1.0
    y = Axis(low=min(numbers) - pad, high=max(numbers) + pad, start=height - bottom, stop=top)
    x = Axis(low=0, high=shown + len(target) - 1, start=left, stop=width - right)
    parts = _y_axis(y, left=left, right=width - right)
    cut = x(shown - 0.5)
    parts.append(f'<line class="cutoff" x1="{cut:.1f}" x2="{cut:.1f}" y1="{top}" y2="{height - bottom}"/>')
    for number, (low, high) in enumerate(bands):
        parts.append(f'<path class="band band-{number}" d="{_area(low, high, x=x, y=y, first=shown)}"/>')
    parts.append(_line("context", context, x=x, y=y))
    last = [context[-1]] if context else []
    if teacher_median:
        parts.append(_line("teacher", teacher_median, x=x, y=y, first=shown))
    parts.append(_line("median", median, x=x, y=y, first=shown))
    parts.append(_line("target", [*last, *target], x=x, y=y, first=shown - len(last)))
    span = pd.Timestamp(stamps[-1]) - pd.Timestamp(stamps[0])
    form = "%b %Y" if span.days > 730 else "%d %b" if span.days > 6 else "%d %b %H:%M"
    for place, index, anchor in ((left, 0, "start"), (cut, shown, "middle"), (width - right, -1, "end")):
        text = pd.Timestamp(stamps[index]).strftime(form)
        if index != shown or width - right - cut > 1.6 * TEXT_WIDTH * len(text):
            parts.append(f'<text x="{place:.1f}" y="{height - 7}" text-anchor="{anchor}">{text}</text>')
    title = f"forecast of {forecast['item_id']}, {forecast['domain']}"
    return _svg(parts, width=width, height=height, title=title, name="forecast")


def curve_chart(curve: Mapping[str, Any]) -> Markup:
    """Draw the training loss and the validation loss by step."""
    series = [("loss", curve.get("step") or [], curve.get("loss") or [])]
    series.append(("eval", curve.get("eval_step") or [], curve.get("eval_loss") or []))
    known = [loss for _, steps, losses in series for _, loss in zip(steps, losses, strict=True) if is_number(loss)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    return _steps_chart(series, bounds=(low - 0.04 * (high - low), high), title="loss by training step")


def entropy_chart(curve: Mapping[str, Any]) -> Markup | None:
    """Draw the router entropy of each MoE layer by step, 1 where all experts are equally probable.

    A curve holds entropies in nats, and the load of each expert, which tells how many there are. None where it holds
    no entropies.
    """
    if not curve.get("entropy") or not curve.get("load"):
        return None
    most = [math.log(max(2, len(load))) for load in curve["load"][0]]
    series = []
    for layer, certain in enumerate(most):
        values = [entropies[layer] for entropies in curve["entropy"]]
        share = [value / certain if is_number(value) else None for value in values]
        series.append((f"layer layer-{layer % COLOURS}", curve["step"], share))
    least = min((value for _, _, values in series for value in values if value is not None), default=0.0)
    return _steps_chart(series, bounds=(0.5 if least >= 0.5 else 0.0, 1.0), title="router entropy by training step")


def confidence_chart(bins: Sequence[Mapping[str, Number]]) -> Markup:
    """Draw the error of the mixture and of its best expert in hindsight by how sure the router is."""
    width, height, left, top, right, bottom = 360, 190, 40, 10, 14, 40
    errors = [part[name] for part in bins for name in ("SQL", "best_SQL")]
    pad = 0.1 * (max(errors) - min(errors)) or 0.05
    y = Axis(low=min(errors) - pad, high=max(errors) + pad, start=height - bottom, stop=top)
    x = Axis(low=0, high=max(1, len(bins) - 1), start=left + 22, stop=width - right - 22)
    parts = _y_axis(y, left=left, right=width - right)
    for place, part in enumerate(bins):
        label = f"{part['low']:.2f}–{part['high']:.2f}"
        parts.append(f'<text x="{x(place):.1f}" y="{height - 24}" text-anchor="middle">{label}</text>')
    parts.append(f'<text class="title" x="{width - right}" y="{height - 6}" text-anchor="end">Confidence</text>')
    for name, line in (("best_SQL", "teacher"), ("SQL", "median")):
        places = [(x(place), y(part[name])) for place, part in enumerate(bins)]
        parts.append(f'<path class="{line}" d="{_path(places)}"/>')
        parts += [f'<circle class="{line}" cx="{px:.1f}" cy="{py:.1f}" r="3"/>' for px, py in places]
    return _svg(parts, width=width, height=height, title="error by confidence of the router", name="forecast")


def _steps_chart(
    series: Sequence[tuple[str, Sequence[Number], Values]], *, bounds: tuple[Number, Number], title: str
) -> Markup:
    """Draw values by training step, one line for each class name; those of ``eval`` with dots."""
    width, height, left, top, right, bottom = 360, 170, 40, 10, 10, 24
    known = [step for _, steps, values in series for step, value in zip(steps, values, strict=True) if is_number(value)]
    y = Axis(low=bounds[0], high=bounds[1], start=height - bottom, stop=top)
    x = Axis(low=0, high=max(known, default=0), start=left, stop=width - right)
    parts = _y_axis(y, left=left, right=width - right, count=3)
    for tick in x.ticks(3):
        parts.append(f'<text x="{x(tick):.1f}" y="{height - 7}" text-anchor="middle">{compact(tick)}</text>')
    for name, steps, values in series:
        places = [(x(s), y(v)) for s, v in zip(steps, values, strict=True) if v is not None and math.isfinite(v)]
        if places:
            parts.append(f'<path class="{name}" d="{_path(places)}"/>')
        if name == "eval":
            parts += [f'<circle class="eval" cx="{px:.1f}" cy="{py:.1f}" r="2.4"/>' for px, py in places]
    return _svg(parts, width=width, height=height, title=title, name="curve")


def _svg(parts: Iterable[str], *, width: int, height: int, title: str, name: str) -> Markup:
    head = f'<svg class="{name}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
    return Markup(head + "".join(parts) + "</svg>")


def _mark(place: Number, text: str, name: str, *, above: bool = False) -> str:
    line = f'<line class="{name}" x1="{place:.1f}" x2="{place:.1f}" y1="12" y2="32"/>'
    height = 9 if above else 45
    return f'{line}<text class="{name}" x="{place:.1f}" y="{height}" text-anchor="middle">{escape(text)}</text>'


def _y_axis(axis: Axis, *, left: Number, right: Number, count: int = 4) -> list[str]:
    parts = []
    for tick in axis.ticks(count):
        place = axis(tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{place + 3.5:.1f}" text-anchor="end">{compact(tick)}</text>')
    return parts


def _label(
    name: str,
    x: Number,
    y: Number,
    *,
    gap: int,
    taken: list[tuple[Number, Number, Number, Number]],
    inside: tuple[Number, Number, Number, Number],
) -> list[str]:
    """Write a name next to a dot, where nothing else is; nowhere if there is no such place."""
    wide = TEXT_WIDTH * len(name)
    corner = gap - 2
    beside = ((gap, 4, 0.0), (-gap, 4, 1.0), (0, -gap, 0.5), (0, gap + 8, 0.5))
    for dx, dy, anchor in (*beside, (corner, -corner, 0.0), (-corner, gap + 6, 1.0)):
        start = x + dx - anchor * wide
        box = (start, y + dy - 10, start + wide, y + dy + 3)
        within = box[0] > inside[0] and box[1] > inside[1] and box[2] < inside[2] and box[3] < inside[3]
        if within and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            side = {0.0: "start", 0.5: "middle", 1.0: "end"}[anchor]
            return [f'<text class="name" x="{x + dx:.1f}" y="{y + dy:.1f}" text-anchor="{side}">{escape(name)}</text>']
    return []


def _overlap(a: tuple[Number, Number, Number, Number], b: tuple[Number, Number, Number, Number]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _path(places: Sequence[tuple[Number, Number]]) -> str:
    start, *rest = (f"{x:.1f} {y:.1f}" for x, y in places)
    return f"M{start}" + ("".join(f"L{place}" for place in rest) or "h0")


def _line(name: str, values: Values, *, x: Axis, y: Axis, first: int = 0) -> str:
    """Draw values by step, broken where one is missing; a value between two gaps is a dot."""
    runs: list[list[tuple[Number, Number]]] = [[]]
    for step, value in enumerate(values, start=first):
        if value is not None and math.isfinite(value):
            runs[-1].append((x(step), y(value)))
        elif runs[-1]:
            runs.append([])
    return f'<path class="{name}" d="{"".join(_path(run) for run in runs if run)}"/>'


def _area(low: Values, high: Values, *, x: Axis, y: Axis, first: int) -> str:
    both = [(step, a, b) for step, (a, b) in enumerate(zip(low, high, strict=True), start=first)]
    known = [(x(step), y(a), y(b)) for step, a, b in both if a is not None and b is not None]
    edge = [(px, a) for px, a, _ in known] + [(px, b) for px, _, b in reversed(known)]
    return _path(edge) + "Z" if edge else ""
