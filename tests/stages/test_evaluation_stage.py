"""What the evaluation stage of a run chooses by, and what it may choose from."""

import pytest

from chronomoe.data.windows import CHOSEN_BY
from chronomoe.evaluation.comparison import NAIVE, Candidate, compare_models
from chronomoe.evaluation.metrics import relative
from chronomoe.evaluation.tasks import make_task
from chronomoe.inputs import Inputs
from chronomoe.pipeline import ChronoMoEPipeline
from report_reader import load


@pytest.fixture
def chosen_by(make_recipe, tmp_path):
    """The watched windows of a tiny run, and tasks of those that its models are chosen by."""
    given = Inputs(make_recipe(), tmp_path / "run")
    tasks = {
        domain.name: make_task(domain, given.config.windows, part="validation", limit=5, half=CHOSEN_BY)
        for domain in given.domains
    }
    return given.material.validation, tasks


def test_no_window_that_training_watched_chooses_a_model(chosen_by):
    watched, tasks = chosen_by
    assert set(watched) == set(tasks)
    for name, task in tasks.items():
        assert task.places
        assert not set(task.places) & set(watched[name].places)


def test_the_expected_error_is_that_of_windows_nobody_watched(finished_run, chosen_by):
    found = load(finished_run / "recommendation.json")
    model = ChronoMoEPipeline.from_pretrained(finished_run / "recommended").model
    levels = list(model.chronos_config.quantiles)
    rows = compare_models({"it": Candidate(model=model, kind="student")}, chosen_by[1], levels=levels).rows
    assert relative(rows["it"].test, rows[NAIVE].test, "WQL") == pytest.approx(found["error"], rel=1e-4)


def test_every_row_that_is_one_checkpoint_can_be_recommended(finished_run):
    names = {one["model"] for one in load(finished_run / "recommendation.json")["candidates"]}
    assert {"mixture", "mixture K=1", "mixture, all experts", "mixture, dynamic K"} <= names
    assert {"simple average of experts", "generalist-full", "expert/generalist", "single/power"} <= names
    assert not names & {"teacher", "own single", "own expert", "greedy portfolio", "oracle over experts"}
