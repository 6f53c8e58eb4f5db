"""Past forecasts against what happened, and the verdict that follows."""

import json

import numpy as np
import pandas as pd
import pytest

from chronomoe.errors import InputError
from chronomoe.evaluation.metrics import aggregate, score_windows
from chronomoe.evaluation.monitoring import FEWEST, monitor, verdict

Z = 1.2815515655446004


def made(*, items=8, steps=240, shift=lambda when: 0.0, scale=lambda when: 1.0, width=1.0, seed=0):
    """Forecasts of level 10 with a band for unit noise, and values whose level and noise change as time goes on."""
    rng = np.random.default_rng(seed)
    time = np.arange(steps)
    names = np.repeat([f"s{item}" for item in range(items)], steps)
    stamps = np.tile(pd.date_range("2026-01-01", periods=steps, freq="h"), items)
    noise = rng.standard_normal(items * steps) * np.tile([scale(one / steps) for one in time], items)
    forecasts = pd.DataFrame({"item_id": names, "timestamp": stamps, "target_name": "target", "predictions": 10.0})
    forecasts = forecasts.assign(**{"0.1": 10 - width * Z, "0.5": 10.0, "0.9": 10 + width * Z})
    level = 10 + np.tile([shift(one / steps) for one in time], items)
    return forecasts, pd.DataFrame({"item_id": names, "timestamp": stamps, "target": level + noise})


def judged(*pair, **options):
    return monitor(*pair, **{"draws": 200} | options)


def test_forecasts_that_go_on_as_before_are_kept():
    (found,) = judged(*made())
    assert (found.column, found.group, found.values, found.series) == ("all", "all", 1920, 8)
    assert found.verdict == "keep"
    assert found.after["coverage80"] == pytest.approx(0.8, abs=0.03)


def test_an_error_that_rises_says_distil_again():
    (found,) = judged(*made(shift=lambda when: 0.0 if when < 0.5 else 2.0))
    assert found.verdict == "distil again"
    assert found.ratio_interval[0] < found.ratio < found.ratio_interval[1]


def test_series_that_became_harder_for_everyone_do_not():
    (found,) = judged(*made(scale=lambda when: 1.0 if when < 0.5 else 1.5))
    assert found.after["WQL"] > 1.3 * found.before["WQL"]
    assert found.ratio == pytest.approx(1.0, abs=0.1)
    assert found.verdict == "recalibrate"


def test_values_that_do_not_reach_back_a_season_say_nothing():
    (found,) = judged(*made(steps=150), seasonality=140)
    assert found.verdict == "too few values"
    with pytest.raises(InputError, match="seasonality must be at least 1 step, got 0"):
        judged(*made(), seasonality=0)


def test_bands_of_the_wrong_width_say_recalibrate():
    for width in (0.7, 1.5):
        (found,) = judged(*made(width=width))
        assert found.verdict == "recalibrate"


def test_metrics_are_those_of_an_evaluation():
    forecasts, actuals = made(items=3)
    cut = pd.Timestamp("2026-01-04")
    (found,) = judged(forecasts, actuals, since=cut)
    late = (forecasts.timestamp >= cut).to_numpy()
    scores = score_windows(
        forecasts[["0.1", "0.5", "0.9"]].to_numpy()[late][:, :, None],
        actuals.target.to_numpy()[late][:, None],
        levels=[0.1, 0.5, 0.9],
        seasonal_error=np.full(late.sum(), np.nan),
        series=np.zeros(late.sum(), dtype=np.int64),
    )
    assert found.after == pytest.approx({name: aggregate(scores)[name] for name in found.after})


def test_groups_of_either_file_are_judged_apart():
    forecasts, actuals = made(items=4, steps=600)
    forecasts = forecasts.assign(expert=np.where(forecasts.item_id < "s2", "a", "b"))
    bad = (actuals.item_id == "s3") & (actuals.timestamp >= "2026-01-14")
    actuals = actuals.assign(domain=np.where(actuals.item_id == "s3", "web", "sales"))
    actuals.loc[bad, "target"] += 3
    found = {(one.column, one.group): one.verdict for one in judged(forecasts, actuals)}
    assert found["domain", "web"] == "distil again"
    assert (found["domain", "sales"], found["expert", "a"]) == ("keep", "keep")
    assert list(found) == [
        ("all", "all"),
        *[("domain", "sales"), ("domain", "web")],
        *[("expert", "a"), ("expert", "b")],
    ]


def test_a_step_may_be_forecast_twice_and_values_may_be_missing():
    forecasts, actuals = made(items=2)
    actuals.loc[:9, "target"] = np.nan
    (found,) = judged(pd.concat([forecasts, forecasts]), actuals)
    assert found.values == 2 * (len(actuals) - 10)


def test_a_wide_file_of_values_and_variates_are_read():
    forecasts, actuals = made(items=2)
    wide = actuals.pivot(index="timestamp", columns="item_id", values="target").reset_index()
    expected = judged(forecasts, actuals)
    assert judged(forecasts, wide) == expected
    several = forecasts.assign(target_name=forecasts.item_id.map({"s0": "load", "s1": "price"}), item_id="x")
    values = wide.rename(columns={"s0": "load", "s1": "price"}).assign(item_id="x")
    assert judged(several, values, target=["load", "price"]) == expected


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({"before": FEWEST - 1}, "too few values"),
        ({"ratio": (np.nan, np.nan)}, "too few values"),
        ({"ratio": (1.09, 2.0)}, "keep"),
        ({"ratio": (1.11, 2.0)}, "distil again"),
        ({"coverage": (0.60, 0.76)}, "keep"),
        ({"coverage": (0.60, 0.74)}, "recalibrate"),
        ({"coverage": (0.86, 0.90)}, "recalibrate"),
        ({"ratio": (1.11, 2.0), "coverage": (0.60, 0.74)}, "distil again"),
    ],
)
def test_the_rule(numbers, expected):
    assert verdict(**{"before": 500, "after": 500, "ratio": (0.9, 1.2), "coverage": (0.78, 0.83)} | numbers) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda forecasts, actuals: (forecasts.drop(columns="0.9"), actuals), "missing column '0.9'"),
        (
            lambda forecasts, actuals: (forecasts, actuals.assign(item_id="x").iloc[:5]),
            "no forecast step has an actual",
        ),
        (lambda forecasts, actuals: (forecasts, pd.concat([actuals, actuals])), "item 's0' has .* twice"),
        (
            lambda forecasts, actuals: (forecasts, actuals.assign(timestamp=actuals.timestamp.dt.tz_localize("UTC"))),
            "times of forecasts and actual values do not compare",
        ),
    ],
)
def test_frames_that_do_not_fit_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        judged(*change(*made(items=2, steps=48)))


def test_the_command_prints_a_table_and_writes_lines(chronomoe, tmp_path):
    forecasts, actuals = made()
    forecasts.to_parquet(tmp_path / "forecasts.parquet")
    actuals.to_csv(tmp_path / "actuals.csv", index=False)
    words = [tmp_path / "forecasts.parquet", tmp_path / "actuals.csv"]
    status, out, err = chronomoe("monitor", *words, "--since", "2026-01-05", "--out", tmp_path / "found.jsonl")
    assert (status, err) == (0, "")
    assert "keep" in out
    (line,) = (tmp_path / "found.jsonl").read_text().splitlines()
    assert json.loads(line)["verdict"] == "keep"
