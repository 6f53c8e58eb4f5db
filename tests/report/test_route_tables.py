import json
import re

import pytest

from chronomoe.errors import InputError
from chronomoe.report.page import write_report
from chronomoe.report.route_tables import estimate, growth_table, routes_table, terms, validation_table
from chronomoe.report.tables import Evaluation
from report_run import DOMAINS, EXPANSION, add_routes, make_comparison, make_run, read, write

ROUTES_HEAD = ["Model", "Parameters", "Active", "GFLOPs", "Training"]
SECTIONS = {
    "routes.json": "routes",
    "validation.json": "validation",
    "expansion.json": "growth",
}


@pytest.fixture
def run_folder(tmp_path):
    make_run(tmp_path)
    add_routes(tmp_path)
    return tmp_path


def table(page, start):
    """The only table of a page whose head starts with these columns."""
    (found,) = [rows for rows in read(page).tables if rows[0][: len(start)] == start]
    return found


def test_the_routes_follow_the_overall_accuracy(run_folder):
    text = write_report(run_folder).read_text()
    assert re.findall(r'<h2 id="(\w+)"', text)[:5] == ["claims", "overall", "routes", "validation", "domains"]
    headings = re.findall(r"^## (.*)$", (run_folder / "report.md").read_text(), re.M)
    assert headings[:5] == [
        "Claims",
        "Accuracy overall",
        "The three routes",
        "Validation loss",
        "Accuracy by domain",
    ]


def test_numbers_of_the_routes_are_those_of_the_files(run_folder):
    head, *rows = table(write_report(run_folder), ROUTES_HEAD)
    assert head[1:] == [
        *("Parameters", "Active", "GFLOPs", "Training", "WQL", "MAE"),
        *("WQL ratio", "MAE ratio", "Loss difference"),
    ]
    records = [json.loads(line) for line in (run_folder / "evaluation.jsonl").read_text().splitlines()]
    overall = {(r["model"], r["metric"]): f"{r['value']:.3f}" for r in records if r["domain"] == "overall"}
    for (name, *cells), row in zip(rows, make_comparison()["rows"], strict=True):
        assert name == row["model"]
        assert cells[:4] == ["4.40 M", "2.31 M", "0.161", "98%"]
        assert cells[4:6] == [overall[name, "WQL"], overall[name, "MAE"]]
    assert rows[0][7:] == ["0.950 (0.930 to 0.970)", "0.960 (0.930 to 0.990)", "−0.0210 (−0.0300 to −0.0120)"]
    assert rows[2][9] == "+0.0040 (−0.0050 to +0.0130)"


def test_the_rival_is_a_row_without_a_ratio(run_folder):
    rows = table(write_report(run_folder), ROUTES_HEAD)
    assert rows[-1][0] == "generalist-wide"
    assert rows[-1][7:] == ["–", "–", "–"]


@pytest.mark.parametrize(
    ("kinds", "title"),
    [
        (("mixture", "upcycled", "expanded"), "The three routes"),
        (("upcycled", "expanded"), "Routes 2 and 3 against generalist-wide"),
        (("mixture", "mixture"), "Route 1 against generalist-wide"),
        (("expanded",), "Route 3 against generalist-wide"),
    ],
)
def test_the_title_says_which_routes_there_are(kinds, title):
    rows = [{"model": f"m{place}", "kind": kind} for place, kind in enumerate((*kinds, "generalist"))]
    found = routes_table({"rows": rows, "against": "generalist-wide"}, Evaluation())
    assert found.title == title


def test_what_a_route_does_not_know_is_a_gap():
    rows = [{"model": "upcycled", "kind": "upcycled", "parameters": None, "wql": None}]
    (row,) = routes_table({"rows": rows, "against": "generalist-wide"}, Evaluation()).rows
    assert {cell.text for cell in row.cells} == {"–"}
    assert not any(cell.best for cell in row.cells)


def test_how_equal_the_comparison_is_comes_from_the_rows(run_folder):
    routes = make_comparison()
    assert terms(routes["rows"]).endswith("active parameters within 0%, training within 0%.")
    routes["rows"][0] |= {"active_parameters": 3_000_000, "training": None}
    write(run_folder / "routes.json", routes)
    said = "One budget for all; between the largest and the smallest: active parameters within 30%, training within 0%."
    assert said in write_report(run_folder).read_text()
    assert said in (run_folder / "report.md").read_text()
    assert terms([{"model": "a"}, {"model": "b"}]) == ""


def test_a_rival_alone_is_no_comparison_of_routes(run_folder):
    routes = make_comparison()
    write(run_folder / "routes.json", {**routes, "rows": routes["rows"][-1:]})
    assert 'id="routes"' not in write_report(run_folder).read_text()


@pytest.mark.parametrize(
    ("low", "high", "best", "worse"),
    [(0.93, 0.99, True, False), (0.93, 1.0, False, False), (1.0, 1.02, False, False), (1.001, 1.02, False, True)],
)
def test_an_estimate_is_marked_when_its_interval_excludes_equality(low, high, best, worse):
    cell = estimate((low + high) / 2, low, high, even=1, form="{:.3f}")
    assert (cell.best, cell.worse) == (best, worse)


@pytest.mark.parametrize(("low", "high"), [(None, None), (float("nan"), float("nan"))])
def test_an_estimate_without_interval_is_not_marked(low, high):
    cell = estimate(-0.5, low, high, even=0, form="{:+.1f}")
    assert (cell.text, cell.span, cell.best, cell.worse) == ("−0.5", "", False, False)


