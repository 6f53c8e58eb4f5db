import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch

from chronomoe.data.domains import Domain
from chronomoe.data.frames import frame_to_series
from chronomoe.data.windows import WindowConfig
from chronomoe.evaluation.baselines import ensemble, greedy_portfolio, rerouted
from chronomoe.evaluation.comparison import NAIVE, Candidate, compare_models, kind_of
from chronomoe.evaluation.cost import cost_records, count_parameters, varied_context
from chronomoe.evaluation.examples import drawn_forecasts
from chronomoe.evaluation.metrics import METRICS, aggregate
from chronomoe.evaluation.routing import confidence_bins, routing_summary, task_routing
from chronomoe.evaluation.tasks import make_task, score
from chronomoe.models.chronos2 import use_exact_group_attention
from chronomoe.models.mixture.router import RoutingConfig
from chronomoe.models.sparse.config import MoEConfig
from chronomoe.models.sparse.insertion import MoEEnhancedChronos2, MoEInsertionConfig
from chronomoe.models.sparse.upcycling import upcycle
from chronomoe.pipeline import ChronoMoEPipeline

LEVELS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
EXPERTS = ["power", "traffic", "generalist", "retail"]
WINDOWS = WindowConfig(context_length=64, horizon=16)
ROWS = {
    *("seasonal naive", "expert/hourly", "expert/daily", "base", "single/hourly", "single/daily", "generalist-full"),
    *(
        "mixture",
        "mixture K=1",
        "mixture, all experts",
        "mixture, dynamic K",
        "simple average of experts",
        "oracle over experts",
    ),
    *("own single", "own expert", "average single", "best single on validation", "best expert on validation"),
    "greedy portfolio",
}


@pytest.fixture
def domains(make_frame):
    """An hourly domain, and a daily one of two variates with a known covariate."""
    hourly = frame_to_series(make_frame(2, 300))
    daily = make_frame(2, 200, freq="D", season=7, covariate="promo", seed=1).assign(other=lambda frame: -frame.target)
    pairs = frame_to_series(daily, target=["target", "other"], known_covariates=["promo"])
    return [
        Domain(name="hourly", series=hourly, seasonality=24),
        Domain(name="daily", series=pairs, seasonality=7),
    ]


@pytest.fixture
def tasks(domains):
    return {domain.name: make_task(domain, WINDOWS) for domain in domains}


@pytest.fixture
def validation(domains):
    return {domain.name: make_task(domain, WINDOWS, part="validation") for domain in domains}


@pytest.fixture
def mixture(make_mixture):
    return make_mixture(routing={"top_k": 2, "threshold": None})


@pytest.fixture
def candidates(mixture):
    """Experts and singles of both domains, a generalist, and the mixture of the experts."""
    power, traffic, generalist, retail = mixture.experts
    made = {
        "expert/hourly": Candidate(model=power, kind="expert", domain="hourly", training=0.2, needs=("base",)),
        "expert/daily": Candidate(model=traffic, kind="expert", domain="daily", training=0.2, needs=("base",)),
        "base": Candidate(model=generalist, kind="expert", training=0.6, core_seconds=3.0),
        "single/hourly": Candidate(model=retail, kind="single", domain="hourly", training=0.5),
        "single/daily": Candidate(model=power, kind="single", domain="daily", training=0.5),
        "generalist-full": Candidate(model=traffic, kind="generalist", training=1.0),
    }
    experts = ("expert/hourly", "expert/daily", "base")
    return made | {"mixture": Candidate(model=mixture, kind="mixture", core_seconds=1.0, needs=experts)}


@pytest.fixture
def comparison(tasks, validation, candidates):
    return compare_models(candidates, tasks, validation, levels=LEVELS, top_k=(1, 2, 9), drawn=["mixture"])


@pytest.fixture
def table(comparison):
    return pd.DataFrame(comparison.records()).set_index(["model", "domain", "metric"])["value"]


def test_every_row_has_every_metric_in_every_domain_and_overall(comparison, table):
    assert set(comparison.rows) == ROWS
    assert len(table) == len(ROWS) * 3 * len(METRICS)
    assert not table.index.duplicated().any()
    assert np.isfinite(table).all()


def test_own_models_are_those_of_the_domain_by_name(table):
    for kind in ("single", "expert"):
        for domain in ("hourly", "daily"):
            assert table[f"own {kind}", domain, "WQL"] == table[f"{kind}/{domain}", domain, "WQL"]


def test_the_average_single_is_the_mean_of_the_errors_of_all(comparison):
    losses = [comparison.rows[f"single/{name}"].test["daily"].quantile_loss for name in ("hourly", "daily")]
    found = comparison.rows["average single"].test["daily"].quantile_loss
    np.testing.assert_allclose(found, np.mean(losses, axis=0))


def test_choices_are_made_on_validation_windows(comparison, table):
    for domain in ("hourly", "daily"):
        names = ["expert/hourly", "expert/daily", "base"]
        best = min(names, key=lambda name: aggregate(comparison.rows[name].validation[domain])["WQL"])
        assert table["best expert on validation", domain, "WQL"] == table[best, domain, "WQL"]


