import html
import json
import re
from html.parser import HTMLParser
from statistics import fmean

import numpy as np
import pandas as pd
import pytest

from chronomoe.errors import InputError
from chronomoe.evaluation.claims import Claim
from chronomoe.evaluation.report import markdown_cell, write_report

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


def make_records(rng, horizons=(24,)):
    for (model, kind), quality in QUALITY.items():
        for horizon in horizons:
            for metric, scale in SCALES.items():
                shared = {"model": model, "kind": kind, "horizon": horizon, "metric": metric}
                yield {**shared, "domain": "overall", "value": quality * rng.uniform(0.98, 1.02)}
                for domain in DOMAINS:
                    yield {**shared, "domain": domain, "value": scale * quality * rng.uniform(0.85, 1.15)}
            for domain in ("overall", *DOMAINS):
                shared = {"model": model, "kind": kind, "horizon": horizon, "metric": "coverage80"}
                yield {**shared, "domain": domain, "value": rng.uniform(0.7, 0.85)}


def make_forecast(rng, domain, item_id="item 1", horizon=24, length=96):
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


def test_a_full_run_shows_every_section(tmp_path):
    make_run(tmp_path)
    page = write_report(tmp_path)
    assert page == tmp_path / "report.html"
    text = page.read_text()
    for section in (
        "claims",
        "overall",
        "domains",
        "routing",
        "scatter",
        "forecasts",
        "curves",
        "cost",
        "time",
        "repeat",
    ):
        assert f'id="{section}"' in text
        assert f'href="#{section}"' in text
    assert text.count('<svg class="forecast"') == len(DOMAINS)
    assert "chronomoe run demo --out runs/demo" in text
    assert f"{len(QUALITY)} models on {len(DOMAINS)} domains" in text
    assert "  num_layers: 1\n" in text


def test_the_page_needs_nothing_else(tmp_path):
    make_run(tmp_path)
    page = write_report(tmp_path)
    reader = read(page)
    assert not {"script", "link", "img", "iframe", "object", "base"} & reader.tags
    assert all(value.startswith("#") for name, value in reader.attributes if name in ("href", "src", "xlink:href"))
    assert not re.search(r"https?://|url\(|@import|@font-face", page.read_text())


def test_sections_without_their_file_are_left_out(tmp_path):
    make_run(tmp_path, only_evaluation=True)
    text = write_report(tmp_path).read_text()
    assert re.findall(r'<h2 id="(\w+)"', text) == ["overall", "domains"]
    assert re.findall(r"^## (.*)$", (tmp_path / "report.md").read_text(), re.M) == [
        "Accuracy overall",
        "Accuracy by domain",
    ]


def test_numbers_of_the_tables_are_those_of_the_records(tmp_path):
    records = make_run(tmp_path)
    overall, by_domain = read(write_report(tmp_path)).tables[:2]
    value = {(r["model"], r["domain"], r["metric"]): r["value"] for r in records}
    assert overall[0] == ["Model", "WQL", "MASE", "MAE", "MSE", "MAPE", "SQL", "Coverage of 80%"]
    rows = {model: next(row for row in overall if row[0].startswith(model)) for model, _ in QUALITY}
    for model, row in rows.items():
        for column, metric in enumerate(overall[0][1:-1], start=1):
            assert row[column] == f"{value[model, 'overall', metric]:.3f}"
        assert row[-1] == f"{value[model, 'overall', 'coverage80']:.1%}"
    for row in by_domain[1:]:
        for domain, text in zip(by_domain[0][1:], row[1:], strict=True):
            key = next((key for key in value if row[0].startswith(key[0]) and key[1:] == (domain, "WQL")), None)
            if key:
                assert float(text) == pytest.approx(value[key], abs=1e-4)


def test_the_headline_is_about_the_mixture_whose_cost_is_known(tmp_path):
    make_run(tmp_path)
    costs = json.loads((tmp_path / "efficiency.json").read_text())
    write(tmp_path / "efficiency.json", [cost for cost in costs if cost["model"] != "mixture K=2"])
    assert '<p class="facts-of"><b>mixture K=1</b>' in write_report(tmp_path).read_text()


def test_the_average_single_is_the_mean_of_the_singles(tmp_path):
    records = make_run(tmp_path)
    overall = read(write_report(tmp_path)).tables[0]
    singles = [
        r["value"] for r in records if r["kind"] == "single" and r["domain"] == "overall" and r["metric"] == "MAE"
    ]
    row = next(row for row in overall if row[0].startswith("average single"))
    assert row[overall[0].index("MAE")] == f"{fmean(singles):.3f}"


def test_both_reports_hold_the_same_tables(tmp_path):
    make_run(tmp_path)
    page = read(write_report(tmp_path)).tables
    lines = (tmp_path / "report.md").read_text().replace("**", "").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    for table in page:
        for row in table[1:]:
            assert any(cells[-len(row[1:]) :] == row[1:] and row[0].startswith(cells[0]) for cells in rows), row
    assert all("| --- |" in line for line in lines if line.startswith("| ---"))


def test_the_best_value_is_marked_apart_from_teacher_and_oracle(tmp_path):
    make_run(tmp_path)
    write_report(tmp_path)
    lines = (tmp_path / "report.md").read_text().splitlines()
    rows = {line.split("|")[1].strip(): line for line in lines[: lines.index("## Accuracy by domain")] if "|" in line}
    assert "**" in rows["mixture K=2"]
    assert "**" not in rows["teacher"].rsplit("|", 2)[0]
    assert "**" not in rows["oracle"].rsplit("|", 2)[0]


