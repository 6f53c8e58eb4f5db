import itertools
import threading
import time
from importlib import resources

import pandas as pd
import pytest
import torch

from chronomoe.models.folded import compute_dtype, computing_in
from chronomoe.models.precision import DtypeTrials, best_dtype, has_bfloat16_units, settled
from chronomoe.pipeline import ChronoMoEPipeline, load_model

HORIZON = 48


@pytest.fixture(scope="module")
def tiny():
    """Load the shipped teacher: what type costs accuracy shows on trained weights alone."""
    return load_model("tiny").eval()


@pytest.fixture(scope="module")
def real():
    """Cut windows of public series: 360 steps of context and what came after, four of each column."""
    folder, windows = resources.files("chronomoe") / "assets" / "demo", []
    for name in ("electricity", "pedestrians", "traffic", "weather", "web"):
        columns = pd.read_parquet(str(folder / f"{name}.parquet")).drop(columns="timestamp")
        for column in columns:
            values = torch.tensor(columns[column].to_numpy(dtype="float32"))
            windows += [values[start : start + 360 + HORIZON] for start in range(0, 1600, 400)]
    stacked = torch.stack([window for window in windows if window.nan_to_num().abs().sum() > 0])
    return stacked[:, :360], stacked[:, 360:]


@torch.no_grad()
def weighted_quantile_loss(model, windows, dtype):
    context, target = windows
    patches = -(-HORIZON // model.chronos_config.output_patch_size)
    with computing_in(dtype):
        quantiles = model(context, num_output_patches=patches).quantile_preds[..., :HORIZON]
    levels = torch.tensor(model.chronos_config.quantiles)[:, None]
    gap = target[:, None] - quantiles
    loss = 2 * torch.maximum(levels * gap, (levels - 1) * gap).mean(dim=1)
    scale = context.diff(dim=1).abs().nanmean(dim=1).clamp(min=1e-3)  # series of all units count alike
    return (loss.nanmean(dim=1) / scale).nanmean().item()


def test_products_in_bfloat16_change_the_loss_on_real_series_by_less_than_a_thousandth(tiny, real):
    exact, narrow = (weighted_quantile_loss(tiny, real, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert len(real[0]) > 200
    assert narrow != exact
    assert narrow == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_best_type_is_one_of_two_and_leaves_the_model_as_it_was(make_mixture, batch_size):
    mixture = make_mixture()
    mixture.train()
    found = best_dtype(mixture, context_length=64, horizon=32, batch_size=batch_size, clock=time.perf_counter)
    assert found in (torch.float32, torch.bfloat16)
    assert found == torch.float32 or has_bfloat16_units(mixture.device)
    assert compute_dtype() == torch.float32
    assert mixture.training


def test_bfloat16_is_not_tried_where_the_processor_has_no_units_for_it(make_mixture, monkeypatch):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    mixture = make_mixture()
    mixture.register_forward_hook(lambda *_: pytest.fail("it was tried"))
    found = best_dtype(mixture, context_length=64, horizon=32, batch_size=8, clock=time.perf_counter)
    assert found == torch.float32


@pytest.mark.parametrize(("narrow_seconds", "expected"), [(0.5, torch.bfloat16), (0.99, torch.float32)])
def test_bfloat16_must_win_its_trial_clearly(make_mixture, monkeypatch, narrow_seconds, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    mixture, now = make_mixture(), [0.0]

    def took(*_):
        now[0] += narrow_seconds if compute_dtype() == torch.bfloat16 else 1.0

    mixture.register_forward_hook(took)
    found = best_dtype(mixture, context_length=64, horizon=32, batch_size=2, clock=lambda: now[0])
    assert found == expected


def test_of_a_mixture_the_experts_compute_in_bfloat16(make_mixture, gappy):
    mixture = make_mixture()
    with torch.no_grad():
        expected = mixture(gappy)
        with computing_in(torch.bfloat16):
            output = mixture(gappy)
    assert torch.equal(output.routing.score, expected.routing.score)  # the router stays in float32
    assert output.quantile_preds.dtype == torch.float32
    assert 0 < (output.normalized_preds - expected.normalized_preds).abs().max() < 0.05


def test_sizes_that_are_alike_share_one_trial_of_few_tokens(make_mixture, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    mixture, now, tried = make_mixture(), [0.0], []

    def took(model, args, output):
        tried.append(tuple(args[0].shape))
        now[0] += 0.1 if compute_dtype() == torch.bfloat16 and len(args[0]) > 1 else 1.0

    mixture.register_forward_hook(took)
    trials = DtypeTrials(lambda: now[0])
    for count, shapes in enumerate(([(1, 100)] * 300, [(1, 128)] * 400, [(2, 90)] * 100)):
        assert trials.best(mixture, shapes, horizon=20, batch_size=256) == torch.bfloat16
        assert set(tried) == {(32, 128)}, count
        assert set(mixture.experts[0]._folds.kept) <= {torch.bfloat16}
    seen = len(tried)
    assert (
        trials.best(mixture, [(1, 100)], horizon=20, batch_size=256) == torch.float32
    )  # alone, a series is faster in it here
    assert {shape[0] for shape in tried[seen:]} == {1}
    assert trials.best(mixture, [(1, 100)] * 300, horizon=20, batch_size=256) == torch.bfloat16
    assert {dtype for expert in mixture.experts for dtype in expert._folds.kept} == {torch.float32, torch.bfloat16}


@pytest.mark.skipif(not has_bfloat16_units(torch.device("cpu")), reason="this processor has no bfloat16 units")
def test_a_pipeline_of_the_best_type_keeps_the_loss_on_real_series(real):
    """With a clock that always favours bfloat16, so that the bound is checked whatever else runs here."""
    pipeline, calls = ChronoMoEPipeline.from_pretrained("tiny", dtype="auto"), itertools.count()
    context, target = real
    expected = ChronoMoEPipeline.from_pretrained("tiny").predict(context[:, None], prediction_length=HORIZON)
    pipeline.trials.clock = lambda: next(calls) * (1.0 if compute_dtype() == torch.float32 else 0.1)
    used = []
    pipeline.model.register_forward_hook(lambda *_: used.append(compute_dtype()))
    found = pipeline.predict(context[:, None], prediction_length=HORIZON)
    assert used[-1] == torch.bfloat16
    assert compute_dtype() == torch.float32
    assert pipeline.model.dtype == torch.float32
    levels = torch.tensor(pipeline.quantiles)[:, None]
    losses = []
    for forecasts in (expected, found):
        gap = target[:, None] - torch.cat(forecasts)
        losses.append((2 * torch.maximum(levels * gap, (levels - 1) * gap).mean(dim=1)).nansum(dim=1))
    scale = context.diff(dim=1).abs().nanmean(dim=1).clamp(min=1e-3)
    assert losses[0] is not losses[1]
    assert ((losses[1] / scale).sum() / (losses[0] / scale).sum()).item() == pytest.approx(1, abs=1e-3)


def test_threads_that_share_a_model_compute_each_in_its_own_type(make_mixture, gappy):
    """One of them is in the middle of a block of another type while the other forecasts."""
    mixture, entered, left = make_mixture(), threading.Event(), threading.Event()
    forecasts = {}

    @torch.no_grad()
    def narrow():
        with computing_in(torch.bfloat16):
            entered.set()
            left.wait(timeout=60)
            forecasts["narrow"] = mixture(gappy).normalized_preds

    with torch.no_grad():
        expected = mixture(gappy).normalized_preds
        other = threading.Thread(target=narrow)
        other.start()
        entered.wait(timeout=60)
        found = mixture(gappy).normalized_preds
        left.set()
        other.join()
    assert torch.equal(found, expected)
    assert (forecasts["narrow"] - expected).abs().max() > 0


def test_auto_is_bfloat16_where_there_are_units_for_it_and_asks_no_clock(make_mixture, monkeypatch):
    mixture = make_mixture()
    mixture.register_forward_hook(lambda *_: pytest.fail("it was tried"))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for units, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda units=units: units)
        assert settled("auto", mixture) == expected
        assert settled("bfloat16", mixture) == torch.bfloat16
        assert settled("float32", mixture) == torch.float32