def test_no_test_window_decides_a_choice(comparison, tasks, validation, candidates):
    spoilt = {name: dataclasses.replace(task, target=task.target[::-1] * 7 + 3) for name, task in tasks.items()}
    again = compare_models(candidates, spoilt, validation, levels=LEVELS)
    for name in ("best single on validation", "best expert on validation", "greedy portfolio"):
        assert again.rows[name].runs == comparison.rows[name].runs


def test_without_validation_windows_nothing_is_chosen(tasks, candidates):
    found = compare_models(candidates, tasks, levels=LEVELS)
    assert not [name for name, row in found.rows.items() if row.kind == "chosen"]


def test_a_mixture_of_fixed_size_is_that_mixture(comparison, tasks, mixture):
    fixed = rerouted(mixture, RoutingConfig(top_k=1, threshold=None))
    alone = compare_models({"one": Candidate(model=fixed, kind="mixture")}, tasks, levels=LEVELS)
    for domain in tasks:
        np.testing.assert_allclose(
            alone.rows["one"].test[domain].quantile_loss,
            comparison.rows["mixture K=1"].test[domain].quantile_loss,
            rtol=1e-6,  # experts forecast these rows in another batch
        )
    assert mixture.top_k == 2


@pytest.mark.parametrize(
    ("name", "top_k", "threshold"),
    [("mixture K=1", 1, None), ("mixture, all experts", 4, None), ("mixture, dynamic K", 2, 0.8)],
)
def test_a_routing_that_is_a_row_can_be_deployed(comparison, mixture, tmp_path, name, top_k, threshold):
    ChronoMoEPipeline(comparison.models[name].model).save_pretrained(tmp_path / "recommended")
    loaded = ChronoMoEPipeline.from_pretrained(tmp_path / "recommended").model.moe.routing
    assert (loaded.top_k, loaded.threshold) == (top_k, threshold)
    assert (mixture.top_k, mixture.moe.routing.threshold) == (2, None)


def test_training_counts_everything_a_row_was_made_from_once(comparison):
    assert comparison.training("mixture") == (pytest.approx(1.0), pytest.approx(4.0))
    assert comparison.training("own expert") == (pytest.approx(1.0), pytest.approx(3.0))
    assert comparison.training("own single") == (pytest.approx(1.0), None)
    assert comparison.training("oracle over experts") == (None, None)


def test_costs_are_those_of_the_mean_number_of_experts(comparison, mixture):
    costs = cost_by_row(comparison)
    found = {name: costs[name]["experts"] for name in ("mixture", "mixture K=1", "mixture, all experts")}
    assert found == pytest.approx({"mixture": 2, "mixture K=1": 1, "mixture, all experts": 4})
    parts = sum(count_parameters(part) for part in (*mixture.experts, mixture.router))
    assert costs["mixture, all experts"]["active_parameters"] == parts
    own = [costs[f"expert/{domain}"]["flops"] for domain in ("hourly", "daily")]
    assert costs["own expert"]["flops"] == pytest.approx(np.mean(own))
    assert "oracle over experts" not in costs


def cost_by_row(comparison):
    context = varied_context(2, context_length=64)
    return {cost["model"]: cost for cost in cost_records(comparison, {}, context, horizon=16)}


def test_a_dynamic_mixture_costs_what_it_uses(tasks, mixture):
    dynamic = rerouted(mixture, RoutingConfig(top_k=4, threshold=0.5))
    candidates = {"mixture": Candidate(model=dynamic, kind="mixture")}
    costs = cost_by_row(compare_models(candidates, tasks, levels=LEVELS, top_k=(1, 4)))
    assert 1 <= costs["mixture"]["experts"] < 4
    assert costs["mixture"]["flops"] < costs["mixture, all experts"]["flops"]


@pytest.mark.parametrize("metric", ["WQL", "MASE", "SQL", "MAE", "MSE"])
def test_overall_is_the_geometric_mean_of_ratios_to_seasonal_naive(table, metric):
    for name in ("mixture", "greedy portfolio", "oracle over experts"):
        ratios = [table[name, domain, metric] / table[NAIVE, domain, metric] for domain in ("hourly", "daily")]
        assert table[name, "overall", metric] == pytest.approx((ratios[0] * ratios[1]) ** 0.5)
    assert table[NAIVE, "overall", metric] == pytest.approx(1)


@pytest.mark.parametrize("metric", ["coverage80", "bias"])
def test_overall_coverage_and_bias_are_plain_means(table, metric):
    parts = [table["mixture", domain, metric] for domain in ("hourly", "daily")]
    assert table["mixture", "overall", metric] == pytest.approx(sum(parts) / 2)


def test_the_oracle_is_at_least_as_good_as_the_best_expert_in_every_domain(table):
    for domain in ("hourly", "daily"):
        best = min(table[name, domain, "WQL"] for name in ("expert/hourly", "expert/daily", "base"))
        assert table["oracle over experts", domain, "WQL"] <= best


def test_records_are_json_without_nan(comparison):
    for record in comparison.records():
        json.dumps(record, allow_nan=False)


