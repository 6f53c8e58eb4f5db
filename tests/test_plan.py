"""The plan of a run: finite, adding up, growing with steps, and naming the stages that the run then makes."""

import json
import math

import pytest
import torch

from chronomoe.errors import InputError
from chronomoe.evaluation.cost import count_parameters
from chronomoe.inputs import Inputs
from chronomoe.plan import plan
from chronomoe.stages.trial import Trial, measure
from tiny_run import ROUTES


def by_size(model, windows, *, train=True):
    """A trial without a clock: a step of a window takes a second for a million parameters, a forecast a third."""
    seconds = count_parameters(model) / 1e6
    return Trial(seconds, seconds / 3, 1000.0)


@pytest.fixture
def planned(make_recipe):
    """Plan a tiny run, with changes to its recipe."""
    return lambda **changes: plan(Inputs(make_recipe(**changes), None), trial=by_size)


def steps_of(run):
    """Optimiser steps of each training stage of a finished run."""
    curves = {path.parent: json.loads(path.read_text()) for path in (run / "stages").rglob("curve.json")}
    return {str(path.relative_to(run / "stages")): curve["eval_step"][-1] for path, curve in curves.items()}


@pytest.mark.parametrize(("name", "changes"), [("finished_run", {}), ("grown_run", ROUTES)])
def test_the_stages_of_a_plan_are_those_of_the_run(request, planned, name, changes):
    run, found = request.getfixturevalue(name), planned(**changes)
    assert [stage.stage for stage in found.stages] == list(json.loads((run / "run.json").read_text())["seconds"])
    taken = steps_of(run)
    steps = {stage.stage: stage.steps for stage in found.stages if stage.stage in taken}
    by_gain = [stage for stage in taken if "/expert-" in stage]  # shared out by what validation says
    assert sum(steps[stage] for stage in by_gain) == pytest.approx(sum(taken[stage] for stage in by_gain), abs=2)
    assert {stage: count for stage, count in steps.items() if stage not in by_gain} == {
        stage: count for stage, count in taken.items() if stage not in by_gain
    }


@pytest.mark.parametrize("changes", [{}, ROUTES, {"joint": {"steps": 3}}, {"moe": {"routing": {"top_k": 1}}}])
def test_estimates_are_finite_and_add_up(planned, changes):
    found = planned(**changes)
    for stage in found.stages:
        assert all(math.isfinite(value) and value >= 0 for value in stage[1:]), stage
    assert found.seconds == pytest.approx(sum(stage.seconds for stage in found.stages))
    assert found.disk >= sum(stage.disk for stage in found.stages)
    assert found.memory >= max(stage.memory for stage in found.stages)


def test_training_time_grows_with_steps_and_batch(planned, make_recipe):
    budget = {"steps": 60, "batch_size": 4, "windows": 24}
    one, longer, wider = (planned(budget=budget | more) for more in ({}, {"steps": 120}, {"batch_size": 8}))
    seconds = [next(s for s in p.stages if s.stage == "students/generalist-full") for p in (one, longer, wider)]
    looking = seconds[0].windows * by_size_forecast(seconds[0])
    base = seconds[0].seconds - looking
    assert seconds[1].seconds - looking == pytest.approx(2 * base)
    assert seconds[2].seconds - looking == pytest.approx(2 * base)
    assert longer.steps > one.steps


def by_size_forecast(stage):
    return stage.parameters / 3e6


def test_a_trial_measures_and_leaves_the_weights(make_recipe):
    given = Inputs(make_recipe(), None)
    model, windows = given.teacher, [given.material.windows[index] for index in range(6)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found, watched = measure(model, windows), measure(model, windows, train=False)
    assert all(math.isfinite(value) and value > 0 for value in found)
    assert found.activations > watched.activations == 0
    assert all((value == before[name]).all() for name, value in model.state_dict().items())
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_plan_command_prints_stages_and_total_and_writes_nothing(chronomoe, recipe, tmp_path):
    path = recipe()
    status, out, err = chronomoe("plan", path)
    assert status == 0, err
    assert "students/generalist-full" in out
    assert "trainings, " in out
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")])
def test_a_trial_that_runs_out_of_memory_says_what_to_lower(make_recipe, error):
    def trial(model, windows, *, train):
        raise error

    message = (
        "a forecast of 4 windows with a model of .* parameters ran out of memory in the trial .*; lower budget.batch"
    )
    with pytest.raises(InputError, match=message):
        plan(Inputs(make_recipe(), None), trial=trial)


def test_another_error_of_a_trial_is_a_bug_and_stays_one(make_recipe):
    def trial(model, windows, *, train):
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        plan(Inputs(make_recipe(), None), trial=trial)
