import weakref
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from chronomoe.data.clusters import cluster_domains, embed_series
from chronomoe.data.domains import Domain
from chronomoe.data.frames import frame_to_series
from chronomoe.data.split import Split
from chronomoe.data.table import SeriesTable
from chronomoe.errors import InputError
from chronomoe.models.chronos2 import use_exact_group_attention
from sample_series import sample_domain, sample_series, series_to_frame


@pytest.fixture
def exact(make_teacher):
    return use_exact_group_attention(make_teacher())


@pytest.fixture
def domains():
    """Waves and ramps, mixed in the first domain, ramps alone in the second."""
    series = [sample_series(("wave", "count")[seed % 2], seed=seed) for seed in range(8)]
    return [Domain(name="mixed", series=series, seasonality=12), sample_domain("count", name="alone")]


def members(clusters):
    return {domain.name: [series.item_id for series in domain.series] for domain in clusters}


def test_two_obviously_different_kinds_fall_in_different_clusters(exact, domains):
    clusters = cluster_domains(domains, exact, num_clusters=2, seed=0)
    kinds = {}
    for domain in clusters:
        label, home = domain.name.split("/")
        assert home in ("mixed", "alone")
        kinds.setdefault(label, set()).update(series.item_id.split("-")[0] for series in domain.series)
    assert sorted(map(sorted, kinds.values())) == [["count"], ["wave"]]


def test_every_series_is_in_one_cluster_and_keeps_split_and_seasonality(exact, domains):
    domains[1] = replace(domains[1], seasonality=7, cutoffs=Split(train=0.5))
    clusters = cluster_domains(domains, exact, num_clusters=3, seed=0)
    given = {id(series) for domain in domains for series in domain.series}
    found = [id(series) for cluster in clusters for series in cluster.series]
    assert len(found) == len(given)
    assert set(found) == given
    for cluster in clusters:
        home = next(domain for domain in domains if cluster.name.endswith("/" + domain.name))
        assert (cluster.seasonality, cluster.cutoffs) == (home.seasonality, home.cutoffs)


def test_the_same_seed_finds_the_same_clusters(exact, domains):
    first, second = (cluster_domains(domains, exact, num_clusters=3, seed=4) for _ in range(2))
    assert members(first) == members(second)


class OnDisk(Sequence):
    """Series that are made when they are read; knows how many there are at a time."""

    def __init__(self, count):
        self.count, self.most, self._alive = count, 0, weakref.WeakSet()

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        series = sample_series(seed=index)
        self._alive.add(series)
        self.most = max(self.most, len(self._alive))
        return series


def test_series_on_a_disk_are_read_one_after_the_other(exact):
    series = OnDisk(20)
    embed_series(exact, series, stops=[60] * 20, batch_size=4)
    assert series.most <= 2
    table = frame_to_series(series_to_frame([sample_series(seed=seed) for seed in range(6)]))
    domain = Domain(name="table", series=table, seasonality=12)
    for part in cluster_domains([domain], exact, num_clusters=2, seed=0):
        assert isinstance(part.series, SeriesTable)
        assert part.series.parts == table.parts


def test_nothing_after_the_training_part_is_seen(exact, domains):
    def changed(domain):
        series = [
            replace(item, target=np.concatenate([item.target[:, :140], item.target[:, 140:] * 9 + 5], axis=1))
            for item in domain.series
        ]
        return replace(domain, series=series)

    stops = [140] * 3
    before, after = domains[1].series, changed(domains[1]).series
    assert torch.equal(embed_series(exact, before, stops=stops), embed_series(exact, after, stops=stops))
    assert not torch.equal(embed_series(exact, before, stops=[150] * 3), embed_series(exact, after, stops=[150] * 3))
    others = [changed(domain) for domain in domains]
    clusters = [cluster_domains(each, exact, num_clusters=2, seed=0) for each in (domains, others)]
    assert members(clusters[0]) == members(clusters[1])


@pytest.mark.parametrize("use_reg_token", [True, False])
def test_patches_never_observed_do_not_count(make_teacher, use_reg_token):
    exact = use_exact_group_attention(make_teacher(forecasting={"use_reg_token": use_reg_token}))
    series = sample_series(length=48)
    gap = np.full((1, 64), np.nan, dtype=np.float32)
    padded = replace(series, target=np.concatenate([gap, series.target], axis=1))
    states, *_ = exact.encode(torch.from_numpy(series.target))  # three full patches, none to leave out
    for item in (series, padded):
        torch.testing.assert_close(embed_series(exact, [item], stops=[len(item)]), states[0].mean(dim=1))
    inner = replace(padded, target=np.concatenate([series.target, gap, series.target], axis=1))
    assert embed_series(exact, [inner], stops=[160]).isfinite().all()


def test_a_series_never_observed_has_a_finite_embedding(exact):
    empty = replace(sample_series(), target=np.full((1, 200), np.nan, dtype=np.float32))
    assert embed_series(exact, [empty], stops=[140]).isfinite().all()


def test_an_embedding_does_not_depend_on_the_batch_and_averages_variates(exact):
    series = [sample_series(seed=0, variates=3), sample_series("count", seed=1), sample_series(seed=2)]
    together = embed_series(exact, series, stops=[140] * 3)
    one_by_one = embed_series(exact, series, stops=[140] * 3, batch_size=1)
    torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-5)
    assert together.shape == (3, 48)


@pytest.mark.parametrize("count", [0, 12])
def test_an_impossible_number_of_clusters_is_refused(exact, domains, count):
    message = f"the number of clusters must be from 1 to 11, the number of series, got {count}"
    with pytest.raises(InputError, match=message):
        cluster_domains(domains, exact, num_clusters=count, seed=0)
