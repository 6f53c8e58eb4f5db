"""The report of tiny runs, and of what their files could hold besides."""

import html
import re

import pytest

from chronomoe.errors import InputError
from chronomoe.evaluation.comparison import KINDS
from chronomoe.report.claims import Claim
from chronomoe.report.page import markdown_cell, write_report
from chronomoe.report.words import when_another
from report_reader import load, load_lines, read, results_of, write, write_lines

SECTIONS = ["claims", "recommendation", "scatter", "overall", "domains", "routing", "forecasts", "curves", "cost"]


@pytest.fixture
def run_folder(finished_run, tmp_path):
    """The results of a tiny run of route 1, free to be changed."""
    return results_of(finished_run, tmp_path / "tiny")


@pytest.fixture
def grown_folder(grown_run, tmp_path):
    """The results of a tiny run of routes 2 and 3, free to be changed."""
    return results_of(grown_run, tmp_path / "grown")


def test_a_run_shows_every_section_claims_first(run_folder):
    page = write_report(run_folder)
    text = page.read_text()
    assert page == run_folder / "report.html"
    assert re.findall(r'<h2 id="([\w-]+)"', text) == [*SECTIONS, "time", "repeat"]
    assert all(f'href="#{section}"' in text for section in SECTIONS)
    assert "power, sales" in text
    assert "num_layers: 1\n" in text


def test_the_page_needs_nothing_else(run_folder):
    page = write_report(run_folder)
    reader = read(page)
    assert not {"script", "link", "img", "iframe", "object", "base"} & reader.tags
    assert all(value.startswith("#") for name, value in reader.attributes if name in ("href", "src", "xlink:href"))
    assert not re.search(r"https?://|url\(|@import|@font-face", page.read_text())


def test_sections_without_their_file_are_left_out(run_folder):
    for path in run_folder.iterdir():
        if path.name != "evaluation.jsonl":
            path.unlink()
    text = write_report(run_folder).read_text()
    assert re.findall(r'<h2 id="([\w-]+)"', text) == ["overall", "domains"]
    heads = re.findall(r"^## (.*)$", (run_folder / "report.md").read_text(), re.M)
    assert heads == ["Accuracy overall", "Accuracy by domain"]


def test_errors_stand_beside_what_they_take(run_folder):
    table = next(table for table in read(write_report(run_folder)).tables if "Experts" in table[0])
    assert table[0] == [
        *("Model", "Experts", "Active", "GFLOPs", "Training", "Core-s"),
        *("WQL", "SQL", "MASE", "MAE", "MSE", "MAPE", "Coverage", "Bias"),
    ]
    overall = {
        (record["model"], record["metric"]): record["value"]
        for record in load_lines(run_folder / "evaluation.jsonl")
        if record["domain"] == "overall"
    }
    costs = {cost["model"]: cost for cost in load(run_folder / "efficiency.json")}
    rows = {name: next(row for row in table if row[0].startswith(name)) for name in ("own single", "greedy portfolio")}
    for name, row in rows.items():
        assert row[1] == f"{costs[name]['experts']:.2f}"
        assert row[4] == f"{costs[name]['training']:.0%}"
        assert row[6:8] == [f"{overall[name, metric]:.3f}" for metric in ("WQL", "SQL")]


def test_singles_and_experts_one_by_one_are_folded_away(run_folder):
    text = write_report(run_folder).read_text()
    section = text[text.index('id="overall"') : text.index('id="domains"')]
    assert "single/power" not in section[: section.index("<details>")]
    assert "single/power" in section[section.index("<details>") :]


def test_the_recommendation_names_the_checkpoint_and_how_sure_it_is(run_folder):
    found = load(run_folder / "recommendation.json")
    text = html.unescape(write_report(run_folder).read_text())
    assert f"Deploy {found['model']}: it is the cheapest model whose validation error is within" in text
    assert f"In {found['sure']:.0%} of bootstrap draws" in text
    timed = {cost["model"] for cost in load(run_folder / "efficiency.json") if "latency_p50_ms" in cost}
    assert text.count('class="ring"') == 1 + (found["model"] in timed)  # against operations and against latency
    assert f"Deploy {found['model']}" in (run_folder / "report.md").read_text()


