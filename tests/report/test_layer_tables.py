import json
import math
import re

import numpy as np
import pytest

from chronomoe.report.charts import curve_chart, entropy_chart
from chronomoe.report.layer_tables import layer_table, model_layers, ordinal
from chronomoe.report.page import write_report
from report_run import DOMAINS, EXPERTS, PLACES, add_routes, make_layers, make_moe_curve, make_run, read, write

LAYER = {"block": 3, "num_experts": 4, "top_k": 1, "load": [0.25, 0.5, 0.2, 0.05], "entropy": 0.8}


@pytest.fixture
def run_folder(tmp_path):
    make_run(tmp_path)
    add_routes(tmp_path)
    return tmp_path


@pytest.fixture
def curve():
    return make_moe_curve(np.random.default_rng(0), 3, 8)


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
    moe = json.loads((run_folder / "moe.json").read_text())
    layers = [layer for inside in moe.values() for layer in inside["layers"]]
    for table, layer in zip(tables, layers, strict=True):
        assert table[0][1:] == [f"E{expert}" for expert in range(layer["num_experts"])]
        shares = {"all tokens": layer["load"], **layer["domains"], **layer["positions"]}
        assert {name: cells for name, *cells in table[1:]} == {
            name: [f"{share:.1%}" for share in row] for name, row in shares.items()
        }


def test_rows_are_all_tokens_then_domains_then_positions():
    layer = make_layers(np.random.default_rng(0), 4, 1, (2,))["layers"][0]
    assert [row.name for row in layer_table(layer, depth=0).rows] == ["all tokens", *DOMAINS, *PLACES]
    del layer["positions"]["register"]
    assert "register" not in [row.name for row in layer_table(layer, depth=0).rows]
    del layer["positions"], layer["domains"]
    assert [row.name for row in layer_table(layer, depth=0).rows] == ["all tokens"]


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
    moe = json.loads((run_folder / "moe.json").read_text())
    moe["expanded"]["least_share"] = 0.1
    write(run_folder / "moe.json", moe)
    chips = re.findall(r"<h3>(\w+) <span class=\"chip ([\w-]+)\">([\w ]+)<", section(write_report(run_folder)))
    assert chips == [("upcycled", "met", "No dead expert"), ("expanded", "not-met", "Dead expert")]


def test_layers_after_the_first_are_folded_away(run_folder):
    text = section(write_report(run_folder))
    open_parts = re.sub(r"<details>.*?</details>", "", text, flags=re.S)
    assert open_parts.count("<table") == len(EXPERTS)
    assert text.count("<table") == sum(len(blocks) for _, _, blocks in EXPERTS.values())
    assert text.count("<details>") == sum(len(blocks) > 1 for _, _, blocks in EXPERTS.values())


def test_without_files_there_is_no_section(run_folder):
    curves = json.loads((run_folder / "curves.json").read_text())
    (run_folder / "moe.json").unlink()
    text = section(write_report(run_folder))
    assert "<table" not in text
    assert "Router entropy over training" in text
    write(run_folder / "curves.json", {name: curves[name] for name in ("generalist", "router")})
    assert not section(write_report(run_folder))
    assert 'href="#layers"' not in (run_folder / "report.html").read_text()
    write(run_folder / "moe.json", {})
    assert not section(write_report(run_folder))


def test_a_model_that_kept_no_layer_is_left_out(run_folder):
    moe = json.loads((run_folder / "moe.json").read_text())
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
    assert list(lines(entropy_chart(curve))) == [f"layer layer-{layer}" for layer in range(3)]


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
