import json

import numpy as np
import pandas as pd
import pytest
import torch

from chronomoe.data.domains import Domain
from chronomoe.data.frames import frame_to_series
from chronomoe.data.windows import WindowConfig
from chronomoe.evaluation.comparison import NAIVE, Comparison, drawn_forecasts, routing_summary, task_routing
from chronomoe.evaluation.metrics import METRICS
from chronomoe.evaluation.tasks import make_task

LEVELS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
EXPERTS = ["power", "traffic", "generalist", "retail"]


@pytest.fixture
def tasks(make_frame):
    """An hourly domain, and a daily one of two variates with a known covariate."""
    hourly = frame_to_series(make_frame(2, 300))
    daily = make_frame(2, 200, freq="D", season=7, covariate="promo", seed=1).assign(other=lambda frame: -frame.target)
    pairs = frame_to_series(daily, target=["target", "other"], known_covariates=["promo"])
    config = WindowConfig(context_length=64, horizon=16)
    return {
        "hourly": make_task(Domain(name="hourly", series=hourly, seasonality=24), config),
        "daily": make_task(Domain(name="daily", series=pairs, seasonality=7), config),
    }


@pytest.fixture
def mixture(make_mixture):
    return make_mixture(routing={"top_k": 2})


@pytest.fixture
def comparison(tasks, mixture):
    comparison = Comparison(tasks, LEVELS)
    comparison.add_naive()
    for name, expert in zip(EXPERTS, mixture.experts, strict=True):
        comparison.add(f"expert/{name}", "expert", expert)
    comparison.add("mixture", "mixture", mixture)
    comparison.add_average(mixture)
    comparison.add_oracle([f"expert/{name}" for name in EXPERTS])
    return comparison


@pytest.fixture
def table(comparison):
    return pd.DataFrame(comparison.records()).set_index(["model", "domain", "metric"])["value"]


def test_every_model_has_every_metric_in_every_domain_and_overall(comparison, table):
    assert len(comparison.entries) == 8
    assert len(table) == 8 * 3 * len(METRICS)
    assert not table.index.duplicated().any()
    assert np.isfinite(table).all()


@pytest.mark.parametrize("metric", ["WQL", "MASE", "SQL", "MAE", "MSE"])
def test_overall_is_the_geometric_mean_of_ratios_to_seasonal_naive(table, metric):
    for name in ("mixture", "expert/power", "oracle over experts"):
        ratios = [table[name, domain, metric] / table[NAIVE, domain, metric] for domain in ("hourly", "daily")]
        assert table[name, "overall", metric] == pytest.approx((ratios[0] * ratios[1]) ** 0.5)
    assert table[NAIVE, "overall", metric] == pytest.approx(1)


def test_overall_coverage_is_a_plain_mean(table):
    parts = [table["mixture", domain, "coverage80"] for domain in ("hourly", "daily")]
    assert table["mixture", "overall", "coverage80"] == pytest.approx(sum(parts) / 2)


def test_the_oracle_is_at_least_as_good_as_the_best_expert_in_every_domain(table):
    for domain in ("hourly", "daily"):
        best = min(table[f"expert/{name}", domain, "WQL"] for name in EXPERTS)
        assert table["oracle over experts", domain, "WQL"] <= best


def test_records_are_json_without_nan(comparison):
    for record in comparison.records():
        json.dumps(record, allow_nan=False)


def test_a_metric_that_does_not_exist_in_a_domain_is_left_out(make_frame, teacher):
    """A constant series has no seasonal error to scale by, and a seasonal naive forecast without error."""
    frame = make_frame(1, 200).assign(target=3.0)
    domain = Domain(name="flat", series=frame_to_series(frame), seasonality=24)
    comparison = Comparison({"flat": make_task(domain, WindowConfig(context_length=64, horizon=16))}, LEVELS)
    comparison.add_naive()
    comparison.add("teacher", "teacher", teacher)
    found = {(record["domain"], record["metric"]) for record in comparison.records() if record["model"] == "teacher"}
    assert ("flat", "WQL") in found
    assert ("flat", "MASE") not in found
    assert ("overall", "WQL") not in found


def test_an_interval_contains_its_ratio_and_a_model_ties_with_itself(comparison):
    against = comparison.average_of("expert")
    options = {"target": 0.9, "draws": 200, "seed": 0}
    claim = comparison.interval("better", "mixture", against, "WQL", **options)
    assert claim["low"] < claim["ratio"] < claim["high"]
    assert claim["target"] == "at most 0.90"
    own = comparison.interval("equal", "mixture", comparison.entries["mixture"].scores, "MAE", **options)
    assert own["low"] == own["ratio"] == own["high"] == pytest.approx(1)


def test_the_average_of_a_kind_is_the_mean_of_its_errors(comparison):
    losses = [comparison.entries[f"expert/{name}"].scores["daily"].quantile_loss for name in EXPERTS]
    np.testing.assert_allclose(comparison.average_of("expert")["daily"].quantile_loss, np.mean(losses, axis=0))


def test_each_window_is_routed_as_it_is_alone(mixture, tasks):
    for task in tasks.values():
        together, alone = task_routing(mixture, task), task_routing(mixture, task, batch_size=1)
        assert len(together) == len(task.windows)
        for one, other in zip(together, alone, strict=True):
            assert torch.equal(one.expert, other.expert)
            torch.testing.assert_close(one.gate, other.gate, rtol=1e-4, atol=1e-4)


def test_routing_shares_add_up_and_entropy_is_a_share(mixture, tasks):
    summary = routing_summary(mixture, tasks)
    assert summary["experts"] == EXPERTS
    for shares in summary["domains"].values():
        assert sum(shares["share"]) == pytest.approx(1)
        assert sum(shares["gate"]) == pytest.approx(1)
        assert max(shares["share"]) <= 0.5 + 1e-6  # of two choices a window, no expert can be both
        assert 0 <= shares["entropy"] <= 1


def test_drawn_forecasts_are_those_of_their_window(mixture, tasks, comparison):
    forecasts = {"mixture": comparison.add("again", "mixture", mixture)}
    drawn = drawn_forecasts(mixture, tasks, forecasts, levels=LEVELS, places=(0.0, 0.6))
    assert [one["domain"] for one in drawn] == ["hourly", "hourly", "daily", "daily"]
    for one in drawn:
        series = next(part for part in tasks[one["domain"]].domain.series if part.item_id == one["item_id"])
        stamps = list(map(str, series.timestamps()))
        cutoff = stamps.index(one["target_timestamps"][0])
        assert stamps[cutoff - 1] == one["context_timestamps"][-1]
        rows = [row[cutoff : cutoff + 16].tolist() for row in series.target]
        assert one["target"] in rows
        assert np.shape(one["models"]["mixture"]) == (9, 16)
        assert sum(one["gates"]) == pytest.approx(1)
        assert set(one["experts"]) <= set(EXPERTS)
