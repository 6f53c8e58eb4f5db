import dataclasses

import numpy as np
import pytest
import torch

from chronomoe.errors import InputError
from chronomoe.pretraining.batches import MOST_ROWS, MixConfig, Phase, PretrainingBatches
from chronomoe.pretraining.corpus import Corpus

PATCH, STEPS = 16, 16
PHASES = (Phase(steps=STEPS, context_length=64, batch_size=8),)
PLAIN = {name: 0.0 for name in MixConfig.__dataclass_fields__ if name.endswith("_share")}
"""Windows that are pieces of drawn series, and nothing else."""
EVERYTHING = {"missing_share": 0.5, "group_share": 0.5, "full_context_share": 0.3}


def ramps(count, *, start, steps=200):
    """Rows that tell where they come from: each rises by 1 from a multiple of 1000."""
    return np.arange(steps, dtype=np.float32) + 1000 * np.arange(start, start + count, dtype=np.float32)[:, None]


def make_corpus(*, drawn=5, composed=3, real=2, groups=4):
    return Corpus(
        ramps(drawn, start=1),
        ramps(composed, start=101),
        ramps(real, start=201),
        np.stack([ramps(4, start=301 + 10 * group) for group in range(groups)])
        if groups
        else np.empty((0, 4, 200), dtype=np.float32),
    )


def noisy_corpus():
    rng = np.random.default_rng(0)
    return Corpus(*(rng.normal(size=size).astype(np.float32) for size in ((9, 200), (9, 200), (9, 200), (3, 4, 200))))


def mixed(corpus=None, *, phases=PHASES, seed=0, **options):
    names = {name: options.pop(name) for name in ("patch_size", "processes", "first") if name in options}
    shape = {"context_length": 64, "min_context_length": 32, "horizon": 48, "ragged_share": 0.0}
    config = MixConfig(**shape | options)
    corpus = noisy_corpus() if corpus is None else corpus
    return PretrainingBatches(corpus, config, phases=phases, seed=seed, **{"patch_size": PATCH} | names)


def windows_of(batches):
    return [window for index in range(len(batches)) for window in batches.windows(index)]


def rows_of(batches):
    """Join contexts and targets of all rows."""
    return [
        np.concatenate(pair)
        for window in windows_of(batches)
        for pair in zip(window.context, window.target, strict=True)
    ]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.nan_to_num(nan=12345.0), other[name].nan_to_num(nan=12345.0)), name
        else:
            assert value == other[name]


def test_a_batch_depends_on_the_seed_and_its_number_alone():
    batches, again = mixed(**EVERYTHING), mixed(**EVERYTHING)
    for index in reversed(range(len(batches))):
        assert_same(again[index], batches[index])
    other = mixed(seed=1, **EVERYTHING)
    assert not any(
        other[index]["context"].shape == batches[index]["context"].shape
        and torch.equal(other[index]["context"], batches[index]["context"])
        for index in range(len(batches))
    )


def test_batches_that_were_done_are_left_out():
    batches, continued = mixed(**EVERYTHING), mixed(first=10, **EVERYTHING)
    assert len(continued) == len(batches) - 10 == STEPS - 10
    for index in range(len(continued)):
        assert_same(continued[index], batches[10 + index])
    with pytest.raises(IndexError):
        continued[STEPS - 10]
    with pytest.raises(IndexError):
        continued[-1]


def test_batches_can_be_made_by_background_processes():
    batches = mixed(**EVERYTHING)
    loader = torch.utils.data.DataLoader(batches, batch_size=1, collate_fn=lambda items: items[0], num_workers=2)
    for index, batch in enumerate(loader):
        assert_same(batch, batches[index])
    assert index == STEPS - 1


