import json
import shutil
import signal
import time
from io import StringIO

import numpy as np
import pytest
import torch
from chronos import BaseChronosPipeline
from rich.console import Console

from chronomoe import ChronoMoEPipeline
from chronomoe.errors import InputError
from chronomoe.inputs import Inputs
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.models.sparse.insertion import MoEEnhancedChronos2
from chronomoe.models.sparse.upcycling import Chronos2MoEModel, SparseChronos2Model, upcycle
from chronomoe.pipeline import load_teacher
from chronomoe.run import ROUTE_RESULTS, run
from tiny_run import LAYERS, ROUTES


def quiet():
    return Console(file=StringIO())


def read(folder, name):
    return json.loads((folder / name).read_text())


def kinds(folder):
    return {json.loads(line)["kind"] for line in (folder / "evaluation.jsonl").read_text().splitlines()}


def model_of(folder):
    return ChronoMoEPipeline.from_pretrained(folder).model


def test_each_route_leaves_its_checkpoint_the_first_as_the_runs_own(grown_run):
    assert type(model_of(grown_run / "moe")) is Chronos2MoEModel
    (entry,) = read(grown_run, "expansion.json")
    kind = MoEEnhancedChronos2 if entry["kept"] else ExactChronos2Model
    assert type(model_of(grown_run / "expanded")) is kind
    assert not (grown_run / "upcycled").exists()


def test_checkpoints_of_all_routes_forecast_through_the_stock_pipeline(grown_run):
    wave = np.sin(np.arange(90) / 4).astype(np.float32)
    for name in ("moe", "expanded"):
        quantiles, _ = BaseChronosPipeline.from_pretrained(grown_run / name).predict_quantiles([wave], 20)
        assert quantiles[0].shape == (1, 20, 9)
        assert torch.isfinite(quantiles[0]).all()


def test_a_run_without_a_mixture_trains_no_experts(grown_run):
    assert kinds(grown_run) == {"naive", "teacher", "generalist", "chosen", "upcycled", "expanded"}
    assert not (grown_run / "routing.json").exists()
    trained = {path.name for path in (grown_run / "stages" / "students").iterdir()}
    assert trained == {"dense-start", "generalist-base", "generalist-full", "generalist-wide"}


def test_every_route_has_the_active_compute_of_its_dense_rival(grown_run):
    rows = {row["model"]: row for row in read(grown_run, "efficiency.json")}
    dense = rows["generalist-wide"]
    assert rows["upcycled"]["active_parameters"] <= 1.01 * dense["active_parameters"]  # and its router
    assert rows["upcycled"]["flops"] <= 1.05 * dense["flops"]
    assert rows["expanded"]["active_parameters"] <= 1.3 * dense["active_parameters"]


def test_every_route_keeps_to_the_budget(grown_run):
    rows = {row["model"]: row for row in read(grown_run, "efficiency.json")}
    for name in ("upcycled", "expanded", "generalist-full", "generalist-wide"):
        assert 0.8 < rows[name]["training"] < 1.05, name
        assert rows[name]["core_seconds"] > 0


def test_a_plan_divides_the_budget_by_what_each_part_costs(make_recipe, tmp_path):
    given = Inputs(make_recipe(**ROUTES), tmp_path / "run")
    budget = given.budget
    plan, dense = given.upcycling_plan(), budget.cost_of_size(budget.active_size)
    assert plan.steps["dense"] == round(0.4 * budget.operations / dense)
    teacher = budget.cost(upcycle(given.teacher, given.config.upcycling.teacher_layers))
    assert plan.steps["teacher"] == round(0.2 * budget.operations / teacher)
    spent = given.expanding_plan()
    probes = 2 * 1  # two places, one step each
    assert spent.steps["base"] == round(0.6 * budget.operations / dense)
    assert (spent.steps["layer"] + probes) * dense <= 0.4 * budget.operations


def test_routes_are_compared_with_the_dense_rival_and_the_base(grown_run):
    pairs = {(claim["model"], claim["against"]) for claim in read(grown_run, "intervals.json")}
    assert {("upcycled", "generalist-wide"), ("expanded", "generalist-base")} <= pairs


def test_the_recommended_checkpoint_is_the_one_that_validation_names(grown_run):
    found = read(grown_run, "recommendation.json")
    names = {"upcycled", "expanded", "generalist-full", "generalist-wide", "generalist-base"}
    assert {row["model"] for row in found["candidates"]} == names  # no teacher, nothing that needs a domain's name
    folder = {"upcycled": "upcycled/student", "expanded": "expanded/student"}.get(
        found["model"], f"students/{found['model']}"
    )
    made = grown_run / "stages" / folder / "model" / "model.safetensors"
    assert (grown_run / "recommended" / "model.safetensors").read_bytes() == made.read_bytes()


