"""What our pipeline promises and the stock one does not: quantiles in order, constants forecast as constants."""

import numpy as np
import pandas as pd
import pytest
import torch
from chronos import Chronos2Pipeline
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chronomoe import ChronoMoEPipeline, MoEConfig, MoEEnhancedChronos2, MoEInsertionConfig, load_teacher, upcycle
from chronomoe.evaluation.metrics import score_windows
from chronomoe.models.promises import constant_level, put_in_order
from moe_models import train_by_chance

LEVELS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
HORIZON = 20
PASSES = [HORIZON, 96]
"""One pass of the model, and three."""
pytestmark = pytest.mark.filterwarnings("ignore:We recommend keeping prediction length")


@pytest.fixture
def dense(make_teacher):
    return make_teacher(num_layers=2, forecasting={"max_output_patches": 2})


@pytest.fixture(params=["dense", "mixture", "upcycled", "enhanced"])
def model(request, dense, make_mixture, experts):
    """A dense model, and one of each route."""
    if request.param == "mixture":
        for expert in experts.values():
            expert.chronos_config.max_output_patches = 2
        return make_mixture(members=experts).eval()
    return {
        "dense": lambda: dense,
        "upcycled": lambda: train_by_chance(upcycle(dense, MoEConfig(num_experts=4, top_k=2))),
        "enhanced": lambda: train_by_chance(MoEEnhancedChronos2(dense, MoEInsertionConfig(after=(1, 0)))),
    }[request.param]().eval()


@pytest.fixture
def pipeline(model):
    return ChronoMoEPipeline(model)


@pytest.fixture
def series(make_context):
    return make_context(9, 80)


def forecast(pipeline, inputs, horizon=HORIZON, **options):
    return torch.cat(pipeline.predict(inputs, prediction_length=horizon, **options))


def flat(level, length=80):
    return np.full(length, level, dtype=np.float32)


@pytest.mark.parametrize("horizon", PASSES)
def test_a_forecast_is_the_stock_one_sorted_and_its_bits_where_nothing_crosses(model, series, horizon):
    ours = forecast(ChronoMoEPipeline(model), series[:, None], horizon)
    stock = forecast(Chronos2Pipeline(model), series[:, None], horizon)
    assert torch.equal(ours, stock.sort(dim=1).values)
    ordered = (stock.diff(dim=1) >= 0).all(dim=1)
    assert not ordered.all()  # the comparison means something
    assert torch.equal(ours.mT[ordered], stock.mT[ordered])


def test_levels_may_come_in_any_order(dense, series):
    dense.chronos_config.quantiles = [0.5, *[level for level in LEVELS if level != 0.5]]
    found = forecast(ChronoMoEPipeline(dense), series[:, None])
    stock = forecast(Chronos2Pipeline(dense), series[:, None]).sort(dim=1).values
    assert torch.equal(found[:, 0], stock[:, LEVELS.index(0.5)])
    assert torch.equal(found[:, 1:], stock[:, [place for place, level in enumerate(LEVELS) if level != 0.5]])


def test_sorting_never_raises_the_mean_quantile_loss():
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(200, 9, 5, generator=generator)
    target = torch.randn(200, 5, generator=generator).numpy()
    never = torch.full((200,), torch.nan)
    before, after = (
        score_windows(
            quantiles.numpy(), target, levels=LEVELS, seasonal_error=np.ones(200), series=np.arange(200)
        ).quantile_loss
        for quantiles in (raw, put_in_order(raw, level=never))
    )
    assert (after <= before + 1e-6).all()
    assert after.sum() < 0.9 * before.sum()


def test_predict_quantiles_and_predict_df_keep_the_promises(pipeline, series):
    levels = [0.05, 0.1, 0.15, 0.5, 0.55, 0.95]
    values = torch.cat([series, torch.full((1, 80), 0.1)])
    quantiles, _ = pipeline.predict_quantiles(values[:, None], prediction_length=96, quantile_levels=levels)
    quantiles = torch.cat(quantiles)
    assert (quantiles.diff(dim=-1) >= 0).all()
    assert (quantiles[-1] == torch.tensor(0.1)).all()
    stamps = pd.date_range("2024-01-01", periods=80, freq="h")
    frame = pd.concat(
        pd.DataFrame({"item_id": f"item {row}", "timestamp": stamps, "target": line})
        for row, line in enumerate(values.numpy())
    )
    table = pipeline.predict_df(frame, prediction_length=HORIZON, quantile_levels=levels)
    numbers = table[[str(level) for level in levels]].to_numpy()
    assert (np.diff(numbers, axis=1) >= 0).all()
    assert (numbers[-HORIZON:] == np.float32(0.1)).all()
    assert (table["predictions"].to_numpy()[-HORIZON:] == np.float32(0.1)).all()