def test_unseen_domains_have_a_section_of_their_own(run_folder):
    assert "Unseen domains" not in write_report(run_folder).read_text()
    records = load_lines(run_folder / "evaluation.jsonl")
    unseen = [record | {"domain": record["domain"].replace("power", "solar")} for record in records]
    write_lines(run_folder / "held_out.jsonl", [record for record in unseen if record["domain"] != "sales"])
    text = write_report(run_folder).read_text()
    assert "Nothing was trained or chosen on solar." in text
    assert "## Unseen domains" in (run_folder / "report.md").read_text()


def test_the_best_and_the_worst_forecasts_are_shown_and_say_so(run_folder):
    text = write_report(run_folder).read_text()
    assert text.count('<svg class="forecast"') == 8 + 1  # two places, best and worst of two domains; confidence
    assert text.count(">Worst</span>") == text.count(">Best</span>") == 2


def test_without_a_mixture_the_headline_is_about_the_next_route(grown_folder):
    text = write_report(grown_folder).read_text()
    assert '<p class="facts-of"><b>upcycled</b>' in text
    assert "median of upcycled" in text
    assert "<small>experts:" not in text
    assert 'id="routing"' not in text
    assert 'id="growth"' in text
    assert 'id="layers"' in text


def test_every_kind_has_its_colour(run_folder):
    text = write_report(run_folder).read_text()
    for kind in KINDS:
        assert text.count(f"--{kind}: #") == 2  # light and dark
        assert f".kind-{kind} {{" in text


@pytest.mark.parametrize("name", ["finished_run", "grown_run"])
def test_both_reports_hold_the_same_tables(request, name, tmp_path):
    folder = results_of(request.getfixturevalue(name), tmp_path / "run")
    page = read(write_report(folder)).tables
    lines = re.sub(r"(?<!\\)\*+", "", (folder / "report.md").read_text()).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    for row in (row for table in page for row in table[1:]):
        assert any(cells[-len(row[1:]) :] == row[1:] and row[0].startswith(cells[0]) for cells in rows), row


@pytest.mark.parametrize("name", ["finished_run", "grown_run"])
def test_every_markdown_row_is_as_wide_as_its_head(request, name, tmp_path):
    folder = results_of(request.getfixturevalue(name), tmp_path / "run")
    write_report(folder)
    blocks = re.findall(r"(?:^\|.*\n)+", (folder / "report.md").read_text(), re.M)
    assert blocks
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block


def test_the_best_value_is_marked_apart_from_teacher_and_oracle(run_folder):
    write_report(run_folder)
    lines = (run_folder / "report.md").read_text()
    section = lines[lines.index("## Accuracy overall") : lines.index("## Accuracy by domain")].splitlines()
    rows = {line.split("|")[1].strip(): line for line in section if "|" in line}
    assert "**" in "".join(rows.values())
    assert "**" not in rows["teacher"] + rows["oracle over experts"]


def test_odd_names_are_shown_as_they_are(run_folder):
    odd = '<script>alert("1")</script> | a_b & *c*'
    records = load_lines(run_folder / "evaluation.jsonl")
    own = [record | {"model": odd, "kind": "mixture"} for record in records if record["model"] == "teacher"]
    write_lines(run_folder / "evaluation.jsonl", [*records, *own])
    forecast = load(run_folder / "forecasts.json")[0]
    write(run_folder / "forecasts.json", [forecast | {"item_id": odd, "experts": [odd], "gates": [1.0]}])
    write(run_folder / "curves.json", {odd: {"step": [0, 1], "loss": [2.0, 1.0]}})
    reader = read(write_report(run_folder))
    assert "script" not in reader.tags
    assert any(row[0].startswith(odd) for table in reader.tables for row in table)
    assert "<script" not in (run_folder / "report.md").read_text()