def test_marks_stand_in_both_reports(run_folder):
    text = write_report(run_folder).read_text()
    assert '<td class="best">0.950 <small>(0.930 to 0.970)</small></td>' in text
    assert '<td class="worse">1.040 <small>(1.020 to 1.060)</small></td>' in text
    lines = (run_folder / "report.md").read_text().splitlines()
    assert next(line for line in lines if "0.930 to 0.970" in line).split("|")[9] == " **0.950** (0.930 to 0.970) "
    assert next(line for line in lines if "1.020 to 1.060" in line).split("|")[9] == " *1.040* (1.020 to 1.060) "


def test_validation_losses_stand_pair_by_pair_with_the_overall_first(run_folder):
    head, *rows = table(write_report(run_folder), ["Model", "overall", *DOMAINS])
    assert [row[0] for row in rows] == [
        *("upcycled", "generalist-wide", "difference"),
        *("expanded", "generalist-base", "difference"),
    ]
    for record in json.loads((run_folder / "validation.json").read_text())["rows"]:
        column = head.index(record["domain"])
        first = next(place for place, row in enumerate(rows) if row[0] == record["model"])
        own, rival, gap = (rows[first + offset][column] for offset in range(3))
        assert (own, rival) == (f"{record['loss']:.4f}", f"{record['against_loss']:.4f}")
        signed = [f"{record[name]:+.4f}".replace("-", "−") for name in ("difference", "low", "high")]
        assert gap == f"{signed[0]} ({signed[1]} to {signed[2]})"


def test_a_domain_without_a_loss_is_a_gap():
    shared = {"against": "dense", "loss": 0.31, "against_loss": 0.32, "difference": -0.01, "low": -0.02, "high": 0.01}
    rows = [{**shared, "model": "a", "domain": "web"}, {**shared, "model": "b", "domain": "overall"}]
    found = validation_table(rows, {})
    assert found.columns == ["overall", "web"]
    assert [[cell.text for cell in row.cells] for row in found.rows[3:]] == [
        ["0.3100", "–"],
        ["0.3200", "–"],
        ["−0.0100", "–"],
    ]


def test_the_path_of_growth_marks_the_place_chosen_and_what_was_kept():
    kept, left = growth_table(EXPANSION).rows
    assert [cell.text for cell in kept.cells] == [
        *("block 2", "0.4302", "0.4102", "−4.65%", "kept", "1,200"),
        *("0.4213", "0.4183", "0.4153"),
    ]
    assert [cell.best for cell in kept.cells[3:]] == [True, True, False, False, False, True]
    assert left.cells[4].text == "left out"
    assert [cell.best for cell in left.cells[3:]] == [False, False, False, True, False, False]


def test_growth_without_a_choice_of_places_has_no_probes():
    found = growth_table([{**EXPANSION[0], "probes": []}])
    assert not [column for column in found.columns if column.startswith("Probe")]
    assert "Probe" not in found.note


@pytest.mark.parametrize(("file", "section"), SECTIONS.items())
def test_a_section_without_its_file_is_left_out(run_folder, file, section):
    assert f'id="{section}"' in write_report(run_folder).read_text()
    (run_folder / file).unlink()
    text = write_report(run_folder).read_text()
    assert f'id="{section}"' not in text
    assert f'href="#{section}"' not in text
    assert all(f'id="{other}"' in text for other in SECTIONS.values() if other != section)


def test_an_expansion_that_tried_nothing_has_no_section(run_folder):
    write(run_folder / "expansion.json", [])
    assert 'id="growth"' not in write_report(run_folder).read_text()


def test_both_reports_hold_the_same_tables_of_routes(run_folder):
    page = read(write_report(run_folder)).tables
    lines = (run_folder / "report.md").read_text().splitlines()
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    plain = [[re.sub(r"\*+", "", cell) for cell in row] for row in rows]
    for row in (row for table in page for row in table[1:]):
        assert any(cells[-len(row[1:]) :] == row[1:] and row[0].startswith(cells[0]) for cells in plain), row


def test_every_markdown_row_is_as_wide_as_its_head(run_folder):
    write_report(run_folder)
    blocks = re.findall(r"(?:^\|.*\n)+", (run_folder / "report.md").read_text(), re.M)
    assert blocks
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block


def test_odd_names_of_routes_are_shown_as_they_are(run_folder):
    odd = '<script>alert("1")</script> | a_b & *c*'
    routes = make_comparison()
    routes["rows"] = [{**routes["rows"][1], "model": odd}, {**routes["rows"][3], "model": odd}]
    write(run_folder / "routes.json", {**routes, "against": odd})
    validation = json.loads((run_folder / "validation.json").read_text())
    write(
        run_folder / "validation.json",
        {"rows": [{**row, "model": odd, "domain": odd} for row in validation["rows"][:1]]},
    )
    reader = read(write_report(run_folder))
    assert "script" not in reader.tags
    assert sum(row[0].startswith(odd) for table in reader.tables for row in table) == 3
    assert "<script" not in (run_folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("routes.json", {"rows": [{"model": "a"}]}, "record 1: kind missing"),
        ("routes.json", {"against": "a"}, "no list of records"),
        ("validation.json", [], "no list of records"),
        ("validation.json", {"rows": [{"model": "a"}]}, "against, domain, loss"),
        ("expansion.json", [{"layer": 0}], "after, before, validation, kept missing"),
        ("moe.json", {"upcycled": {"layers": [{"block": 0}]}}, "num_experts, top_k, load missing"),
        ("moe.json", 3, "no list of records"),
    ],
)
def test_a_spoilt_file_is_refused(run_folder, file, content, message):
    write(run_folder / file, content)
    with pytest.raises(InputError, match=message):
        write_report(run_folder)
    assert not list(run_folder.glob("report.*"))