def test_odd_names_are_shown_as_they_are(tmp_path):
    odd = '<script>alert("1")</script> | a_b & *c*'
    make_run(tmp_path)
    record = {"model": odd, "kind": "mixture", "domain": "overall", "horizon": 24, "metric": "WQL", "value": 0.5}
    with (tmp_path / "evaluation.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    forecast = make_forecast(np.random.default_rng(0), "web", item_id=odd)
    write(tmp_path / "forecasts.json", [{**forecast, "experts": [odd], "gates": [1.0]}])
    write(tmp_path / "curves.json", {odd: {"step": [0, 1], "loss": [2.0, 1.0]}})
    reader = read(write_report(tmp_path))
    assert "script" not in reader.tags
    assert any(row[0].startswith(odd) for row in reader.tables[0])
    line = next(line for line in (tmp_path / "report.md").read_text().splitlines() if "alert" in line)
    assert len(re.findall(r"(?<!\\)\|", line)) == 10  # kind, seven metrics and both ends
    assert "<script" not in line


def test_markdown_of_a_name_is_one_plain_cell():
    assert markdown_cell("a|b\n<i> *c*") == "a\\|b &lt;i> \\*c\\*"


@pytest.mark.parametrize(
    ("ratio", "low", "high", "target", "verdict"),
    [
        (0.87, 0.84, 0.90, 0.9, "met"),
        (0.89, 0.86, 0.92, 0.9, "open"),
        (0.91, 0.88, 0.94, 0.9, "not met"),
        (0.97, 0.94, 0.99, 1.0, "met"),
        (0.97, 0.94, 1.00, 1.0, "open"),
        (0.97, 0.94, 1.01, 1.0, "open"),
        (0.89, None, None, 0.9, "met"),
        (0.89, 0.86, 0.92, None, ""),
    ],
)
def test_a_claim_is_met_when_its_whole_interval_is(ratio, low, high, target, verdict):
    claim = Claim(claim="", metric="WQL", ratio=ratio, low=low, high=high, target_ratio=target)
    assert claim.verdict == verdict


def test_more_throughput_is_better():
    claim = Claim(claim="", metric="throughput", ratio=5.8, low=5.1, high=6.2, target_ratio=5.0)
    assert (claim.verdict, claim.effect) == ("met", "5.8× the throughput")
    assert Claim(claim="", metric="throughput", ratio=4.8, low=4.1, high=5.2, target_ratio=5.0).verdict == "not met"


def test_a_missed_claim_is_shown_as_plainly_as_a_met_one(tmp_path):
    make_run(tmp_path)
    text = write_report(tmp_path).read_text()
    chips = re.findall(r'<span class="chip ([\w-]+)">([\w ]+)</span>', text)
    assert chips == [("met", "Met"), ("open", "Open"), ("met", "Met"), ("not-met", "Not met"), ("met", "Met")]
    assert "4.1% higher MAE" in html.unescape(text)


def test_each_horizon_has_its_tables(tmp_path):
    make_run(tmp_path, horizons=(24, 96))
    text = write_report(tmp_path).read_text()
    assert "<h3>Horizon 24</h3>" in text
    assert "<h3>WQL, horizon 96</h3>" in text


def test_domains_may_have_horizons_of_their_own(tmp_path):
    records = make_run(tmp_path)
    for record in records:
        record["horizon"] = 7 if record["domain"] == "web" else 24
    (tmp_path / "evaluation.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tables = read(write_report(tmp_path)).tables
    assert "–" not in str(tables)
    assert [table for table in tables if table[0][1:] == ["web"]]
    assert "horizon 7, 24." in (tmp_path / "report.html").read_text()


def test_records_without_overall_values_still_make_a_report(tmp_path):
    records = [record for record in make_run(tmp_path) if record["domain"] != "overall"]
    (tmp_path / "evaluation.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = write_report(tmp_path).read_text()
    assert 'id="domains"' in text
    assert 'id="overall"' not in text


def test_a_forecast_of_gaps_and_a_flat_series_are_drawn(tmp_path):
    make_run(tmp_path)
    forecast = make_forecast(np.random.default_rng(0), "web")
    forecast["context"] = [None] * len(forecast["context"])
    forecast["target"] = [0.0] * len(forecast["target"])
    forecast["models"] = {"mixture K=2": [[0.0] * len(forecast["target"])] * len(forecast["levels"])}
    write(tmp_path / "forecasts.json", [forecast])
    text = write_report(tmp_path).read_text()
    assert '<path class="median" d="M' in text
    assert "nan" not in re.findall(r'<svg class="forecast".*?</svg>', text)[0].lower()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "evaluation.jsonl").unlink(), "needs evaluation.jsonl"),
        (lambda folder: (folder / "evaluation.jsonl").write_text(""), "no record"),
        (lambda folder: (folder / "evaluation.jsonl").write_text('{"model": "a"\n'), "line 1: not JSON"),
        (lambda folder: (folder / "evaluation.jsonl").write_text('{"model": "a"}\n'), "record 1: kind, domain"),
        (lambda folder: write(folder / "intervals.json", [{"claim": "a"}]), "record 1: metric, ratio missing"),
    ],
)
def test_a_spoilt_run_is_refused_and_nothing_is_written(tmp_path, spoil, message):
    make_run(tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError, match=message):
        write_report(tmp_path)
    assert not list(tmp_path.glob("report.*"))


def test_an_unknown_kind_is_refused_with_the_nearest(tmp_path):
    make_run(tmp_path)
    with (tmp_path / "evaluation.jsonl").open("a") as file:
        file.write('{"model": "a", "kind": "experts", "domain": "b", "horizon": 1, "metric": "WQL", "value": 1}\n')
    with pytest.raises(InputError, match="Did you mean 'expert'"):
        write_report(tmp_path)
