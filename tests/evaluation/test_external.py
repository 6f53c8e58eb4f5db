"""Forecasters that are not ours: one protocol, the same windows, the same scores."""

import importlib.util

import numpy as np
import pandas as pd
import pytest

from chronomoe.data.domains import Domain
from chronomoe.data.frames import frame_to_series
from chronomoe.data.windows import WindowConfig
from chronomoe.errors import InputError
from chronomoe.evaluation.comparison import NAIVE, Candidate, compare_models
from chronomoe.evaluation.external import _long, classical, compare_forecasters, compare_on_sample, own_forecaster
from chronomoe.evaluation.tasks import make_task
from chronomoe.models.chronos2 import use_exact_group_attention

LEVELS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
needs_statsforecast = pytest.mark.skipif(
    importlib.util.find_spec("statsforecast") is None, reason="statsforecast is not installed: extra 'baselines'"
)


FOLLOWED = {"AutoETS": ("hourly", "daily", "overall"), "AutoTheta": ("daily",)}
"""Where each model follows the season: in four noisy days of hours, AutoTheta's own test finds none."""


@pytest.fixture
def tasks(make_frame):
    """An hourly domain of two series, and a daily one of pairs, with gaps."""
    frame = make_frame(2, 300)
    frame.loc[frame.index % 17 == 0, "target"] = np.nan
    daily = make_frame(2, 200, freq="D", season=7, seed=1).assign(other=lambda frame: -frame.target)
    domains = [
        Domain(name="hourly", series=frame_to_series(frame), seasonality=24),
        Domain(name="daily", series=frame_to_series(daily, target=["target", "other"]), seasonality=7),
    ]
    shape = WindowConfig(context_length=96, horizon=16)
    return {domain.name: make_task(domain, shape, limit=4) for domain in domains}


def last_value(task, levels):
    """A forecaster of three lines: the last value, at every level."""
    last = np.array([pd.Series(past).ffill().iloc[-1] for past in task.contexts])
    return np.broadcast_to(last[:, None, None], (len(last), len(levels), task.horizon)).copy()


def test_any_function_that_gives_quantiles_is_scored_beside_seasonal_naive(tasks):
    found, seconds = compare_forecasters({"last value": last_value}, tasks, levels=LEVELS)
    values = {
        (record["model"], record["metric"]): record["value"]
        for record in found.records()
        if record["domain"] == "overall"
    }
    assert values[NAIVE, "WQL"] == pytest.approx(1)
    assert values["last value", "WQL"] > 0
    assert {record["kind"] for record in found.records()} == {"external", "naive"}
    assert min(seconds.values()) > 0


def test_our_own_models_answer_at_some_of_their_levels(tasks, teacher):
    model = use_exact_group_attention(teacher)
    every, some = (own_forecaster(model)(tasks["daily"], levels) for levels in (LEVELS, [0.1, 0.5, 0.9]))
    np.testing.assert_array_equal(some, every[:, [0, 4, 8]])
    with pytest.raises(InputError, match="not at .0.25."):
        own_forecaster(model)(tasks["daily"], [0.25, 0.5])


def test_a_sample_scores_every_row_on_the_same_windows(tasks, teacher):
    model = use_exact_group_attention(teacher)
    whole = compare_models({"teacher": Candidate(model=model, kind="teacher")}, tasks, levels=LEVELS)
    found, _ = compare_on_sample(whole, {"last value": last_value}, limit=2)
    assert set(found.rows) == {NAIVE, "teacher", "last value"}
    for domain, task in found.tasks.items():
        assert len(task.windows) == 2
        assert set(task.places) <= set(tasks[domain].places)
        slow = compare_models({"teacher": Candidate(model=model, kind="teacher")}, {domain: task}, levels=LEVELS)
        for name in (NAIVE, "teacher"):
            np.testing.assert_allclose(
                found.rows[name].test[domain].quantile_loss, slow.rows[name].test[domain].quantile_loss, rtol=1e-4
            )


def test_a_sample_as_large_as_the_task_is_the_task(tasks):
    whole, _ = compare_forecasters({"last value": last_value}, tasks, levels=LEVELS)
    found, _ = compare_on_sample(whole, {"again": last_value}, limit=99)
    for domain in tasks:
        for one, other in zip(found.rows["again"].test[domain], whole.rows["last value"].test[domain], strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.skipif(importlib.util.find_spec("statsforecast") is not None, reason="statsforecast is installed")
def test_without_statsforecast_its_models_are_refused_with_the_command_that_installs_it():
    with pytest.raises(InputError, match=r"needs statsforecast.*pip install 'chronomoe\[baselines\]'"):
        classical("AutoETS")


@needs_statsforecast
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["AutoETS", "AutoTheta"])
def test_classical_models_forecast_quantiles_in_order_around_a_season(tasks, name):
    for task in tasks.values():
        quantiles = classical(name)(task, LEVELS)
        assert quantiles.shape == (len(task.target), len(LEVELS), task.horizon)
        assert np.isfinite(quantiles).all()
        assert (np.diff(quantiles, axis=1) >= 0).all()
    found, _ = compare_forecasters({name: classical(name)}, tasks, levels=LEVELS)
    loss = {
        (record["model"], record["domain"]): record["value"] for record in found.records() if record["metric"] == "WQL"
    }
    for domain in FOLLOWED[name]:
        assert loss[name, domain] < 1.2 * loss[NAIVE, domain]


@needs_statsforecast
@pytest.mark.filterwarnings("ignore")
def test_quantiles_of_a_classical_model_are_those_of_its_intervals(tasks):
    from statsforecast.models import AutoETS

    task = tasks["daily"]
    past = task.windows[0].context[0].astype(np.float64)
    plain = AutoETS(season_length=7).forecast(y=past, h=task.horizon, level=[80])
    found = classical("AutoETS")(task, [0.1, 0.5, 0.9])[0]
    np.testing.assert_allclose(found, np.stack([plain["lo-80"], plain["mean"], plain["hi-80"]]), rtol=1e-5)


def test_a_variate_that_was_never_observed_is_a_constant_to_classical_models(make_frame):
    frame = make_frame(1, 200, freq="D", season=7).assign(other=np.nan)
    frame.loc[frame.index >= 180, "other"] = 1.0
    domain = Domain(name="pairs", series=frame_to_series(frame, target=["target", "other"]), seasonality=7)
    task = make_task(domain, WindowConfig(context_length=96, horizon=16), limit=1)
    assert np.isnan(task.contexts[1]).all()
    assert (_long(task).query("unique_id == 1")["y"] == 0).all()
