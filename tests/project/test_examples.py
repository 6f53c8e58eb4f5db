import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from chronomoe import ChronoMoEPipeline, InputError, load_model
from chronomoe.models.chronos2 import use_exact_group_attention
from chronomoe.models.mixture.features import NUM_FEATURES

EXAMPLES = Path(__file__).parents[2] / "examples"
ROUTES = ("route_1_mixture", "route_2_sparse", "route_3_grown")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_by_a_test():
    tested = {
        "distil_a_student",
        "mix_students",
        "add_a_router",
        "compare_with_fracast",
        "ray_serve",  # by tests/serving/test_ray_serve.py
        "watch_a_mixture",
        "forecast_parts",
        "grow_a_mixture",
        *ROUTES,
    }
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


@pytest.mark.parametrize("name", ROUTES)
def test_the_example_of_a_route_goes_from_teacher_to_forecast_in_under_40_lines(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    load(name).main(steps=2)
    assert "median: [" in capsys.readouterr().out
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 40


def test_the_distillation_example_writes_a_student_and_forecasts(tmp_path, capsys):
    load("distil_a_student").main(tmp_path / "student", steps=3)
    assert (tmp_path / "student" / "model.safetensors").is_file()
    assert "median of the next hour" in capsys.readouterr().out


def test_the_mixture_example_prints_what_it_promises(capsys):
    load("mix_students").main()
    assert "experts:" in capsys.readouterr().out


def test_the_example_of_watching_prints_a_verdict_on_each_case(make_mixture, experts, tmp_path, capsys):
    members = {"web": experts["power"], "traffic": experts["retail"]}
    ChronoMoEPipeline(make_mixture(members=members)).save_pretrained(tmp_path / "moe")
    load("watch_a_mixture").main(str(tmp_path / "moe"), domains=["web"], limit=20)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": loss ")[0] for line in lines] == ["web, as it is", "web, another expert"]


def test_the_example_of_parts_forecasts_each(make_mixture, make_frame, tmp_path, capsys):
    ChronoMoEPipeline(make_mixture()).save_pretrained(tmp_path / "moe")
    (tmp_path / "parts").mkdir()
    for part in range(2):
        frame = make_frame(2, 60, seed=part)
        frame["item_id"] += f"-{part}"
        frame.to_parquet(tmp_path / "parts" / f"{part}.parquet", index=False)
    load("forecast_parts").main(*(str(tmp_path / name) for name in ("moe", "parts", "forecasts")), horizon=5)
    assert capsys.readouterr().out == "20 rows in 2 parts\n"


def test_the_example_of_growing_adds_an_expert(make_mixture, make_teacher, make_frame, tmp_path, capsys):
    alike = {name: use_exact_group_attention(make_teacher(seed=seed, num_layers=1)) for seed, name in enumerate("ab")}
    ChronoMoEPipeline(make_mixture(members=alike)).save_pretrained(tmp_path / "moe")
    for name in ("old", "new"):
        make_frame(2, 500).to_csv(tmp_path / f"{name}.csv", index=False)
    series = {name: str(tmp_path / f"{name}.csv") for name in ("old", "new")}
    load("grow_a_mixture").main(str(tmp_path / "moe"), str(tmp_path / "out"), **series, context_length=96, steps=2)
    assert "experts before: a, b" in capsys.readouterr().out
    assert load_model(tmp_path / "out" / "grown").config.expert_names == ["a", "b", "new"]


def test_the_router_example_saves_a_mixture_and_puts_its_router_back(tmp_path, capsys):
    load("add_a_router").main(tmp_path / "moe")
    assert "loaded with a TimeSeriesRouter, now it has a CautiousRouter" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("fracast") is None, reason="fracast is not installed: pip install fracast")
def test_the_example_with_a_model_of_another_project_prints_both(capsys):
    load("compare_with_fracast").main(["web"], limit=3)
    out = capsys.readouterr().out
    assert "Fracast-0: WQL " in out
    assert "tiny: WQL " in out


def test_a_router_put_back_after_loading_scores_as_before(make_mixture, make_context, tmp_path):
    example, mixture, context = load("add_a_router"), make_mixture().eval(), make_context()
    features = mixture.router_inputs(context)
    mixture.router.standardize_on(features + 9)  # far from what it will read
    plain = mixture.router(features)
    example.use_cautious_router(mixture)
    expected = mixture.router(features)
    assert not torch.allclose(plain, expected)
    ChronoMoEPipeline(mixture).save_pretrained(tmp_path / "moe")
    loaded = load_model(tmp_path / "moe")
    assert torch.equal(loaded.router(features), plain)
    example.use_cautious_router(loaded)
    assert torch.equal(loaded.router(features), expected)


def test_a_mixture_saved_with_a_router_of_other_weights_is_refused(make_mixture, tmp_path):
    mixture = make_mixture()
    mixture.router.network = nn.Sequential(nn.Linear(NUM_FEATURES, 2))
    ChronoMoEPipeline(mixture).save_pretrained(tmp_path / "moe")
    with pytest.raises(InputError, match=r"are not those of its config.json: .* such as 'router\.network\."):
        load_model(tmp_path / "moe")