@pytest.mark.parametrize("patch_size", [8, 16, 24, 48])
def test_windows_of_a_batch_share_context_length_and_horizon_and_nothing_is_padded(patch_size):
    phases = (Phase(steps=30, context_length=96, batch_size=2),)
    options = EVERYTHING | {"context_length": 96, "missing_share": 0.0}
    batches = mixed(phases=phases, patch_size=patch_size, **options)
    lengths, horizons = set(), set()
    for index in range(len(batches)):
        windows, shape = batches.windows(index), batches.shape(index)
        assert {window.context.shape[1] for window in windows} == {shape.context_length}
        assert {window.target.shape[1] for window in windows} == {shape.horizon}
        assert [window.index for window in windows] == list(range(len(windows)))
        batch = batches[index]
        assert batch["context"].isfinite().all()
        assert batch["num_output_patches"] == shape.horizon // patch_size
        lengths.add(shape.context_length)
        horizons.add(shape.horizon)
    assert all(length % patch_size == 0 and 32 <= length <= 96 for length in lengths)
    assert len(lengths) > 1
    assert horizons == set(range(patch_size, 49, patch_size))


@pytest.mark.parametrize(("shortest", "expected"), [(16, {32, 64}), (32, {32, 64}), (40, {64}), (64, {64})])
def test_no_context_is_shorter_than_the_shortest_one(shortest, expected):
    batches = mixed(full_context_share=0.0, min_context_length=shortest)
    assert {batches.shape(index).context_length for index in range(len(batches))} == expected


def test_growing_contexts_change_their_length_and_number_of_windows_at_their_step():
    phases = (
        Phase(steps=3, context_length=32, batch_size=20),
        Phase(steps=2, context_length=48, batch_size=10),
        Phase(steps=4, context_length=64, batch_size=5),
    )
    batches = mixed(phases=phases, processes=2, full_context_share=1.0, horizon=PATCH)
    assert len(batches) == 2 * 9
    shapes = [batches.shape(index) for index in range(18)]
    assert [shape.context_length for shape in shapes] == 6 * [32] + 4 * [48] + 8 * [64]
    assert [shape.rows for shape in shapes] == 6 * [20] + 4 * [10] + 8 * [5]
    continued = mixed(phases=phases, processes=2, first=8, full_context_share=1.0, horizon=PATCH)
    assert [continued.shape(index) for index in range(10)] == shapes[8:]