def test_a_metric_that_does_not_exist_in_a_domain_is_left_out(make_frame, teacher):
    """A constant series has no seasonal error to scale by, and a seasonal naive forecast without error."""
    frame = make_frame(1, 200).assign(target=3.0)
    task = make_task(Domain(name="flat", series=frame_to_series(frame), seasonality=24), WINDOWS)
    comparison = compare_models({"teacher": Candidate(model=teacher, kind="teacher")}, {"flat": task}, levels=LEVELS)
    found = {(record["domain"], record["metric"]) for record in comparison.records() if record["model"] == "teacher"}
    assert ("flat", "WQL") in found
    assert ("flat", "MASE") not in found
    assert ("overall", "WQL") not in found


def test_each_window_is_routed_as_it_is_alone(mixture, tasks):
    for task in tasks.values():
        together, alone = task_routing(mixture, task), task_routing(mixture, task, batch_size=1)
        assert len(together.expert) == len(task.windows)
        assert torch.equal(together.expert, alone.expert)
        torch.testing.assert_close(together.gate, alone.gate, rtol=1e-4, atol=1e-4)


def test_routing_shares_add_up_and_entropy_is_a_share(mixture, comparison):
    summary = routing_summary(mixture, comparison.rows["mixture"].routed)
    assert summary["experts"] == EXPERTS
    for shares in summary["domains"].values():
        assert sum(shares["share"]) == pytest.approx(1)
        assert sum(shares["gate"]) == pytest.approx(1)
        assert shares["experts"] == pytest.approx(2)
        assert 0 <= shares["entropy"] <= 1


def test_confidence_splits_all_windows_by_how_sure_the_router_is(comparison, tasks):
    row, best = comparison.rows["mixture K=1"], comparison.rows["oracle over experts"]
    bins = confidence_bins(tasks, row.routed, row.test, best.test)
    assert sum(part["windows"] for part in bins) == sum(len(task.target) for task in tasks.values())
    assert [part["low"] for part in bins] == sorted(part["low"] for part in bins)


def test_drawn_forecasts_are_those_of_their_window(tasks, comparison):
    drawn = drawn_forecasts(comparison, "mixture", places=(0.0, 0.6))
    assert [one["domain"] for one in drawn] == ["hourly"] * 4 + ["daily"] * 4
    for one in drawn:
        series = next(part for part in tasks[one["domain"]].domain.series if part.item_id == one["item_id"])
        stamps = list(map(str, series.timestamps()))
        cutoff = stamps.index(one["target_timestamps"][0])
        assert stamps[cutoff - 1] == one["context_timestamps"][-1]
        rows = [row[cutoff : cutoff + 16].astype(np.float32).tolist() for row in series.target]
        assert one["target"] in rows
        assert np.shape(one["models"]["mixture"]) == (9, 16)
        assert sum(one["gates"]) == pytest.approx(1)
        assert set(one["experts"]) <= set(EXPERTS)


@pytest.mark.parametrize(("why", "extreme"), [("best", min), ("worst", max)])
def test_the_best_and_the_worst_window_of_each_domain_are_drawn_too(comparison, tasks, why, extreme):
    drawn = [one for one in drawn_forecasts(comparison, "mixture") if one["why"] == why]
    assert len(drawn) == len(tasks)
    for one in drawn:
        scores = comparison.rows["mixture"].test[one["domain"]]
        assert one["SQL"] == pytest.approx(extreme(scores.scaled_quantile_loss / scores.scaled_observed))


def test_a_portfolio_joins_members_whose_errors_cancel(tasks):
    rng, task = np.random.default_rng(0), tasks["hourly"]
    noise = {name: rng.normal(shift, 1.0, (len(task.target), 9, 16)) for name, shift in (("low", -1.0), ("high", 1.0))}
    forecasts = {name: task.target[:, None] + part for name, part in noise.items()} | {"far": np.full((9,), 99.0)}
    forecasts["far"] = task.target[:, None] + np.full((1, 9, 1), 99.0)
    chosen = greedy_portfolio(forecasts, task, levels=LEVELS)
    assert set(chosen) == {"low", "high"}
    together, low, high = (
        aggregate(score(task, ensemble(forecasts, members), levels=LEVELS))["WQL"]
        for members in (chosen, ["low"], ["high"])
    )
    assert together < min(low, high)


def test_a_checkpoint_is_called_what_it_is(mixture, teacher):
    dense = use_exact_group_attention(teacher)
    layers = MoEConfig(num_experts=2, top_k=1)
    assert kind_of(mixture) == "mixture"
    assert kind_of(dense) == "student"
    assert kind_of(upcycle(dense, layers)) == "upcycled"
    assert kind_of(MoEEnhancedChronos2(dense, MoEInsertionConfig(after=(0,), layer=layers))) == "expanded"


def test_held_out_domains_have_averages_and_nothing_chosen_or_looked_up(candidates, tasks):
    renamed = {f"other {name}": task for name, task in tasks.items()}
    rows = compare_models(candidates, renamed, levels=LEVELS).rows
    assert {"mixture", "average single", "average expert", "generalist-full"} <= set(rows)
    assert not [row for row in rows.values() if row.kind in ("chosen", "lookup")]
