"""What the evaluation stage of a run chooses by, and what it may choose from."""

import numpy as np
import pytest

from chronomoe.data.windows import CHOSEN_BY
from chronomoe.evaluation.comparison import NAIVE, Candidate, compare_models
from chronomoe.evaluation.metrics import relative
from chronomoe.evaluation.tasks import make_task
from chronomoe.inputs import Inputs
from chronomoe.models.student import StudentConfig, create_student_model
from chronomoe.pipeline import ChronoMoEPipeline
from chronomoe.stages.evaluation import evaluate_run
from report_reader import load, load_lines


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
    assert {"mixture", "mixture K=1", "mixture, all experts"} <= names
    assert {"simple average of experts", "generalist-full", "expert/generalist", "single/power"} <= names
    assert not names & {"teacher", "own single", "own expert", "greedy portfolio", "oracle over experts"}


def median_of_context(task, levels):
    """A forecaster of another project: the median of each context, at every level."""
    middle = np.array([np.nanmedian(context) for context in task.contexts], dtype=np.float64)
    return np.broadcast_to(middle[:, None, None], (len(middle), len(levels), task.horizon)).copy()


def test_slow_models_are_scored_on_a_sample_and_chosen_by_nobody(make_recipe, chosen_by, tmp_path):
    tasks = chosen_by[1]
    teacher = Inputs(make_recipe(), tmp_path / "run").teacher
    student = create_student_model(teacher, StudentConfig(num_layers=1))
    evaluate_run(
        tmp_path,
        {"teacher": Candidate(model=teacher, kind="teacher"), "mixture": Candidate(model=student, kind="mixture")},
        tasks=tasks,
        validation=tasks,
        held_out={},
        horizon=16,
        top_k=(),
        draws=10,
        repeats=1,
        classical={"median": median_of_context},
        sample=1,
        seed=0,
        progress=lambda done, total: None,
    )
    sample = load_lines(tmp_path / "sample.jsonl")
    assert {record["model"] for record in sample} >= {"median", "teacher", "seasonal naive"}
    assert "median" not in {record["model"] for record in load_lines(tmp_path / "evaluation.jsonl")}
    (cost,) = [cost for cost in load(tmp_path / "efficiency.json") if cost["kind"] == "external"]
    assert cost["window_ms"] > 0
    assert load(tmp_path / "recommendation.json")["model"] == "mixture"
    assert (tmp_path / "recommended" / "model.safetensors").is_file()
