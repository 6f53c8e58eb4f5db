import dataclasses
import json

import numpy as np
import pytest

from chronomoe.errors import InputError
from chronomoe.pretraining.corpus import (
    GROUP_ROWS,
    MOST_SPREADS,
    SLOW_GENERATORS,
    Corpus,
    CorpusConfig,
    build_corpus,
    draw_corpus,
    standardized,
)

CORPUS = CorpusConfig(
    seasonalities=(12,),
    series_per_generator=1,
    slow_series_per_generator=0,
    composed_series=6,
    groups=5,
    real=("bank_calls",),
    length=96,
)


@pytest.fixture(scope="module")
def corpus():
    return draw_corpus(CORPUS)


def assert_same(one, other):
    for name, left, right in zip(Corpus._fields, one, other, strict=True):
        np.testing.assert_array_equal(left, right, err_msg=name)


def test_the_same_seed_draws_the_same_corpus_and_another_one_another(corpus):
    assert_same(draw_corpus(CORPUS), corpus)
    other = draw_corpus(dataclasses.replace(CORPUS, seed=1))
    for name in ("drawn", "composed", "groups"):
        left, right = getattr(corpus, name), getattr(other, name)
        assert left.shape != right.shape or not np.array_equal(left, right), name
    np.testing.assert_array_equal(other.real, corpus.real)


def test_series_are_finite_standardised_and_all_different(corpus):
    for name in ("drawn", "composed", "groups"):
        series = getattr(corpus, name).reshape(-1, 96)
        assert series.dtype == np.float32
        assert np.isfinite(series).all()
        np.testing.assert_allclose(series.mean(axis=1), 0, atol=2e-2)  # clipping moves a few
        assert np.abs(series.std(axis=1) - 1).max() < 5e-2
        assert len(np.unique(series, axis=0)) == len(series)
    assert len(corpus.drawn) > 30
    assert len(corpus.composed) == 6
    assert corpus.groups.shape == (5, GROUP_ROWS, 96)
    assert len(corpus.real) > 50


def test_rows_of_a_group_tell_more_of_each_other_than_rows_of_others():
    settings = dataclasses.replace(CORPUS, groups=30, series_per_generator=0, composed_series=0, real=(), length=400)
    groups = draw_corpus(settings).groups
    others = np.stack([np.roll(groups[:, row], row, axis=0) for row in range(GROUP_ROWS)], axis=1)
    strongest, chance = (
        np.median([np.abs(np.corrcoef(rows)[np.triu_indices(GROUP_ROWS, 1)]).max() for rows in part])
        for part in (groups, others)
    )
    assert strongest > 1.5 * chance


def test_every_seasonality_and_the_slow_generators_add_series(corpus):
    alone = dataclasses.replace(CORPUS, composed_series=0, groups=0, real=(), length=64)
    both = draw_corpus(dataclasses.replace(alone, seasonalities=(12, 24)))
    slow = draw_corpus(dataclasses.replace(alone, slow_series_per_generator=1))
    assert len(both.drawn) > 1.5 * len(corpus.drawn)
    assert len(slow.drawn) > len(corpus.drawn) - 3 + len(SLOW_GENERATORS) - 1


def test_any_part_can_be_empty():
    nothing = draw_corpus(dataclasses.replace(CORPUS, series_per_generator=0, composed_series=0, groups=0, real=()))
    assert [part.shape for part in nothing] == [(0, 96), (0, 96), (0, 96), (0, GROUP_ROWS, 96)]


def test_standardised_series_leave_out_constants_and_what_is_not_finite_and_are_clipped():
    spike = np.zeros(4000)
    spike[7] = 1e9
    steep = np.where(np.arange(4000) % 2, 3.0, 1.0)
    rows = np.stack([spike, np.full(4000, 2.0), np.where(np.arange(4000) == 5, np.inf, 0), steep])
    kept = standardized(rows)
    assert len(kept) == 2
    assert kept[0].max() == MOST_SPREADS
    np.testing.assert_array_equal(kept[1], np.where(np.arange(4000) % 2, 1, -1))


def test_a_corpus_is_drawn_once_and_memory_mapped(corpus, tmp_path):
    build_corpus(tmp_path / "corpus", CORPUS)
    drawn = []
    again = build_corpus(tmp_path / "corpus", CORPUS, progress=lambda done, total: drawn.append(done))
    assert drawn == []
    assert all(isinstance(part, np.memmap) for part in again)
    assert_same(again, corpus)


def test_progress_is_told_from_the_first_part_to_the_last():
    told = []
    draw_corpus(dataclasses.replace(CORPUS, seasonalities=(4, 7)), progress=lambda *place: told.append(place))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("stopped_at", [0, 1])
def test_an_interrupted_corpus_is_drawn_again(corpus, tmp_path, stopped_at):
    def stop(done, total):
        if done == stopped_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_corpus(tmp_path / "corpus", CORPUS, progress=stop)
    assert not (tmp_path / "corpus").exists()
    (tmp_path / "corpus.partial" / "drawn.npy").write_bytes(b"half of it")
    assert_same(build_corpus(tmp_path / "corpus", CORPUS), corpus)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_a_corpus_of_another_configuration_is_refused(tmp_path):
    (tmp_path / "corpus.json").write_text(json.dumps({"seed": 5}))
    with pytest.raises(InputError, match="holds another corpus .*'seed': 5.*; choose another folder or delete it"):
        build_corpus(tmp_path, CORPUS)


def test_a_real_series_that_does_not_exist_is_refused_before_anything_is_drawn(tmp_path):
    told = []
    with pytest.raises(InputError, match="Unknown real series 'bank'"):
        build_corpus(
            tmp_path / "corpus",
            dataclasses.replace(CORPUS, real=("bank",)),
            progress=lambda done, total: told.append(done),
        )
    assert told == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seasonalities": (1, 7)}, r"seasonalities\[0\] must be at least 2, got 1"),
        ({"seasonalities": ()}, "seasonalities must name at least 1"),
        ({"length": 10}, "length must be at least 64, got 10"),
        ({"series_per_generator": -1}, "series_per_generator must be at least 0, got -1"),
        ({"slow_series_per_generator": -1}, "slow_series_per_generator must be at least 0, got -1"),
        ({"composed_series": -1}, "composed_series must be at least 0, got -1"),
        ({"groups": -2}, "groups must be at least 0, got -2"),
    ],
)
def test_an_impossible_corpus_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        CorpusConfig(**options)