def test_markdown_of_a_name_is_one_plain_cell():
    assert markdown_cell("a | b\n<i>_c_</i>") == r"a \| b &lt;i>\_c\_&lt;/i>"


@pytest.mark.parametrize(
    ("ratio", "low", "high", "target", "verdict"),
    [
        (0.97, 0.94, 0.99, 0.98, "met"),
        (0.97, 0.94, 1.00, 0.98, "open"),
        (0.99, 0.96, 0.995, 0.98, "not met"),
        (0.99, 0.97, 0.999, 1.0, "met"),
        (1.01, 0.99, 1.02, 1.03, "met"),
        (1.01, 0.99, 1.04, 1.03, "open"),
        (0.89, None, None, 0.9, "met"),
        (0.89, 0.86, 0.92, None, ""),
    ],
)
def test_a_claim_is_met_when_it_reaches_its_target_and_excludes_a_tie(ratio, low, high, target, verdict):
    claim = Claim(claim="", metric="WQL", ratio=ratio, low=low, high=high, target_ratio=target)
    assert claim.verdict == verdict


def test_more_throughput_is_better():
    claim = Claim(claim="", metric="throughput", ratio=5.8, low=5.1, high=6.2, target_ratio=5.0)
    assert (claim.verdict, claim.effect) == ("met", "5.8× the throughput")
    assert Claim(claim="", metric="throughput", ratio=4.8, low=4.1, high=5.2, target_ratio=5.0).verdict == "not met"


def test_a_missed_claim_is_shown_as_plainly_as_a_met_one(run_folder):
    ratios = [(0.87, 0.84, 0.9), (0.97, 0.9, 1.02), (1.041, 1.002, 1.09)]
    claims = [
        {"claim": "A against B", "metric": "MAE", "ratio": ratio, "low": low, "high": high, "target_ratio": 1.0}
        for ratio, low, high in ratios
    ]
    write(run_folder / "intervals.json", claims)
    text = write_report(run_folder).read_text()
    section = text[text.index('id="claims"') : text.index('id="recommendation"')]
    chips = re.findall(r'<span class="chip ([\w-]+)">([\w ]+)</span>', section)
    assert chips == [("met", "Met"), ("open", "Open"), ("not-met", "Not met")]
    assert "4.1% higher MAE" in section
    assert section.count("<strong>A against B</strong>") == 1


def test_each_horizon_has_its_tables(run_folder):
    records = load_lines(run_folder / "evaluation.jsonl")
    write_lines(run_folder / "evaluation.jsonl", [*records, *(record | {"horizon": 96} for record in records)])
    text = write_report(run_folder).read_text()
    assert "<h3>Horizon 16</h3>" in text
    assert "<h3>WQL, horizon 96</h3>" in text


def test_domains_may_have_horizons_of_their_own(run_folder):
    records = load_lines(run_folder / "evaluation.jsonl")
    own = [record | {"horizon": 7 if record["domain"] == "sales" else 16} for record in records]
    write_lines(run_folder / "evaluation.jsonl", own)
    assert [table for table in read(write_report(run_folder)).tables if table[0][1:] == ["sales"]]
    assert "horizon 7, 16." in (run_folder / "report.html").read_text()


def test_records_without_overall_values_still_make_a_report(run_folder):
    records = [record for record in load_lines(run_folder / "evaluation.jsonl") if record["domain"] != "overall"]
    write_lines(run_folder / "evaluation.jsonl", records)
    text = write_report(run_folder).read_text()
    assert 'id="domains"' in text
    assert 'id="overall"' not in text


