import math
import re

import pytest

from chronomoe.report.charts import curve_chart, entropy_chart
from chronomoe.report.layer_tables import growth_table, layer_table, model_layers, ordinal
from chronomoe.report.page import write_report
from report_reader import load, read, results_of, write

LAYER = {"block": 3, "num_experts": 4, "top_k": 1, "load": [0.25, 0.5, 0.2, 0.05], "entropy": 0.8}


@pytest.fixture
def run_folder(grown_run, tmp_path):
    """The results of a tiny run of routes 2 and 3, free to be changed, in which both have MoE layers."""
    folder = results_of(grown_run, tmp_path / "grown")
    moe = load(folder / "moe.json")
    first = moe["upcycled"]["layers"][0]
    write(folder / "moe.json", {"upcycled": moe["upcycled"], "expanded": {"layers": [first], "least_share": 1.0}})
    return folder


@pytest.fixture
def curve(grown_run):
    """The curve of a student with two MoE layers of four experts."""
    return load(grown_run / "curves.json")["upcycled"]


def section(page):
    """The HTML of the section about MoE layers, or nothing."""
    return "".join(re.findall(r'<h2 id="layers">.*?</section>', page.read_text(), re.S))


def lines(chart):
    """Heights of the lines of a chart, by class name; 0 is the top, and a lone point ends with h0."""
    paths = re.findall(r'<path class="([^"]+)" d="([^"]+)"', str(chart))
    return {
        name: [float(place.split()[1].removesuffix("h0")) for place in re.split("[ML]", path)[1:]]
        for name, path in paths
    }


def test_shares_of_the_tables_are_those_of_the_file(run_folder):
    tables = [table for table in read(write_report(run_folder)).tables if table[0][0] == "Tokens"]
    moe = load(run_folder / "moe.json")
    layers = [layer for inside in moe.values() for layer in inside["layers"]]
    for table, layer in zip(tables, layers, strict=True):
        assert table[0][1:] == [f"E{expert}" for expert in range(layer["num_experts"])]
        shares = {"all tokens": layer["load"], **layer["domains"], **layer["positions"]}
        assert {name: cells for name, *cells in table[1:]} == {
            name: [f"{share:.1%}" for share in row] for name, row in shares.items()
        }


def test_rows_are_all_tokens_then_domains_then_positions():
    parts = {"domains": {"web": [0.25] * 4}, "positions": {"register": [0.25] * 4, "forecast": [0.25] * 4}}
    assert [row.name for row in layer_table(LAYER | parts, depth=0).rows] == [
        "all tokens",
        "web",
        "register",
        "forecast",
    ]
    assert [row.name for row in layer_table(LAYER, depth=0).rows] == ["all tokens"]


def test_the_title_says_where_a_layer_stands_and_what_it_does():
    assert layer_table(LAYER, depth=1).title == "2nd layer, block 3: 1 of 4 experts for each token, router entropy 0.80"
    assert [ordinal(place) for place in (1, 2, 3, 4, 11, 12, 21)] == [
        "1st",
        "2nd",
        "3rd",
        "4th",
        "11th",
        "12th",
        "21st",
    ]


def test_shade_is_none_at_an_even_share_and_full_at_four_times_and_a_quarter():
    shares = [0.25, 1.0, 0.5, 0.125, 0.0625, 0.0]
    (row,) = layer_table({**LAYER, "num_experts": 4, "load": shares[:4]}, depth=0).rows
    assert [cell.shade for cell in row.cells] == pytest.approx([0, 1, 0.5, -0.5])
    (row,) = layer_table({**LAYER, "num_experts": 6, "load": [1 / 6, 1, 0.01, 0, 0, 0]}, depth=0).rows
    assert [cell.shade for cell in row.cells] == pytest.approx([0, 1, -1, -1, -1, -1])


def test_the_least_used_expert_is_held_against_the_limit():
    layer = {**LAYER, "domains": {"web": [1.0, 0.0, 0.0, 0.0]}}  # only the load of all tokens counts
    (found,) = model_layers({"upcycled": {"layers": [layer], "least_share": 0.2}})
    assert found.dead
    assert "0.20 of an even share" in found.balance
    assert [[cell.worse for cell in row.cells] for row in found.tables[0].rows] == [[False] * 3 + [True], [False] * 4]
    (found,) = model_layers({"upcycled": {"layers": [LAYER], "least_share": 0.25}})
    assert not found.dead


def test_the_least_share_is_found_where_the_file_does_not_say():
    (found,) = model_layers({"upcycled": {"layers": [LAYER, {**LAYER, "load": [0.25] * 4}]}})
    assert found.least_share == pytest.approx(0.2)


def test_a_dead_expert_is_shown_as_plainly_as_none(run_folder):
    moe = load(run_folder / "moe.json")
    moe["upcycled"]["least_share"], moe["expanded"]["least_share"] = 0.9, 0.1
    write(run_folder / "moe.json", moe)
    chips = re.findall(r"<h3>(\w+) <span class=\"chip ([\w-]+)\">([\w ]+)<", section(write_report(run_folder)))
    assert chips == [("upcycled", "met", "No dead expert"), ("expanded", "not-met", "Dead expert")]


