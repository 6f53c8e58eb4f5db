"""What covariates are worth, and the section of a card that says how good a teacher is."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from chronomoe import ChronoMoEPipeline

FOLDER = Path(__file__).parents[2] / "tools"
covariates = SimpleNamespace(**runpy.run_path(str(FOLDER / "score_covariates.py"), run_name="tool"))
ship = SimpleNamespace(**runpy.run_path(str(FOLDER / "ship_teacher.py"), run_name="tool"))


def drawn(driver, effect, count=30):
    return [covariates.draw(np.random.default_rng([9, seed]), driver, effect) for seed in range(count)]


@pytest.mark.parametrize("driver", covariates.DRIVERS)
def test_the_future_of_the_covariate_tells_of_the_future_of_the_target(driver):
    told = []
    for task in drawn(driver, "linear"):
        past, future = (np.vander(task.covariate[part], 2) for part in (slice(512), slice(512, None)))
        fitted = future @ np.linalg.lstsq(past, task.target[:512], rcond=None)[0]
        spread = np.abs(task.target[512:] - task.target[:512].mean()).sum()
        told.append(np.abs(task.target[512:] - fitted).sum() / spread)
    assert np.median(told) < 0.85


def test_effects_of_both_signs_are_drawn():
    slopes = [np.corrcoef(task.target, task.covariate)[0, 1] for task in drawn("series", "linear")]
    assert 0.2 < np.mean(np.array(slopes) > 0) < 0.8


def test_a_model_that_sees_each_row_alone_gains_nothing(make_teacher):
    model = make_teacher(num_layers=1, forecasting={"context_length": 512, "max_output_patches": 6})
    for block in model.encoder.block:
        block.layer[1].self_attention.o.weight.data.zero_()
    tasks = drawn("events", "late", 4)
    alone, informed = (covariates.errors(ChronoMoEPipeline(model), tasks, known=known) for known in (False, True))
    np.testing.assert_allclose(alone, informed, rtol=1e-5)


def test_the_command_ends_in_one_json_line_with_every_kind(make_teacher, tmp_path, monkeypatch, capsys):
    model = make_teacher(num_layers=1, forecasting={"context_length": 512, "max_output_patches": 6})
    ChronoMoEPipeline(model).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["score_covariates.py", str(tmp_path / "model"), "--tasks", "9"])
    covariates.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["ratio"]) == 1 + len(covariates.DRIVERS) * len(covariates.EFFECTS)


def test_a_card_tells_every_score():
    files = {"ETTh1": {"WQL": 0.61, "MAE": 0.87, "coverage": 0.8}}
    summary = {"WQL": 0.612, "MAE": 0.873, "coverage": 0.79, "ETTh1 MSE": 0.38, "ETTh1 MAE": 0.4}
    text = ship.results({"files": files, "summary": summary}, {"ratio": {"all": 0.555}})
    assert "| ETTh1 | 0.610 | 0.870 | 0.80 |" in text
    assert "| geometric mean (mean coverage) | 0.612 | 0.873 | 0.79 |" in text
    assert "ETTh1 0.380 / 0.400" in text
    assert "ETTh2" not in text
    assert "without: 0.555" in text
