"""The page of results: what is run for it, what is skipped, and what its tables say."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from tiny_run import ROUTES

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def evidence():
    """The tool, whose modules lie beside it."""
    sys.path.insert(0, str(TOOLS))
    try:
        import ablation
        import evidence
        import evidence_tables
        import unfamiliar

        yield evidence
    finally:
        sys.path.remove(str(TOOLS))
        for module in (ablation, evidence, evidence_tables, unfamiliar):
            del sys.modules[module.__name__]


@pytest.fixture
def tables(evidence):
    return evidence.evidence_tables


@pytest.fixture
def call(evidence, make_recipe, monkeypatch, tmp_path):
    """Run the tool on a tiny recipe of two domains; return what it printed and the page."""
    few = {"steps": 12, "batch_size": 4, "windows": 24}
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(evidence.dump(make_recipe(budget=few)))
    settings = {
        "recipe": str(recipe),
        "changes": {},
        "seeds": [0, 1],
        "held_out": {"baselines": ["single"]},
        "never_seen": {"limit": 4},
        "unfamiliar": {"familiar": [0.5, 0.9]},
        "budgets": {"steps": [4], "changes": {"baselines": ["generalist-full"]}},
        "routes": ROUTES | {"routes": ["mixture", "upcycle", "expand"], "budget": {"steps": 60}},
        "ablation": {
            "routers": {"K = 1": {"moe": {"routing": {"top_k": 1}}}},
            "experts_seeds": [1],
            "experts": {"even": {"budget": {"allocation": "even"}}},
        },
    }
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump({"small": settings}))
    monkeypatch.setattr(evidence, "SETTINGS", tmp_path / "settings.yaml")

    def run(*words):
        page = tmp_path / "results.md"
        words = ("--size", "small", "--out", tmp_path / "out", "--write", page, *words)
        monkeypatch.setattr(sys, "argv", ["evidence.py", *map(str, words)])
        evidence.main()
        return page.read_text()

    return run


def test_parts_are_measured_named_where_missing_and_not_measured_again(call, capfd, tmp_path):
    page = call("--part", "demo", "--part", "budgets", "--part", "ablation")
    assert "| mixture against own single |" in page
    assert "| 4 |" in page
    assert "| 12 |" in page
    rows = json.loads((tmp_path / "out" / "ablation.json").read_text())["rows"]
    assert [one["ratio"] for one in rows["as it is"]] == [1.0, 1.0]
    assert (len(rows["K = 1"]), len(rows["even"])) == (2, 1)
    assert rows["K = 1"][0]["experts"] == pytest.approx(1)
    assert page.count("Not measured here") == 7
    capfd.readouterr()
    assert call("--part", "demo", "--part", "budgets", "--part", "ablation") == page
    made = [line for line in capfd.readouterr().err.splitlines() if line.startswith("✓") and "skipped" not in line]
    assert made == []


def test_each_domain_is_left_out_in_turn(call, tmp_path):
    page = call("--part", "held_out")
    assert "|  | power | sales | all |" in page
    found = json.loads((tmp_path / "out" / "held_out.json").read_text())["claims"]
    assert set(found["teacher"]) == {"power", "sales", "all"}


def test_mixtures_get_a_teacher_for_what_is_unfamiliar(call, series_files, tmp_path):
    page = call("--part", "held_out", "--part", "unfamiliar", "--data", series_files["sales"].parent)
    assert "| familiar | the mixture without | teacher | average single |" in page
    found = json.loads((tmp_path / "out" / "unfamiliar.json").read_text())
    assert set(found["left_out"]) == {"0.5", "0.9"}
    less, more = found["left_out"]["0.9"], found["left_out"]["0.5"]
    assert less["unseen"] <= more["unseen"]
    assert less["familiar"] <= more["familiar"]
    assert more["unseen"] == pytest.approx(1), "an hourly and a daily domain are nothing alike"
    assert more["claims"]["teacher"] == pytest.approx([1, 1, 1], abs=1e-3)
    assert set(found["public"]["0.9"]["claims"]) >= {"mixture", "teacher"}


def test_the_routes_take_over_what_the_demo_made(call, capfd, tmp_path):
    page = call("--part", "demo", "--part", "routes")
    assert "| upcycled against generalist-full |" in page
    assert "| expanded against generalist-base |" in page
    rows = json.loads((tmp_path / "out" / "routes.json").read_text())["rows"]
    assert {"mixture", "upcycled", "expanded"} <= set(rows)
    assert "generalist-full: unchanged, skipped" in capfd.readouterr().err


def test_what_needs_the_public_files_is_left_out_without_them(call, capsys):
    call("--part", "real")
    assert "real: left out, it needs --data" in capsys.readouterr().out


def test_changes_reach_any_depth(evidence):
    base = {"a": {"b": 1, "c": 2}, "d": 3}
    assert evidence.merged(base, {"a": {"b": 9}, "e": 4}) == {"a": {"b": 9, "c": 2}, "d": 3, "e": 4}
    assert base["a"]["b"] == 1


def test_the_folder_of_public_files_is_put_in_place(evidence):
    assert evidence.placed([{"data": "{data}/x"}, 3], Path("here")) == [{"data": "here/x"}, 3]


def test_ratios_of_independent_windows_are_put_together(evidence):
    ratio, low, high = evidence.together([[0.5, 0.4, 0.625], [2.0, 1.6, 2.5]])
    assert ratio == pytest.approx(1)
    assert high == pytest.approx(1.25 ** (1 / 2**0.5))  # half as wide in variance
    assert low == pytest.approx(1 / high)


def test_seeds_are_shown_with_their_spread(tables):
    assert tables.spread([0.9, 1.0, 1.1]) == "1.000 ± 0.100"
    assert tables.spread([0.9]) == "0.900"


def test_published_figures_name_their_source_and_stand_in_the_table(tables):
    published = yaml.safe_load((TOOLS / "published.yaml").read_text())
    assert all("https://arxiv.org/abs/" in one["source"] for one in published.values())
    ours = [{"horizon": 96, "mse": 0.4, "mae": 0.41, "windows": 7}]
    scores = {"ETTh1": {"mixture": ours}}
    settings = {"horizons": [96], "context_length": 512, "stride": {"ETTh1": 25}}
    lines = tables.long_horizon({"scores": scores, "settings": settings})
    assert lines[-1] == "| ETTh1 | 96 | 0.400 / 0.410 | 0.363 | 0.357 / 0.381 |"


def test_every_size_of_the_settings_is_a_recipe_with_known_keys(evidence, tmp_path):
    for number, settings in enumerate(yaml.safe_load((TOOLS / "evidence.yaml").read_text()).values()):
        made = evidence.Evidence(settings, tmp_path, tmp_path / str(number))
        rows = made.settings["ablation"]["routers"] | made.settings["ablation"]["experts"]
        changes = [
            *rows.values(),
            made.settings["held_out"],
            made.settings["real"],
            made.settings["budgets"]["changes"],
        ]
        for change in changes:
            made.config(change)