@pytest.mark.parametrize("horizon", PASSES)
def test_a_constant_beside_others_in_a_batch_is_constant_and_leaves_them_alone(pipeline, series, horizon):
    gaps = flat(3.7)
    gaps[:30] = gaps[70:] = np.nan
    inputs = [series[0].numpy(), gaps, series[1].numpy(), flat(-2.0, 1), flat(0.0)]
    found = forecast(pipeline, inputs, horizon)
    for row, level in ((1, 3.7), (3, -2.0), (4, 0.0)):
        assert torch.equal(found[row], torch.full_like(found[row], level))
    assert (found[[0, 2]].std(dim=-1) > 1e-3).all()


def test_a_series_without_values_is_no_constant(model):
    gaps = flat(np.nan)
    ours, stock = (forecast(each(model), [gaps]) for each in (ChronoMoEPipeline, Chronos2Pipeline))
    assert torch.equal(ours, stock.sort(dim=1).values)


def test_only_the_context_that_the_model_reads_must_be_constant(pipeline):
    changed = np.concatenate([flat(5.0, 10), flat(1.0, 30)])
    assert (forecast(pipeline, [changed], context_length=30) == 1.0).all()
    assert (forecast(pipeline, [changed], context_length=31) != 1.0).any()


CONSTANTS = {
    "all variates": {"target": np.stack([flat(1.0), flat(2.0)])},
    "with a past covariate": {"target": flat(1.0), "past_covariates": {"price": flat(2.0)}},
    "with a known covariate": {
        "target": flat(1.0),
        "past_covariates": {"price": flat(2.0)},
        "future_covariates": {"price": flat(2.0, HORIZON)},
    },
}
MOVED = {
    "another variate": {"target": np.stack([flat(1.0), np.arange(80, dtype=np.float32)])},
    "a past covariate": {"target": flat(1.0), "past_covariates": {"price": np.arange(80, dtype=np.float32)}},
    "a known covariate that moved before": {
        "target": flat(1.0),
        "past_covariates": {"price": np.arange(80, dtype=np.float32)},
        "future_covariates": {"price": flat(79.0, HORIZON)},
    },
    "a known covariate that will move": {
        "target": flat(1.0),
        "past_covariates": {"price": flat(2.0)},
        "future_covariates": {"price": np.arange(HORIZON, dtype=np.float32)},
    },
}


@pytest.mark.parametrize("kind", CONSTANTS)
def test_a_group_of_constants_is_forecast_as_constants(pipeline, kind):
    constant = CONSTANTS[kind]
    varied = {**constant, "target": constant["target"] * np.sin(np.arange(80, dtype=np.float32))}  # another group
    found, other = pipeline.predict([constant, varied], prediction_length=HORIZON)
    assert torch.equal(found, torch.arange(1.0, len(found) + 1)[:, None, None].expand_as(found))
    assert (other.std(dim=-1) > 1e-3).all()


@pytest.mark.parametrize("kind", MOVED)
def test_what_may_move_a_constant_leaves_the_forecast_to_the_model(model, kind):
    ours, stock = (forecast(each(model), [MOVED[kind]]) for each in (ChronoMoEPipeline, Chronos2Pipeline))
    assert torch.equal(ours, stock.sort(dim=1).values)
    assert (ours[0] != 1.0).any()


def test_cross_learning_makes_one_group_of_the_batch(pipeline, series):
    mixed = [flat(1.0), series[0].numpy()]
    assert (forecast(pipeline, mixed, cross_learning=True)[0] != 1.0).any()
    assert (forecast(pipeline, [flat(1.0), flat(1.0)], cross_learning=True) == 1.0).all()


class Work(TorchDispatchMode):
    """Counts the numbers that all operations within it write."""

    def __init__(self):
        super().__init__()
        self.written = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.written += sum(leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor))
        return made


def test_the_promises_cost_less_than_a_hundredth_of_a_forecast():
    pipeline = ChronoMoEPipeline(load_teacher("tiny"))
    values = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).cumsum(dim=1)
    with Work() as whole:
        quantiles = forecast(pipeline, values[:, None], 64)
    with Work() as promises:
        put_in_order(quantiles, level=constant_level(values, group_ids=torch.arange(64)))
    assert promises.written < whole.written / 100
