import dataclasses
import json

import numpy as np
import pytest

from chronomoe.data.synthetic import (
    SLOW_GENERATORS,
    CorpusConfig,
    MixConfig,
    PretrainingWindows,
    build_corpus,
    draw_corpus,
)
from chronomoe.errors import InputError

CORPUS = CorpusConfig(seasonalities=(12,), series_per_generator=1, slow_series_per_generator=0, length=160)
NOTHING = {"mixup_share": 0.0, "stride_share": 0.0, "reverse_share": 0.0, "missing_share": 0.0, "group_share": 0.0}


@pytest.fixture(scope="module")
def corpus():
    return draw_corpus(CORPUS)


def mixed(series, *, size=64, seed=0, first=0, **shares):
    config = MixConfig(context_length=64, min_context_length=32, horizon=16, **shares)
    return PretrainingWindows(series, config, size=size, batch_size=8, seed=seed, first=first)


def assert_same(one, other):
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(left, right)


def test_the_same_seed_draws_the_same_series_and_another_one_others(corpus):
    np.testing.assert_array_equal(draw_corpus(CORPUS), corpus)
    other = draw_corpus(dataclasses.replace(CORPUS, seed=1))
    assert other.shape != corpus.shape or not np.array_equal(other, corpus)


def test_series_are_finite_standardised_and_of_many_generators(corpus):
    assert corpus.dtype == np.float32
    assert corpus.shape[1] == 160
    assert len(corpus) > 30
    assert np.isfinite(corpus).all()
    np.testing.assert_allclose(corpus.mean(axis=1), 0, atol=1e-3)
    assert np.abs(corpus.std(axis=1) - 1).max() < 1e-2
    assert len(np.unique(corpus, axis=0)) == len(corpus)


def test_every_seasonality_and_the_slow_generators_add_series(corpus):
    both = draw_corpus(dataclasses.replace(CORPUS, seasonalities=(12, 24), length=64))
    slow = draw_corpus(dataclasses.replace(CORPUS, slow_series_per_generator=1, length=64))
    assert len(both) > 1.5 * len(corpus)
    assert len(slow) > len(corpus) - 3 + len(SLOW_GENERATORS) - 1


def test_a_corpus_is_drawn_once_and_memory_mapped(corpus, tmp_path):
    build_corpus(tmp_path / "corpus", CORPUS)
    drawn = []
    again = build_corpus(tmp_path / "corpus", CORPUS, progress=lambda done, total: drawn.append(done))
    assert drawn == []
    assert isinstance(again, np.memmap)
    np.testing.assert_array_equal(again, corpus)


@pytest.mark.parametrize("stopped_at", [0, 1])
def test_an_interrupted_corpus_is_drawn_again(corpus, tmp_path, stopped_at):
    def stop(done, total):
        if done == stopped_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_corpus(tmp_path / "corpus", CORPUS, progress=stop)
    assert not (tmp_path / "corpus").exists()
    (tmp_path / "corpus.partial" / "series.npy").write_bytes(b"half of it")
    np.testing.assert_array_equal(build_corpus(tmp_path / "corpus", CORPUS), corpus)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_a_corpus_of_another_configuration_is_refused(tmp_path):
    (tmp_path / "corpus.json").write_text(json.dumps({"seed": 5}))
    with pytest.raises(InputError, match="holds another corpus .*'seed': 5.*; choose another folder or delete it"):
        build_corpus(tmp_path, CORPUS)


def test_a_window_depends_on_the_seed_and_its_number_alone(corpus):
    windows, continued = mixed(corpus, group_share=0.5), mixed(corpus, group_share=0.5, first=24)
    for index in reversed(range(40)):
        assert_same(continued[index], windows[24 + index])
        assert windows[index].index == index
    assert len(continued) == 40
    assert sum(1 for _ in continued) == 40
    assert not np.array_equal(windows[0].target, mixed(corpus, seed=1, group_share=0.5)[0].target)


def test_a_plain_window_is_a_piece_of_a_series():
    ramps = np.arange(160, dtype=np.float32) + 1000 * np.arange(5, dtype=np.float32)[:, None]
    for window in mixed(ramps, **NOTHING | {"full_context_share": 1.0}):
        assert window.context.shape == (1, 64)
        joined = np.concatenate([window.context[0], window.target[0]])
        np.testing.assert_array_equal(np.diff(joined), 1)
        assert np.isnan(window.known).all()


@pytest.mark.parametrize(("share", "step"), [("stride_share", 2), ("reverse_share", -1)])
def test_strides_skip_steps_and_reversed_windows_run_backwards(share, step):
    ramp = np.arange(160, dtype=np.float32)[None]
    for window in mixed(ramp, **NOTHING | {share: 1.0}):
        np.testing.assert_array_equal(np.diff(np.concatenate([window.context[0], window.target[0]])), step)


def test_lost_stretches_are_in_the_context_alone(corpus):
    windows = list(mixed(corpus, **NOTHING | {"missing_share": 1.0}))
    for window in windows:
        assert np.isfinite(window.target).all()
        assert 0 < np.isnan(window.context).sum() < window.context.size
    assert all(np.isfinite(window.context).all() for window in mixed(corpus, **NOTHING | {"mixup_share": 1.0}))


def test_contexts_of_a_batch_have_one_length_a_multiple_of_sixteen(corpus):
    windows = list(mixed(corpus, size=400, full_context_share=0.2, group_share=0.3))
    lengths = [{window.context.shape[1] for window in windows[start : start + 8]} for start in range(0, 400, 8)]
    assert all(len(length) == 1 for length in lengths)
    assert set().union(*lengths) == {32, 48, 64}


def test_groups_have_targets_or_known_futures_in_every_row(corpus):
    windows = list(mixed(corpus, size=200, group_share=1.0, missing_share=0.5, max_group_size=3))
    assert {len(window.context) for window in windows} == {2, 3}
    with_covariates = 0
    for window in windows:
        assert np.isfinite(window.context).all()
        known, target = np.isfinite(window.known), np.isfinite(window.target)
        np.testing.assert_array_equal(known, ~target)
        rows = known.all(axis=1)
        np.testing.assert_array_equal(rows, known.any(axis=1))
        assert not rows[0]
        assert (np.diff(rows.astype(int)) >= 0).all()
        with_covariates += rows.any()
    assert 60 < with_covariates < 140


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (CorpusConfig, {"seasonalities": (1, 7)}, r"seasonalities must be at least 2 steps, got \(1, 7\)"),
        (CorpusConfig, {"length": 10}, "corpus length must be at least 64 steps, got 10"),
        (MixConfig, {"min_context_length": 8}, r"min_context_length must be from 16 to context_length \(512\), got 8"),
        (MixConfig, {"context_length": 32}, r"min_context_length must be from 16 to context_length \(32\), got 64"),
        (MixConfig, {"max_group_size": 1}, "max_group_size must be at least 2 rows, got 1"),
    ],
)
def test_impossible_corpora_and_mixes_are_refused(config, options, message):
    with pytest.raises(InputError, match=message):
        config(**options)