def test_the_path_of_an_expansion_and_the_use_of_experts_are_kept(grown_run):
    (entry,) = read(grown_run, "expansion.json")
    assert {probe["after"] for probe in entry["probes"]} == {0, 1}
    inside = read(grown_run, "moe.json")
    assert set(inside) == {"upcycled"} | ({"expanded"} if entry["kept"] else set())
    assert [layer["block"] for layer in inside["upcycled"]["layers"]] == [0, 1]
    curves = read(grown_run, "curves.json")
    assert {"upcycled", "expanded, layer 0", "generalist-base"} <= set(curves)
    assert len(curves["upcycled"]["entropy"]) == len(curves["upcycled"]["step"])


def test_a_grown_model_holds_its_base_bit_for_bit(grown_run):
    base = model_of(grown_run / "stages/students/generalist-base/model").state_dict()
    grown = model_of(grown_run / "expanded").state_dict()
    same = [name for name, value in base.items() if name in grown and torch.equal(value, grown[name])]
    assert len(same) == len(base)


def test_students_of_route_two_follow_the_upcycled_teacher(grown_run, teacher_folder):
    learned = model_of(grown_run / "stages/upcycled/teacher/model")
    assert isinstance(learned, SparseChronos2Model)
    before = load_teacher(teacher_folder).state_dict()
    kept = [name for name in before if name in learned.state_dict()]
    assert any(not torch.equal(before[name], learned.state_dict()[name]) for name in kept)


KILLS = [
    "stages/upcycled/teacher.partial/checkpoints",
    "stages/upcycled/student.partial/started.json",
    "stages/expanded/student.partial/layers/layer-0",
    "stages/evaluation.partial/moe.json",
]


def test_a_run_of_all_stages_killed_at_many_points_ends_as_one_left_alone(grown_run, make_recipe, processes, tmp_path):
    folder = tmp_path / "run"
    for place in KILLS:
        process = processes.Process(target=run, args=(make_recipe(**ROUTES), folder))
        process.start()
        while not (folder / place).exists() and process.is_alive():
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, place
    run(make_recipe(**ROUTES), folder, console=quiet())
    for name in ("moe", "expanded"):
        own, other = (model_of(root / name).state_dict() for root in (folder, grown_run))
        assert all(torch.equal(value, other[key]) for key, value in own.items())
    for name in ("evaluation.jsonl", "recommendation.json", "moe.json"):
        assert (folder / name).read_bytes() == (grown_run / name).read_bytes()


def test_results_of_routes_no_longer_run_do_not_stay(grown_run, make_recipe, tmp_path):
    folder = shutil.copytree(grown_run, tmp_path / "run")
    run(make_recipe(routes=["mixture"]), folder, console=quiet())
    assert [name for name in ROUTE_RESULTS if (folder / name).exists()] == ["routing.json"]
    assert "mixture" in kinds(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routes": []}, "routes must name each of mixture, upcycle, expand at most once"),
        ({"routes": ["expand", "expand"]}, "routes must name each of mixture, upcycle, expand at most once"),
        ({"upcycling": {"dense_share": 0.6, "teacher_share": 0.4}}, "must leave some of the budget to the MoE student"),
        ({"expanding": {"base_share": 1.0}}, "base_share must be below 1, got 1.0"),
    ],
)
def test_impossible_routes_are_refused(make_recipe, changes, message):
    with pytest.raises(InputError, match=message):
        make_recipe(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expanding": {"probe_steps": 50}}, "go to probes of 2 places; lower base_share, probe_steps or max_layers"),
        ({"upcycling": {"layers": {"layers": [2]}}}, "layers must be from 0 to 1, the model's encoder blocks, got 2"),
        ({"upcycling": {"layers": LAYERS | {"granularity": 1, "shared_width": 96}}}, "shared_width must be below 96"),
        ({"upcycling": {"dense_share": 0.0001}}, "leaves none for the dense; raise it"),
    ],
)
def test_routes_that_the_model_or_budget_cannot_meet_are_refused_before_anything_is_written(
    make_recipe, tmp_path, changes, message
):
    with pytest.raises(InputError, match=message):
        run(make_recipe(**ROUTES | changes), tmp_path / "run", console=quiet())
    assert not (tmp_path / "run").exists()
