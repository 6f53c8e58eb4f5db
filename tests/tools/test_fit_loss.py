import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

TOOL = Path(__file__).parents[2] / "tools" / "fit_loss.py"
fit_loss = SimpleNamespace(**runpy.run_path(str(TOOL), run_name="fit_loss"))


def write(folder, points):
    with SummaryWriter(str(folder / "logs")) as log:
        for step, value in points.items():
            log.add_scalar("train/loss", value, step)


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["fit_loss.py", *map(str, words)])
    fit_loss.main()


def test_a_power_law_is_found_and_carried_on(tmp_path, monkeypatch, capsys):
    write(tmp_path, {step: 20 * step**-0.1 for step in range(100, 1001, 50)} | {50: 99.0, 1050: 0.1})
    run(monkeypatch, tmp_path, "--first", 100, "--last", 1000)
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert found["exponent"] == pytest.approx(-0.1, abs=1e-5)
    assert found["factor"] == pytest.approx(20, rel=1e-4)
    assert found["error"] == pytest.approx(0, abs=1e-5)
    assert found["reports"] == 19
    assert f"| 2,000 | {20 * 2000**-0.1:.2f} |" in out


def test_the_error_of_the_exponent_is_that_of_repeated_fits():
    steps = np.arange(100.0, 2001.0, 50.0)
    rng = np.random.default_rng(0)
    fits = [fit_loss.fit(steps, 9 * steps**-0.1 * np.exp(rng.normal(scale=0.05, size=len(steps)))) for _ in range(400)]
    spread = np.std([line.exponent for line in fits])
    assert np.median([line.error for line in fits]) == pytest.approx(spread, rel=0.15)
    assert np.median([line.scatter for line in fits]) == pytest.approx(0.05, rel=0.1)


def test_where_a_continued_run_reported_a_step_twice_the_later_report_counts(tmp_path):
    write(tmp_path, {50: 3.0, 100: 2.0, 150: 9.0})
    write(tmp_path, {150: 1.0, 200: 0.5})
    steps, losses = fit_loss.read(tmp_path, first=50, last=200)
    assert list(steps) == [50, 100, 150, 200]
    assert list(losses) == [3.0, 2.0, 1.0, 0.5]


def test_a_folder_without_logs_is_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, "--first", 1, "--last", 2)
    assert "has no logs" in capsys.readouterr().err


def test_a_stretch_without_reports_is_refused(tmp_path, monkeypatch, capsys):
    write(tmp_path, {50: 3.0, 100: 2.0})
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, "--first", 60, "--last", 1000)
    assert "holds 1 reports from step 60 to 1000" in capsys.readouterr().err