def test_a_forecast_of_gaps_and_a_flat_series_are_drawn(run_folder):
    forecast = load(run_folder / "forecasts.json")[0]
    forecast["context"] = [None] * len(forecast["context"])
    forecast["target"] = [0.0] * len(forecast["target"])
    forecast["models"] = {"mixture": [[0.0] * len(forecast["target"])] * len(forecast["levels"])}
    write(run_folder / "forecasts.json", [forecast])
    text = write_report(run_folder).read_text()
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
        (lambda folder: write(folder / "recommendation.json", {"model": "a"}), "no list of records"),
        (lambda folder: write(folder / "expansion.json", [{"layer": 0}]), "after, before, validation, kept missing"),
        (lambda folder: write(folder / "moe.json", {"upcycled": {"layers": [{"block": 0}]}}), "num_experts, top_k"),
        (lambda folder: write(folder / "moe.json", 3), "no list of records"),
    ],
)
def test_a_spoilt_run_is_refused_and_nothing_is_written(run_folder, spoil, message):
    spoil(run_folder)
    with pytest.raises(InputError, match=message):
        write_report(run_folder)
    assert not list(run_folder.glob("report.*"))


def test_an_unknown_kind_is_refused_with_the_nearest(run_folder):
    record = {"model": "a", "kind": "experts", "domain": "b", "horizon": 1, "metric": "WQL", "value": 1}
    write_lines(run_folder / "evaluation.jsonl", [*load_lines(run_folder / "evaluation.jsonl"), record])
    with pytest.raises(InputError, match="Did you mean 'expert'"):
        write_report(run_folder)


def claim(against, low, high, *, unseen=False):
    """A claim of WQL about a mixture."""
    given = {"claim": "", "metric": "WQL", "model": "mixture", "against": against, "unseen": unseen}
    return Claim(**given, ratio=(low + high) / 2, low=low, high=high)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (claim("own single", 0.9, 0.95), "Here the mixture is more accurate (ratio of WQL 0.925 (0.900 to 0.950))."),
        (claim("own single", 1.01, 1.05), "Here the mixture is less accurate"),
        (
            claim("generalist-full", 0.98, 1.02),
            "generalist-full and the mixture tie at home: take the cheaper, generalist",
        ),
        (
            claim("generalist-full", 1.01, 1.02),
            "generalist-full is more accurate than the mixture at home: take it there",
        ),
        (claim("generalist-wide", 0.9, 0.99, unseen=True), "mixture is more accurate than generalist-wide on unseen"),
        (claim("teacher", 1.1, 1.2, unseen=True), "The teacher is more accurate on unseen domains: keep it where"),
    ],
)
def test_the_report_says_when_to_take_another_model(found, words):
    costs = [{"model": "generalist-full", "flops": 1.0}, {"model": "generalist-wide", "flops": 3.0}]
    (said,) = when_another([found], [*costs, {"model": "mixture", "flops": 2.0}])
    assert words in said


def test_a_teacher_that_is_beaten_needs_no_word():
    assert when_another([claim("teacher", 0.8, 0.9)], []) == []


def test_confidence_is_drawn_beside_its_table(run_folder):
    text = write_report(run_folder).read_text()
    section = text[text.index('id="routing"') : text.index('id="forecasts"')]
    assert section.count('aria-label="error by confidence of the router"') == 1


def test_classical_models_have_a_table_of_their_own(run_folder):
    assert "Classical models" not in write_report(run_folder).read_text()
    records = load_lines(run_folder / "evaluation.jsonl")
    ours = [record for record in records if record["model"] == "teacher"]
    write_lines(run_folder / "sample.jsonl", [r | {"model": "AutoETS", "kind": "external"} for r in ours] + ours)
    costs = load(run_folder / "efficiency.json")
    write(run_folder / "efficiency.json", [*costs, {"model": "AutoETS", "kind": "external", "window_ms": 1583.1}])
    table = next(table for table in read(write_report(run_folder)).tables if "ms a window" in table[0])
    assert [row[:2] for row in table[1:]] == [["teacher", "–"], ["AutoETSexternal", "1,583.1"]]
