"""A run folder with made-up numbers for tests of the report, and a reader of the page."""

import json
from html.parser import HTMLParser

import numpy as np
import pandas as pd

DOMAINS = {"electricity": ("h", 24), "traffic": ("h", 24), "weather": ("D", 365), "web": ("D", 7)}
QUALITY = {
    ("mixture K=2", "mixture"): 0.62,
    ("mixture K=1", "mixture"): 0.65,
    ("generalist", "generalist"): 0.64,
    ("average of experts", "average"): 0.68,
    **{(f"single {domain}", "single"): 0.75 + 0.02 * place for place, domain in enumerate(DOMAINS)},
    **{(f"expert {domain}", "expert"): 0.70 + 0.01 * place for place, domain in enumerate(DOMAINS)},
    ("teacher", "teacher"): 0.58,
    ("oracle", "oracle"): 0.55,
    ("seasonal naive", "naive"): 1.0,
}
SCALES = {"WQL": 0.1, "MASE": 1.2, "MAE": 340.0, "MSE": 1e5, "MAPE": 0.2, "SQL": 1.0}


def make_records(rng, horizons=(24,), quality=QUALITY):
    """Make up errors of models around their quality."""
    for (model, kind), good in quality.items():
        for horizon in horizons:
            for metric, scale in SCALES.items():
                shared = {"model": model, "kind": kind, "horizon": horizon, "metric": metric}
                yield {**shared, "domain": "overall", "value": good * rng.uniform(0.98, 1.02)}
                for domain in DOMAINS:
                    yield {**shared, "domain": domain, "value": scale * good * rng.uniform(0.85, 1.15)}
            for domain in ("overall", *DOMAINS):
                shared = {"model": model, "kind": kind, "horizon": horizon, "metric": "coverage80"}
                yield {**shared, "domain": domain, "value": rng.uniform(0.7, 0.85)}


def make_forecast(rng, domain, item_id="item 1", horizon=24, length=96):
    """Make up a window and two forecasts of it."""
    freq, season = DOMAINS[domain]
    step = np.arange(length + horizon)
    values = 100 + 30 * np.sin(2 * np.pi * step / min(season, 30)) + rng.normal(0, 6, size=len(step))
    values = [float(value) for value in values]
    stamps = [stamp.isoformat() for stamp in pd.date_range("2024-03-01", periods=len(step), freq=freq)]
    context: list[float | None] = list(values[:length])
    context[length - 20 : length - 12] = [None] * 8
    levels = [0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99]
    median = np.array(values[length:]) + rng.normal(0, 4, size=horizon)
    spread = np.linspace(4, 16, horizon)
    quantiles = [list(median + spread * 4 * (level - 0.5)) for level in levels]
    teacher = [list(np.array(row) + 3) for row in quantiles]
    return {
        "domain": domain,
        "item_id": item_id,
        "freq": freq,
        "context_timestamps": stamps[:length],
        "context": context,
        "target_timestamps": stamps[length:],
        "target": values[length:],
        "levels": levels,
        "models": {"mixture K=2": quantiles, "teacher": teacher},
        "experts": [domain, "web"],
        "gates": [0.71, 0.29],
    }


