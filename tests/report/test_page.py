import html
import json
import re
from statistics import fmean

import numpy as np
import pytest

from chronomoe.errors import InputError
from chronomoe.report.claims import Claim
from chronomoe.report.page import markdown_cell, write_report
from chronomoe.report.tables import KINDS
from report_run import DOMAINS, QUALITY, add_routes, make_forecast, make_run, read, write


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


@pytest.mark.parametrize("kinds", [("upcycled", "expanded"), ("expanded",)])
def test_without_a_mixture_the_headline_is_about_the_next_route(tmp_path, kinds):
    make_run(tmp_path)
    add_routes(tmp_path)
    (tmp_path / "routing.json").unlink()
    keep = {*kinds, "generalist", "teacher", "naive"}
    records = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    lines = [json.dumps(record) + "\n" for record in records if record["kind"] in keep]
    (tmp_path / "evaluation.jsonl").write_text("".join(lines))
    text = write_report(tmp_path).read_text()
    assert f'<p class="facts-of"><b>{kinds[0]}</b>' in text
    assert 'id="routing"' not in text
    assert "“average single”" not in text


def test_a_forecast_without_a_mixture_is_that_of_the_next_route(tmp_path):
    make_run(tmp_path)
    forecast = make_forecast(np.random.default_rng(0), "web")
    del forecast["experts"], forecast["gates"]
    quantiles = forecast["models"]["mixture K=2"]
    models = {"teacher": forecast["models"]["teacher"], "expanded": quantiles, "upcycled": quantiles}
    write(tmp_path / "forecasts.json", [{**forecast, "models": models}])
    text = write_report(tmp_path).read_text()
    assert "median of upcycled" in text
    assert "median of the teacher" in text
    assert "<small>experts:" not in text
    write(tmp_path / "forecasts.json", [{**forecast, "models": {"expanded": quantiles}}])
    text = write_report(tmp_path).read_text()
    assert "median of expanded" in text
    assert "median of the teacher" not in text


def test_every_kind_has_its_colour(tmp_path):
    make_run(tmp_path)
    text = write_report(tmp_path).read_text()
    for kind in KINDS:
        assert text.count(f"--{kind}: #") == 2  # light and dark
        assert f".kind-{kind} {{" in text


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


def test_a_claim_in_two_metrics_is_named_once(tmp_path):
    make_run(tmp_path)
    ratio = {"claim": "A against B", "ratio": 0.9}
    write(tmp_path / "intervals.json", [{**ratio, "metric": "WQL"}, {**ratio, "metric": "MAE"}])
    text = write_report(tmp_path).read_text()
    assert text.count("<strong>A against B</strong>") == 1
    assert "10.0% lower WQL" in text
    assert "10.0% lower MAE" in text
    assert (tmp_path / "report.md").read_text().count("A against B") == 2


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
