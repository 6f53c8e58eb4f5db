"""The score of a teacher, on made-up Parquet files: the protocol, and figures computed by hand."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from chronomoe import ChronoMoEPipeline

TOOL = Path(__file__).parents[2] / "tools" / "score_teacher.py"
score_teacher = SimpleNamespace(**runpy.run_path(str(TOOL), run_name="score_teacher"))
CONTEXT, HORIZON = score_teacher.CONTEXT, score_teacher.HORIZON


def write(folder, name, values, freq="h"):
    """Write a wide file as those of the shared folder."""
    time = pd.date_range("2024-01-01", periods=len(values), freq=freq)
    columns = {f"s{index}": column.astype(np.float32) for index, column in enumerate(np.asarray(values).T)}
    path = folder / f"{name}.parquet"
    pd.DataFrame({"timestamp": time} | columns).to_parquet(path, index=False)
    return path


def walks(rows, columns=2):
    return np.random.default_rng(0).normal(size=(rows, columns)).cumsum(axis=0)


@pytest.fixture
def pipeline(make_teacher):
    return ChronoMoEPipeline(make_teacher(num_layers=1, forecasting={"context_length": 512, "max_output_patches": 6}))


def test_a_file_is_z_scored_by_its_train_rows_alone(tmp_path):
    values = walks(2000)
    values[1500:] += 1e4
    file = score_teacher.read(write(tmp_path, "any", values))
    train = file.values[:1400]
    np.testing.assert_allclose(train.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(train.std(axis=0), 1, atol=1e-5)
    assert file.test == (1600, 2000)
    assert np.abs(file.values[1500:]).max() > 100


@pytest.mark.parametrize(("freq", "period"), [("h", 24), ("15min", 96), ("10min", 144), ("5min", 288), ("D", 7)])
def test_the_period_is_that_of_the_frequency(tmp_path, freq, period):
    assert score_teacher.read(write(tmp_path, "any", walks(20), freq)).period == period


def test_the_hourly_transformers_are_split_into_months(tmp_path):
    file = score_teacher.read(write(tmp_path, "ETTh1", walks(17420, 1)))
    assert file.test == (11520, 14400)
    np.testing.assert_allclose(file.values[:8640].mean(), 0, atol=1e-5)


def test_windows_have_their_targets_in_the_test_rows_and_reach_back_for_their_context():
    values = np.stack([np.arange(2000.0), 10_000 + np.arange(2000.0)], axis=1).astype(np.float32)
    file = score_teacher.File(values, (1600, 2000), 24)
    windows = score_teacher.cut(file, stride=HORIZON, limit=None)
    starts = windows.target[:, 0]
    assert starts.tolist() == [*range(1600, 1905, HORIZON), *range(11_600, 11_905, HORIZON)]
    np.testing.assert_array_equal(windows.context[:, -1], starts - 1)
    assert windows.context.shape == (8, CONTEXT)
    assert windows.target.shape == (8, HORIZON)
    assert (windows.target[:, -1] % 10_000 <= 1999).all()


def test_too_many_windows_are_thinned_evenly_with_the_first_and_the_last():
    values = np.arange(4000, dtype=np.float32)[:, None]
    windows = score_teacher.cut(score_teacher.File(values, (1000, 4000), 24), stride=1, limit=10)
    starts = windows.target[:, 0]
    assert len(starts) == 10
    assert (starts[0], starts[-1]) == (1000, 4000 - HORIZON)
    assert np.ptp(np.diff(starts)) <= 1


def test_windows_in_which_nothing_was_observed_are_left_out():
    values = np.ones((2000, 1), dtype=np.float32)
    values[1600:1696] = np.nan  # the first target
    windows = score_teacher.cut(score_teacher.File(values, (1600, 2000), 24), stride=HORIZON, limit=None)
    assert len(windows.target) == 3
    values[1100 : 1600 + 96] = np.nan  # and the context of the second
    windows = score_teacher.cut(score_teacher.File(values, (1600, 2000), 24), stride=HORIZON, limit=None)
    assert np.isfinite(windows.target).any(axis=1).all()
    assert np.isfinite(windows.context).any(axis=1).all()


def test_the_naive_forecast_repeats_the_last_season():
    context = np.tile(np.arange(24, dtype=np.float32), 22)[None, -CONTEXT:]
    expected = np.tile(np.roll(np.arange(24), -(22 * 24 % 24)), 4)[None]
    np.testing.assert_array_equal(score_teacher.seasonal_naive(context, period=24), expected)


def test_the_naive_forecast_falls_back_where_the_last_season_is_missing():
    context = np.tile(np.arange(7, dtype=np.float32), 74)[None, -CONTEXT:].copy()
    expected = score_teacher.seasonal_naive(context, period=7)
    context[:, -5:-2] = np.nan
    np.testing.assert_array_equal(score_teacher.seasonal_naive(context, period=7), expected)
    context[:, :-1] = np.nan
    np.testing.assert_array_equal(
        score_teacher.seasonal_naive(context, period=7), np.full((1, HORIZON), context[0, -1])
    )


def test_a_forecast_of_windows_is_that_of_each_alone(pipeline):
    windows = score_teacher.Windows(walks(CONTEXT, 3).T.astype(np.float32), np.zeros((3, HORIZON), dtype=np.float32))
    together = score_teacher.forecast(pipeline, windows)
    assert together.shape == (3, 9, HORIZON)
    for row in range(3):
        alone = pipeline.predict(torch.from_numpy(windows.context[row : row + 1])[None], prediction_length=HORIZON)
        np.testing.assert_allclose(together[row], alone[0][0], rtol=1e-4, atol=1e-4)


class Seer:
    """A pipeline that knows: it forecasts a ramp as going on, with a band of half a step around it."""

    quantiles = (0.1, 0.5, 0.9)

    def predict(self, inputs, *, prediction_length, batch_size):
        last, step = inputs[..., -1:], inputs[..., -1:] - inputs[..., -2:-1]
        median = last + step * torch.arange(1, prediction_length + 1)
        return list(torch.stack([median - step / 2, median, median + step / 2], dim=2).squeeze(1)[:, None])


def test_a_forecast_that_is_always_right_scores_0_and_is_covered(tmp_path):
    write(tmp_path, "ramp", np.arange(2000.0)[:, None] * [1.0, 2.0])
    row = score_teacher.score(Seer(), tmp_path)["ramp"]
    assert row["windows"] == 8
    assert row["MAE"] == pytest.approx(0, abs=1e-4)
    assert 0 < row["WQL"] < 0.05
    assert row["coverage"] == 1


def test_the_transformers_are_scored_every_day_besides(tmp_path):
    write(tmp_path, "ETTh2", np.arange(14400.0)[:, None] * [1.0, 2.0])
    row = score_teacher.score(Seer(), tmp_path)["ETTh2"]
    assert row["z_MSE"] == pytest.approx(0, abs=1e-4)
    assert row["z_MAE"] == pytest.approx(0, abs=1e-2)


def test_files_count_alike_in_the_summary():
    rows = {
        "ETTh1": {"WQL": 0.5, "MAE": 2.0, "coverage": 0.7, "z_MSE": 0.3, "z_MAE": 0.4},
        "ETTh2": {"WQL": 2.0, "MAE": 0.5, "coverage": 0.9, "z_MSE": 0.1, "z_MAE": 0.2},
    }
    assert score_teacher.summary(rows) == {
        "ETTh1 MSE": 0.3,
        "ETTh1 MAE": 0.4,
        "ETTh2 MSE": 0.1,
        "ETTh2 MAE": 0.2,
        "WQL": pytest.approx(1.0),
        "better than naive in WQL": 1,
        "MAE": pytest.approx(1.0),
        "better than naive in MAE": 1,
        "coverage": pytest.approx(0.8),
        "least coverage": 0.7,
        "most coverage": 0.9,
    }


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["score_teacher.py", *map(str, words)])
    score_teacher.main()


def test_the_command_prints_a_table_and_one_json_line(pipeline, tmp_path, monkeypatch, capsys):
    pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for name in ("fast", "slow"):
        write(tmp_path / "data", name, walks(1200))
    run(monkeypatch, tmp_path / "model", "--data", tmp_path / "data", "--json", tmp_path / "line.json")
    *table, last = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in table[2:] if line] == ["fast", "slow", "geometric mean"]
    assert (tmp_path / "line.json").read_text() == last + "\n"
    found = json.loads(last)
    assert set(found["files"]) == {"fast", "slow"}
    assert found["summary"]["WQL"] == pytest.approx(found["files"]["fast"]["WQL"], rel=1e-3)


def test_a_folder_without_series_is_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "tiny", "--data", tmp_path)
    assert "must be a folder of Parquet files" in capsys.readouterr().err