def test_every_batch_has_about_as_many_tokens_as_one_of_full_windows():
    phases = (Phase(steps=20, context_length=128, batch_size=16),)
    batches = mixed(phases=phases, context_length=128, group_share=0.5, full_context_share=0.3)
    full = 16 * (128 // PATCH + 1 + 48 // PATCH)
    for index in range(len(batches)):
        batch = batches[index]
        rows = len(batch["context"])
        tokens = rows * (batch["context"].shape[1] // PATCH + 1 + batch["num_output_patches"])
        assert rows <= MOST_ROWS * 16
        most = batches.config.max_group_size * tokens / rows
        assert full - most - tokens / rows <= tokens <= full + tokens / rows or rows + 4 > MOST_ROWS * 16


def test_a_plain_window_is_a_piece_of_one_drawn_series():
    rows = rows_of(mixed(make_corpus(), **PLAIN))
    for row in rows:
        np.testing.assert_array_equal(np.diff(row), 1)
        assert 1000 <= row[0] < 6000
    assert {row[0] // 1000 for row in rows} == {1, 2, 3, 4, 5}


@pytest.mark.parametrize(("share", "first"), [("composed_share", 101), ("real_share", 201)])
def test_a_share_of_one_takes_every_row_from_that_source(share, first):
    for row in rows_of(mixed(make_corpus(), **PLAIN | {share: 1.0})):
        assert first <= row[0] // 1000 < first + 10


def test_sources_are_drawn_in_their_shares_whatever_their_size():
    rows = rows_of(mixed(make_corpus(), **PLAIN | {"composed_share": 0.5, "real_share": 0.2}))
    source = np.array([row[0] // 100_000 for row in rows])
    shares = [np.mean(source == kind) for kind in range(3)]
    np.testing.assert_allclose(shares, [0.3, 0.5, 0.2], atol=0.08)


def test_a_source_without_series_leaves_its_share_to_the_others():
    corpus = make_corpus(composed=0, real=0)
    rows = rows_of(mixed(corpus, **PLAIN | {"composed_share": 0.7, "real_share": 0.2}))
    assert all(row[0] < 6000 for row in rows)


def test_a_mix_of_nothing_is_refused():
    message = "a mix needs series of a share above 0, got 0 drawn, 3 composed, 0 real in shares of 1, 0, 0; draw more"
    with pytest.raises(InputError, match=message):
        mixed(make_corpus(drawn=0, real=0), **PLAIN)


def test_reversed_rows_run_backwards_and_flipped_ones_upside_down():
    for row in rows_of(mixed(make_corpus(), **PLAIN | {"reverse_share": 1.0})):
        np.testing.assert_array_equal(np.diff(row), -1)
        assert row[0] > 0
    for row in rows_of(mixed(make_corpus(), **PLAIN | {"flip_share": 1.0})):
        np.testing.assert_array_equal(np.diff(row), -1)
        assert row[0] < 0


def test_strides_skip_steps_where_the_series_is_long_enough():
    steps = set()
    for row in rows_of(mixed(make_corpus(), **PLAIN | {"stride_share": 1.0, "horizon": PATCH})):
        (step,) = set(np.diff(row))
        assert step == 1 if 2 * len(row) > 200 else step > 1
        steps.add(step)
    assert steps >= {2, 3, 4}


def test_a_mixture_of_series_is_none_of_them_and_mixes_spreads_not_units():
    corpus = Corpus(*(part * 1e4 if part.ndim == 2 and len(part) == 9 else part for part in noisy_corpus()))
    for row in rows_of(mixed(corpus, **PLAIN | {"mixup_share": 1.0})):
        assert 0.3 < row.std() < 1.5
        assert not any(
            np.allclose(np.correlate(whole, row - row.mean()).max(), row.var() * len(row)) for whole in corpus.drawn
        )


def test_no_share_of_missing_values_leaves_every_step_observed():
    assert all(np.isfinite(window.context).all() for window in windows_of(mixed(missing_share=0.0)))


def test_lost_stretches_are_in_the_context_alone():
    windows = windows_of(mixed(missing_share=1.0, group_share=0.5))
    for window in windows:
        assert np.isnan(window.context).mean() < 0.9
        assert np.isfinite(window.target[0]).all()
    assert np.mean([np.isnan(window.context).any() for window in windows]) > 0.9


def test_missing_values_of_a_series_stay_missing():
    corpus = make_corpus()
    corpus.drawn[:, ::7] = np.nan
    rows = rows_of(mixed(corpus, **PLAIN))
    for row in rows:
        start = np.nanmin(row) % 1000
        np.testing.assert_allclose(np.isnan(row).mean(), 1 / 7, atol=0.02)
        assert start == 0 or np.isfinite(row[np.isfinite(row)]).all()


def test_a_group_share_of_zero_or_one_is_all_rows_alone_or_none():
    assert {len(window.context) for window in windows_of(mixed(group_share=0.0))} == {1}
    grouped = windows_of(mixed(group_share=1.0, max_group_size=3))
    assert {len(window.context) for window in grouped} == {2, 3}


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_covariate_share_of_zero_or_one_is_all_targets_or_one_each(share):
    for window in windows_of(mixed(group_share=1.0, covariate_share=share)):
        targets = np.isfinite(window.target).any(axis=1).sum()
        assert targets == (1 if share else len(window.context))
        assert share or np.isnan(window.known).all()


def test_groups_attend_to_themselves_alone_and_known_rows_reach_the_model():
    batches = mixed(group_share=1.0, covariate_share=1.0)
    known = 0
    for index in range(len(batches)):
        batch, windows = batches[index], batches.windows(index)
        assert batch["group_ids"].bincount().tolist() == [len(window.context) for window in windows]
        known += "future_covariates" in batch
        assert not (
            batch.get("future_covariates", torch.tensor(torch.nan)).isfinite() & batch["future_target"].isfinite()
        ).any()
    assert known > 0.75 * STEPS


def test_half_of_the_groups_of_targets_are_stored_ones():
    windows = windows_of(mixed(make_corpus(), **PLAIN | {"group_share": 1.0}))
    stored = [window for window in windows if (window.context >= 300_000).all()]
    assert 0.35 < len(stored) / len(windows) < 0.65
    for window in stored:
        assert len(set(window.context[:, 0] // 1000)) == len(window.context)  # each row once
        assert np.ptp(window.context[:, 0] % 1000) == 0  # at the same time


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_context_length": 8}, r"min_context_length must be from 16 to context_length \(512\), got 8"),
        ({"context_length": 32}, r"min_context_length must be from 16 to context_length \(32\), got 64"),
        ({"max_group_size": 1}, "max_group_size must be at least 2, got 1"),
        ({"mixup_share": 1.5}, "mixup_share must be at most 1, got 1.5"),
        ({"missing_share": -0.1}, "missing_share must be at least 0, got -0.1"),
        (
            {"composed_share": 0.7, "real_share": 0.5},
            "composed_share and real_share must not exceed 1 together, got 1.2",
        ),
    ],
)
def test_an_impossible_mix_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        MixConfig(**options)


def test_every_share_has_its_own_refusal():
    for name in PLAIN:
        with pytest.raises(InputError, match=f"{name} must be at most 1, got 2.0"):
            dataclasses.replace(MixConfig(), **{name: 2.0})


def test_a_phase_can_have_a_share_of_groups_of_its_own():
    shape = {"steps": STEPS, "context_length": 64, "batch_size": 4}
    batches = mixed(phases=[Phase(**shape), Phase(**shape, group_share=1.0)], group_share=0.0)
    kinds = [batches.shape(index).kind for index in range(2 * STEPS)]
    assert set(kinds[:STEPS]) == {"single"}
    assert set(kinds[STEPS:]) == {"coupled", "covariates"}


@pytest.mark.parametrize("name", ["positive_share", "simple_share"])
def test_a_phase_can_have_shares_of_covariate_windows_of_its_own(name):
    shape = {"steps": STEPS, "context_length": 64, "batch_size": 4}
    batches = mixed(phases=[Phase(**shape), Phase(**shape, **{name: 0.25})], **{name: 0.75})
    shares = [getattr(batches.shape(index), name) for index in range(2 * STEPS)]
    assert shares == [0.75] * STEPS + [0.25] * STEPS


def test_simple_covariate_windows_have_one_or_two_covariates_all_known():
    covariates = {"group_share": 1.0, "covariate_share": 1.0, "missing_share": 0.0}
    windows = windows_of(mixed(simple_share=1.0, **covariates))
    assert {len(window.context) for window in windows} == {2, 3}
    assert all(np.isfinite(window.known[1:]).all() for window in windows)
    others = windows_of(mixed(simple_share=0.0, **covariates))
    assert {len(window.context) for window in others} == {2, 3, 4}
    assert any(np.isnan(window.known[1:]).any() for window in others)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_ragged_contexts_begin_within_a_patch(share):
    batches = mixed(ragged_share=share)
    ragged = []
    for index in range(len(batches)):
        length = batches.shape(index).context_length
        assert length >= 32
        assert {window.context.shape[1] for window in batches.windows(index)} == {length}
        ragged += [length % PATCH > 0] if length > 32 else []
    assert np.mean(ragged) == share if share in (0, 1) else 0 < np.mean(ragged) < 1


def test_patches_of_one_step_are_never_ragged():
    batches = mixed(patch_size=1, ragged_share=1.0)
    assert all(batches.shape(index).context_length >= 32 for index in range(len(batches)))


@pytest.mark.parametrize("name", ["group_share", "simple_share", "positive_share"])
def test_an_impossible_share_of_a_phase_is_refused(name):
    with pytest.raises(InputError, match=rf"{name} must be at most 1, got 2\.0"):
        Phase(steps=1, context_length=64, batch_size=4, **{name: 2.0})