def test_layers_after_the_first_are_folded_away(run_folder):
    text = section(write_report(run_folder))
    open_parts = re.sub(r"<details>.*?</details>", "", text, flags=re.S)
    assert open_parts.count("<table") == 2
    assert text.count("<table") == 3
    assert text.count("<details>") == 1


def test_without_files_there_is_no_section(run_folder):
    curves = load(run_folder / "curves.json")
    (run_folder / "moe.json").unlink()
    text = section(write_report(run_folder))
    assert "<table" not in text
    assert "Router entropy over training" in text
    write(run_folder / "curves.json", {"generalist-full": curves["generalist-full"]})
    assert not section(write_report(run_folder))
    assert 'href="#layers"' not in (run_folder / "report.html").read_text()
    write(run_folder / "moe.json", {})
    assert not section(write_report(run_folder))


def test_a_model_that_kept_no_layer_is_left_out(run_folder):
    moe = load(run_folder / "moe.json")
    write(run_folder / "moe.json", {"upcycled": moe["upcycled"], "expanded": {"layers": [], "least_share": 1.0}})
    text = section(write_report(run_folder))
    assert "<h3>upcycled" in text
    assert "<h3>expanded" not in text


def test_odd_names_of_models_and_domains_are_shown_as_they_are(run_folder):
    odd = "<script>a</script> | *b*"
    write(run_folder / "moe.json", {odd: {"layers": [{**LAYER, "domains": {odd: LAYER["load"]}}]}})
    reader = read(write_report(run_folder))
    assert "script" not in reader.tags
    assert any(row[0] == odd for table in reader.tables for row in table)
    assert "<script" not in (run_folder / "report.md").read_text()


def test_entropy_is_relative_to_that_of_even_experts(curve):
    even, half = math.log(8), math.log(8) / 2
    curve |= {"step": [0, 10, 20], "entropy": [[even], [half], [0.0]], "load": [[[1 / 8] * 8]] * 3}
    top, middle, bottom = lines(entropy_chart(curve))["layer layer-0"]
    assert top < middle < bottom
    assert middle == pytest.approx((top + bottom) / 2, abs=0.1)
    curve |= {"entropy": [[math.log(2)], [math.log(2) / 2], [0.0]], "load": [[[0.5, 0.5]]] * 3}
    assert lines(entropy_chart(curve))["layer layer-0"] == [top, middle, bottom]


def test_each_layer_has_its_line(curve):
    assert list(lines(entropy_chart(curve))) == [f"layer layer-{layer}" for layer in range(2)]


def test_an_entropy_that_is_not_known_leaves_a_gap(curve):
    curve |= {"step": [0, 10], "entropy": [[None, 1.0], [0.5, 1.0]], "load": [[[0.5, 0.5]] * 2] * 2}
    assert [len(places) for places in lines(entropy_chart(curve)).values()] == [1, 2]


@pytest.mark.parametrize("missing", ["entropy", "load"])
def test_a_curve_of_a_dense_model_has_no_entropy_chart(curve, missing):
    del curve[missing]
    assert entropy_chart(curve) is None


def test_loss_curves_do_not_mind_what_moe_layers_add(curve):
    plain = {name: curve[name] for name in ("step", "loss", "eval_step", "eval_loss")}
    assert curve_chart(curve) == curve_chart(plain)


PROBES = [{"after": place, "validation": 0.4213 - 0.003 * place} for place in range(3)]
GROWTH = [
    {"layer": 0, "after": 2, "probes": PROBES, "before": 0.4302, "validation": 0.4102, "kept": True, "steps": 1200},
    {"layer": 1, "after": 0, "probes": PROBES, "before": 0.4102, "validation": 0.4111, "kept": False, "steps": 1200},
]


def test_the_path_of_growth_marks_the_place_chosen_and_what_was_kept():
    kept, left = growth_table(GROWTH).rows
    assert [cell.text for cell in kept.cells] == [
        *("block 2", "0.4302", "0.4102", "−4.65%", "kept", "1,200"),
        *("0.4213", "0.4183", "0.4153"),
    ]
    assert [cell.best for cell in kept.cells[3:]] == [True, True, False, False, False, True]
    assert left.cells[4].text == "left out"
    assert [cell.best for cell in left.cells[3:]] == [False, False, False, True, False, False]


def test_growth_without_a_choice_of_places_has_no_probes():
    found = growth_table([GROWTH[0] | {"probes": []}])
    assert not [column for column in found.columns if column.startswith("Probe")]
    assert "Probe" not in found.note


def test_an_expansion_that_tried_nothing_has_no_section(run_folder):
    write(run_folder / "expansion.json", [])
    assert 'id="growth"' not in write_report(run_folder).read_text()
