import tracemalloc

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from chronomoe.data.domains import Domain, load_domain
from chronomoe.data.frames import frame_to_series
from chronomoe.data.windows import (
    EvaluationWindows,
    JoinedWindows,
    TrainingWindows,
    Window,
    WindowConfig,
    collate,
    cut_window,
    digest,
    model_inputs,
)
from chronomoe.errors import InputError
from sample_series import sample_domain, sample_series

CONFIG = WindowConfig(context_length=64, horizon=16, min_context_length=32)
PARTS = {"train": range(0, 140), "validation": range(140, 160), "test": range(160, 200)}
"""Rows of the parts of a series of 200 steps."""


def training(domains=None, *, config=CONFIG, size=40, seed=0, **options):
    return TrainingWindows(domains or [sample_domain()], config, size=size, seed=seed, **options)


def assert_same(one, other):
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(left, right)


def test_a_window_depends_on_the_seed_and_its_number_alone():
    domains = [sample_domain("wave"), sample_domain("spikes", variates=2, known=("k",))]
    many, few, other = training(domains, size=100), training(domains, size=10), training(domains, seed=1)
    backwards = [few[index] for index in reversed(range(10))]
    for index, window in enumerate(reversed(backwards)):
        assert_same(window, many[index])
        assert window.index == index
    assert len({digest(window) for window in many} | {digest(window) for window in other}) > 120


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_targets_never_leave_their_part_and_contexts_may_reach_back(part, kind):
    domain = sample_domain("count")
    windows = training([domain], part=part) if kind == "training" else EvaluationWindows(domain, CONFIG, part=part)
    targets = np.concatenate([window.target[0] for window in windows])
    assert PARTS[part].start <= targets.min() <= targets.max() < PARTS[part].stop
    for window in windows:
        joined = np.concatenate([window.context[0], window.target[0]])
        np.testing.assert_array_equal(np.diff(joined), 1)
    if part != "train":
        assert min(window.context[0, 0] for window in windows) < PARTS[part].start


def test_every_cutoff_of_a_part_can_be_drawn():
    starts = {int(window.target[0, 0]) for window in training([sample_domain("count")], size=2000)}
    assert starts == set(range(32, 140 - 16 + 1))


def test_missing_values_stay_missing_and_no_others():
    series = sample_series("count", variates=2)
    series.target[1, series.target[0] % 7 == 0] = np.nan
    domain = Domain(name="gaps", series=[series], seasonality=1)
    for window in training([domain]):
        for part in (window.context, window.target):
            np.testing.assert_array_equal(np.isnan(part[1]), part[0] % 7 == 0)


def test_a_window_holds_variates_then_past_covariates_then_known_ones_with_their_future():
    series = sample_series("count", 20, variates=2, past_only=("p",), known=("k",))
    window = cut_window(series, 10, context_length=3, horizon=2, index=5)
    np.testing.assert_array_equal(
        window.context, [[7, 8, 9], [1007, 1008, 1009], [2007, 2008, 2009], [3007, 3008, 3009]]
    )
    nan = [np.nan, np.nan]
    np.testing.assert_array_equal(window.target, [[10, 11], [1010, 1011], nan, nan])
    np.testing.assert_array_equal(window.known, [nan, nan, nan, [3010, 3011]])
    assert window.index == 5
    last = cut_window(series, 19, context_length=3, horizon=2)
    np.testing.assert_array_equal(last.target[0], [19, np.nan])
    np.testing.assert_array_equal(last.known[3], [3019, np.nan])


def test_contexts_are_full_or_of_any_allowed_length():
    short = WindowConfig(context_length=64, horizon=16, min_context_length=32, full_context_share=0.0)
    assert {window.context.shape[1] for window in training(config=short, size=2000)} == set(range(32, 65))
    full = WindowConfig(context_length=64, horizon=16, min_context_length=64, full_context_share=1.0)
    assert {window.context.shape[1] for window in training(config=full)} == {64}


def test_domains_take_turns_and_longer_series_are_drawn_more_often():
    long, short = sample_series("count", 1000), sample_series("wave", 100)
    windows = training([Domain(name="both", series=[long, short], seasonality=1), sample_domain(variates=3)], size=2000)
    drawn = [[windows[index] for index in range(place, 2000, 2)] for place in (0, 1)]
    assert {len(window.context) for window in drawn[1]} == {3}
    expected = (700 - 32 - 16 + 1) / (700 - 32 - 16 + 1 + 70 - 32 - 16 + 1)
    share = np.mean([window.context[0, 0] == round(window.context[0, 0]) for window in drawn[0]])
    assert share == pytest.approx(expected, abs=0.02)
    assert [windows.domain_of(index) for index in range(4)] == [0, 1, 0, 1]


def test_making_windows_reads_no_values():
    frame = pd.DataFrame({"item_id": "a", "timestamp": pd.date_range("2020", periods=300, freq="h"), "target": 1.0})
    table = frame_to_series(frame)
    domain = Domain(name="one", series=table, seasonality=24)
    table.parts.clear()
    assert training([domain]).skipped == {"one": 0}
    assert len(EvaluationWindows(domain, CONFIG, part="test")) == 3


