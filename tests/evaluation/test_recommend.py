import numpy as np
import pytest

from chronomoe.evaluation.claims import claims, equal_generalist, speed_claim
from chronomoe.evaluation.comparison import Comparison, Row
from chronomoe.evaluation.cost import Efficiency
from chronomoe.evaluation.metrics import score_windows
from chronomoe.evaluation.recommend import recommend

RNG = np.random.default_rng(0)
TARGET = RNG.normal(10, 1, (80, 6))
NOISE = RNG.normal(0, 1, (80, 1, 6))
FLOPS = {"mixture": 1.1e6, "own single": 1e6, "generalist-full": 1e6, "generalist-wide": 2e6}


def scored(error, *, luck=0.0, seed=0):
    """Scores whose errors are a multiple of the same noise, and of some luck of one's own in each window."""
    own = np.random.default_rng(seed).normal(0, luck, (80, 1, 1)) if luck else 0.0
    quantiles = np.repeat(TARGET[:, None] + (error + own) * NOISE, 3, axis=1)
    series = np.arange(80) // 8
    return {"a": score_windows(quantiles, TARGET, levels=(0.1, 0.5, 0.9), seasonal_error=np.ones(80), series=series)}


def row(kind, validation, test=None):
    return Row(kind, (), test=test or validation, validation=validation)


def recommended(rows, flops):
    rows = {"seasonal naive": row("naive", scored(2.0)), **rows}
    costs = [{"model": name, "flops": count} for name, count in flops.items()]
    return recommend(rows, costs, list(flops), draws=200, seed=0)


def test_a_model_that_is_clearly_better_is_recommended_whatever_it_costs():
    rows = {"mixture": row("mixture", scored(0.5)), "generalist": row("generalist", scored(1.0))}
    found = recommended(rows, {"mixture": 9e6, "generalist": 1e6})
    assert (found["model"], found["best"], found["rival"]) == ("mixture", "mixture", "generalist")
    assert found["sure"] == 1
    assert found["error"] == pytest.approx(0.25)


def test_of_models_within_noise_the_cheapest_is_recommended():
    rows = {
        "mixture": row("mixture", scored(1.0, luck=0.4, seed=1)),
        "generalist": row("generalist", scored(1.001, luck=0.4, seed=1)),
    }
    for cheap, dear in (("mixture", "generalist"), ("generalist", "mixture")):
        rows["mixture"] = row("mixture", scored(1.0, luck=0.4, seed=2))
        assert recommended(rows, {cheap: 1e6, dear: 2e6})["model"] == cheap


def test_test_windows_have_no_say():
    rows = {
        "mixture": row("mixture", scored(0.5), test=scored(3.0)),
        "generalist": row("generalist", scored(1.0), test=scored(0.1)),
    }
    assert recommended(rows, {"mixture": 2e6, "generalist": 1e6})["model"] == "mixture"


def test_the_only_model_is_recommended():
    found = recommended({"upcycled": row("upcycled", scored(1.0))}, {"upcycled": 1e6})
    assert (found["model"], found["sure"]) == ("upcycled", 1)


@pytest.fixture
def rows():
    return {
        "mixture": row("mixture", scored(0.90)),
        "own single": row("lookup", scored(0.95)),
        "generalist-full": row("generalist", scored(1.0)),
        "generalist-wide": row("generalist", scored(0.92)),
        "simple average of experts": row("average", scored(1.2)),
        "teacher": row("teacher", scored(1.0)),
    }


def claimed(rows, held_out=None):
    costs = [{"model": name, "flops": count} for name, count in FLOPS.items()]
    home, unseen = (part and Comparison({}, {}, [], rows=part) for part in (rows, held_out))
    return claims(home, unseen, costs, ["mixture"], draws=100, seed=0)


def test_own_singles_come_first_and_the_claim_says_how_equal_compute_is(rows):
    found = [claim for claim in claimed(rows) if claim["metric"] == "WQL"]
    assert found[0]["claim"] == "mixture against each domain's own single, 0.91 times its active compute"
    assert (found[0]["against"], found[0]["target_ratio"]) == ("own single", 0.98)
    assert found[0]["ratio"] == pytest.approx(0.90 / 0.95)
    targets = {claim["against"]: claim["target_ratio"] for claim in found}
    assert (targets["generalist-full"], targets["generalist-wide"]) == (0.95, 1.0)


def test_the_equal_generalist_is_the_one_of_the_nearest_compute(rows):
    assert equal_generalist("mixture", rows, FLOPS) == "generalist-full"
    assert equal_generalist("mixture", rows, FLOPS | {"mixture": 1.9e6}) == "generalist-wide"


def test_claims_for_unseen_domains_need_unseen_domains(rows):
    assert not [claim for claim in claimed(rows) if claim["unseen"]]
    found = claimed(rows, {"mixture": rows["mixture"], "average single": row("average", scored(1.5))})
    (claim,) = [claim for claim in found if claim["unseen"] and claim["metric"] == "MAE"]
    assert claim["claim"].startswith("mixture against the average single, unseen domains")
    assert claim["ratio"] == pytest.approx(0.6)


@pytest.mark.parametrize(("parameters", "target"), [(5e6, None), (120e6, 18.0)])
def test_the_target_of_speed_is_that_of_a_teacher_of_full_size(parameters, target):
    sizes = {"latency_p50_ms": 1.0, "latency_p95_ms": 1.0, "memory_mb": 1.0, "checkpoint_mb": 1.0}
    sizes |= {"batch_size": 64, "threads": 1}
    measured = {
        "slow": Efficiency(parameters=int(parameters), batch_seconds=(2.0, 2.2, 2.4), **sizes),
        "fast": Efficiency(parameters=10**6, batch_seconds=(0.1, 0.11, 0.12), **sizes),
    }
    claim = speed_claim("fast", measured, "slow", draws=100, seed=0)
    assert claim["low"] <= claim["ratio"] == pytest.approx(20)
    assert claim["target_ratio"] == target