def make_run(folder, *, only_evaluation=False, horizons=(24,)):
    """Make up the files of a run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    records = list(make_records(rng, horizons))
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if only_evaluation:
        return records
    claims = [
        ("Mixture K=2 against the average single", "WQL", 0.803, 0.781, 0.832, "at most 0.90", 0.9),
        ("Mixture K=2 against the generalist", "WQL", 0.969, 0.935, 1.004, "lower, interval excludes 1", 1.0),
        ("Mixture K=2 against the simple average of all experts", "WQL", 0.912, 0.89, 0.93, "lower", 1.0),
        ("Mixture K=2 against singles on an unseen domain", "MAE", 1.041, 1.002, 1.09, "at most 0.90", 0.9),
        ("Mixture K=2 against the teacher", "WQL", 1.069, 1.05, 1.091, None, None),
        ("Mixture K=2 against the teacher", "throughput", 5.8, 5.4, 6.2, "at least 5x", 5.0),
    ]
    names = ("claim", "metric", "ratio", "low", "high", "target", "target_ratio")
    write(folder / "intervals.json", [dict(zip(names, claim, strict=True)) for claim in claims])
    costs = []
    for (model, kind), _ in QUALITY.items():
        if kind in ("naive", "oracle"):
            continue
        every, active, slow = {
            "teacher": (4.9e6, 4.9e6, 12.0),
            "mixture": (4.4e6, 2.3e6, 3.4),
            "average": (4.4e6, 4.4e6, 6.0),
        }.get(kind, (1.1e6, 1.1e6, 1.6))
        slow *= rng.uniform(0.95, 1.05)
        costs.append(
            {
                "model": model,
                "kind": kind,
                "parameters": int(every),
                "active_parameters": int(active),
                "flops": int(active * 70),
                "latency_p50_ms": slow,
                "latency_p95_ms": slow * 1.3,
                "throughput": 2500 / slow,
                "checkpoint_mb": every * 4e-6,
                "threads": 1,
                "batch_size": 64,
            }
        )
    write(folder / "efficiency.json", costs)
    shares = rng.dirichlet(np.ones(len(DOMAINS)) * 0.3 + 0, size=len(DOMAINS)) * 0.5 + np.eye(len(DOMAINS)) * 0.5
    routing = {
        domain: {"share": list(row), "gate": list(np.sqrt(row / 2)), "entropy": float(rng.uniform(0.2, 0.7))}
        for domain, row in zip(DOMAINS, shares, strict=True)
    }
    write(folder / "routing.json", {"experts": list(DOMAINS), "domains": routing})
    write(folder / "forecasts.json", [make_forecast(rng, domain) for domain in DOMAINS])
    step = np.arange(0, 1200, 10)
    curves = {
        name: {
            "step": step.tolist(),
            "loss": (2 + 6 * np.exp(-step / 150) + rng.normal(0, 0.15, size=len(step))).tolist(),
            "eval_step": step[::10].tolist(),
            "eval_loss": (2.1 + 5.8 * np.exp(-step[::10] / 160)).tolist(),
        }
        for name in ("generalist", "expert electricity", "expert traffic", "expert weather", "expert web", "router")
    }
    write(folder / "curves.json", curves)
    machine = {"cores": 2, "threads": 2, "torch": "2.13.0", "chronos": "2.3.2", "python": "3.11.9"}
    seconds = {"windows": 6.2, "soft targets": 71.0, "generalist": 154.0, "experts": 160.4, "router": 14.1}
    run = {"name": "demo", "seconds": seconds, "machine": machine, "command": "chronomoe run demo --out runs/demo"}
    write(folder / "run.json", run)
    (folder / "config.yaml").write_text("name: demo\ntop_k: 2\nstudent:\n  num_layers: 1\n")
    return records


def write(path, content):
    path.write_text(json.dumps(content))


ROUTE_QUALITY = {
    ("upcycled", "upcycled"): 0.60,
    ("expanded", "expanded"): 0.63,
    ("generalist-wide", "generalist"): 0.635,
    ("generalist-base", "generalist"): 0.66,
}
EXPERTS = {"upcycled": (8, 2, (0, 2, 3)), "expanded": (4, 1, (2,))}
PLACES = ("oldest third", "middle third", "latest third", "register", "forecast")


def add_routes(folder):
    """Add what routes 2 and 3 leave to a made-up run of route 1."""
    rng = np.random.default_rng(1)
    with (folder / "evaluation.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in make_records(rng, quality=ROUTE_QUALITY))
    costs = json.loads((folder / "efficiency.json").read_text())
    active = {"parameters": 4_403_200, "active_parameters": 2_310_144, "flops": 161_000_000, "checkpoint_mb": 17.6}
    times = {"latency_p50_ms": 3.1, "latency_p95_ms": 4.0, "throughput": 810.0, "threads": 1, "batch_size": 64}
    costs += [{**active, **times, "model": model, "kind": kind} for model, kind in ROUTE_QUALITY]
    write(folder / "efficiency.json", costs)
    write(folder / "routes.json", make_comparison())
    write(folder / "validation.json", {"rows": make_validation(rng)})
    write(folder / "expansion.json", EXPANSION)
    write(folder / "moe.json", {name: make_layers(rng, *shape) for name, shape in EXPERTS.items()})
    curves = json.loads((folder / "curves.json").read_text())
    curves |= {name: make_moe_curve(rng, len(blocks), experts) for name, (experts, _, blocks) in EXPERTS.items()}
    write(folder / "curves.json", curves)


def make_comparison():
    """Every route against a wide generalist."""

    def interval(name, value, half):
        return {name: value, "low": value - half, "high": value + half}

    sizes = {"parameters": 4_403_200, "active_parameters": 2_310_144, "flops": 1.61e8, "training": 0.98}
    rows = [
        {**sizes, "model": "mixture K=2", "kind": "mixture", "wql": interval("ratio", 0.95, 0.02)},
        {**sizes, "model": "upcycled", "kind": "upcycled", "wql": interval("ratio", 0.99, 0.02)},
        {**sizes, "model": "expanded", "kind": "expanded", "wql": interval("ratio", 1.04, 0.02)},
        {**sizes, "model": "generalist-wide", "kind": "generalist", "wql": None, "mae": None, "validation": None},
    ]
    for row, gap in zip(rows[:-1], (-0.021, -0.012, 0.004), strict=True):
        row["mae"] = interval("ratio", row["wql"]["ratio"] + 0.01, 0.03)
        row["validation"] = interval("difference", gap, 0.009)
    return {"rows": rows, "against": "generalist-wide"}


def make_validation(rng):
    """Losses of two models and of their rivals, by domain."""
    rows = []
    for model, against in (("upcycled", "generalist-wide"), ("expanded", "generalist-base")):
        for domain in ("overall", *DOMAINS):
            loss, gap = rng.uniform(0.25, 0.5), rng.uniform(-0.02, 0.01)
            shared = {"model": model, "against": against, "domain": domain, "loss": loss, "against_loss": loss - gap}
            rows.append({**shared, "difference": gap, "low": gap - 0.006, "high": gap + 0.006})
    return rows


EXPANSION = [
    {
        "layer": 0,
        "after": 2,
        "probes": [{"after": place, "validation": 0.4213 - 0.003 * place} for place in range(3)],
        "before": 0.4302,
        "validation": 0.4102,
        "kept": True,
        "steps": 1200,
    },
    {
        "layer": 1,
        "after": 0,
        "probes": [{"after": place, "validation": 0.4105 + 0.002 * place} for place in range(3)],
        "before": 0.4102,
        "validation": 0.4111,
        "kept": False,
        "steps": 1200,
    },
]


def make_layers(rng, experts, top_k, blocks):
    """Choices of every layer; the last block has no tokens but those of the forecast."""

    def draw(even):
        return rng.dirichlet(np.full(experts, even)).tolist()

    layers = []
    for block in blocks:
        places = PLACES if block < max(blocks) or len(blocks) == 1 else PLACES[-1:]
        layers.append(
            {
                "block": block,
                "num_experts": experts,
                "top_k": top_k,
                "load": draw(30),
                "entropy": float(rng.uniform(0.7, 0.95)),
                "domains": {domain: draw(3) for domain in DOMAINS},
                "positions": {place: draw(6) for place in places},
            }
        )
    return {"layers": layers, "least_share": min(min(layer["load"]) * experts for layer in layers)}


def make_moe_curve(rng, layers, experts):
    """Training curve with the routers' entropies, in nats, and the load of each expert."""
    step = np.arange(0, 800, 10)
    sure = [np.exp(-step / 900) * (0.98 - 0.05 * layer) + rng.normal(0, 0.01, len(step)) for layer in range(layers)]
    return {
        "step": step.tolist(),
        "loss": (2 + 4 * np.exp(-step / 120) + rng.normal(0, 0.1, len(step))).tolist(),
        "eval_step": step[::10].tolist(),
        "eval_loss": (2.1 + 3.9 * np.exp(-step[::10] / 120)).tolist(),
        "entropy": (np.stack(sure, axis=1) * np.log(experts)).tolist(),
        "load": rng.dirichlet(np.ones(experts), size=(len(step), layers)).tolist(),
    }


class Reader(HTMLParser):
    """Collects tables as text, attributes, and whether every tag is closed."""

    def __init__(self):
        super().__init__()
        self.tables, self.attributes, self.open, self.tags = [], [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert not reader.open
    return reader