def test_series_too_short_are_skipped_with_a_count():
    domain = Domain(name="mixed", series=[sample_series(length=60), sample_series(length=200)], seasonality=1)
    assert training([domain]).skipped == {"mixed": 1}
    assert EvaluationWindows(domain, CONFIG, part="train").skipped == 1


def test_a_domain_of_series_too_short_is_refused():
    domains = [sample_domain(), sample_domain(name="short", length=60)]
    message = "no series of domain 'short' has a train part that holds a context of 32 and a horizon of 16 steps"
    with pytest.raises(InputError, match=message):
        training(domains)
    with pytest.raises(InputError, match="'short' has a validation part"):
        EvaluationWindows(domains[1], CONFIG, part="validation")


def test_evaluation_windows_lie_a_horizon_apart_and_end():
    windows = EvaluationWindows(sample_domain("count"), CONFIG, part="test")
    assert windows.places == [(series, cutoff) for series in range(3) for cutoff in (160, 176)]
    assert [window.index for window in windows] == list(range(6))
    assert [window.target[0, 0] for window in windows] == [160, 176] * 3


def test_a_limit_keeps_evenly_spread_windows():
    domain = sample_domain("count", count=7)
    windows = EvaluationWindows(domain, CONFIG, part="test", limit=3)
    assert windows.places == [(0, 160), (3, 160), (6, 176)]
    assert windows.skipped == 4
    assert len(EvaluationWindows(domain, CONFIG, part="test", limit=99)) == 14


def test_joined_windows_are_numbered_on():
    parts = [
        EvaluationWindows(sample_domain("wave", count=2), CONFIG, part="test"),
        EvaluationWindows(sample_domain("spikes", count=1), CONFIG, part="test"),
    ]
    joined = JoinedWindows(parts)
    assert [window.index for window in joined] == list(range(6))
    assert [joined.owner(index) for index in range(6)] == [0, 0, 0, 0, 1, 1]
    for index, expected in enumerate([*parts[0], *parts[1]]):
        assert_same(joined[index][:3], expected[:3])


def test_collate_pads_left_and_numbers_groups():
    series = sample_series("count", variates=2, known=("k",))
    windows = [
        cut_window(sample_series("count"), 50, context_length=3, horizon=20, index=8),
        cut_window(series, 60, context_length=5, horizon=20, index=4),
    ]
    batch = collate(windows, patch_size=16)
    assert batch["group_ids"].tolist() == [0, 1, 1, 1]
    assert batch["window"].tolist() == [8, 4]
    assert batch["digest"].tolist() == [digest(window) for window in windows]
    assert batch["num_output_patches"] == 2
    assert batch["context"].shape == (4, 5)
    assert batch["context"][0].isnan().tolist() == [True, True, False, False, False]
    assert torch.equal(batch["context"][1:], torch.from_numpy(windows[1].context))
    known = batch["future_covariates"]
    assert known.isnan().all(dim=1).tolist() == [True, True, True, False]
    assert batch["future_target"].isnan().all(dim=1).tolist() == [False, False, False, True]
    assert "future_covariates" not in collate(windows[:1], patch_size=16)
    assert set(model_inputs(batch)) == {"context", "group_ids", "future_covariates", "num_output_patches"}


def test_the_digest_changes_with_values_covariates_and_grouping():
    window = cut_window(sample_series(variates=2, known=("k",)), 60, context_length=8, horizon=4)
    changed = [window, window._replace(known=window.known + 1), window._replace(context=window.context[:, 1:])]
    changed += [window._replace(context=window.context[:2], known=window.known[:2])]
    value, gap = window.context.copy(), window.context.copy()
    value[1, 3] += 1e-3
    gap[0, 0] = np.nan
    changed += [window._replace(context=value), window._replace(context=gap)]
    apart = [Window(window.context.reshape(1, -1), window.target, window.known.reshape(1, -1), 0)]
    assert len({digest(one) for one in changed + apart}) == len(changed) + 1
    assert digest(window._replace(index=9)) == digest(window)


def test_windows_over_a_datasets_folder_hold_a_constant_amount_of_memory(tmp_path):
    length, count = 20_000, 50
    times = pd.date_range("2020-01-01", periods=length, freq="h")
    rows = [{"id": str(row), "timestamp": times, "target": np.full(length, row, np.float32)} for row in range(count)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "data")
    domain = load_domain(str(tmp_path / "data"))
    del rows
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    windows = training([domain], size=10**9)
    kept = [windows[index * 7919] for index in range(100)]
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len({window.context[0, 0] for window in kept}) > 30
    total = 4 * length * count
    assert held < total / 20
    assert peak < total / 5
    assert pa.total_allocated_bytes() - before < total / 5


def test_impossible_shapes_of_windows_are_refused():
    with pytest.raises(InputError, match="horizon must be at least 1, got 0"):
        WindowConfig(horizon=0)
    with pytest.raises(InputError, match="context_length must be at least 1, got 0"):
        WindowConfig(context_length=0)
    with pytest.raises(InputError, match="full_context_share must be at most 1, got 1.5"):
        WindowConfig(full_context_share=1.5)
    with pytest.raises(InputError, match="seed must be from 0 to 4294967295, got -1"):
        TrainingWindows([sample_domain()], CONFIG, size=1, seed=-1)
    with pytest.raises(InputError, match=r"min_context_length must be from 1 to context_length \(16\), got 32"):
        WindowConfig(context_length=16)
