"""Domains found in a teacher's embeddings, where none are given."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from sklearn.cluster import KMeans
from torch import Tensor

from chronomoe.data.domains import Domain
from chronomoe.data.series import Series
from chronomoe.data.table import lengths_of, take
from chronomoe.errors import InputError
from chronomoe.models.chronos2 import ExactChronos2Model


@torch.no_grad()
def embed_series(
    teacher: ExactChronos2Model, series: Sequence[Series], *, stops: Sequence[int], batch_size: int = 64
) -> Float[Tensor, "series d_model"]:
    """Embed each series: the mean over tokens and variates of the teacher's encoding of its steps before ``stops``.

    Args:
        teacher: any Chronos-2 model.
        series: to embed.
        stops: row of each series at which its context ends, so that nothing later than the training part is seen.
        batch_size: series at a time.
    """
    teacher.eval()
    length = teacher.chronos_config.context_length
    means = []
    for start in range(0, len(stops), batch_size):
        rows, owner = [], []
        for index in range(start, min(start + batch_size, len(stops))):
            target = series[index].target[:, max(0, stops[index] - length) : stops[index]].astype(np.float32)
            rows += [np.pad(row, (length - len(row), 0), constant_values=np.nan) for row in target]
            owner += [index - start] * len(target)
        context = torch.from_numpy(np.stack(rows)).to(teacher.device)
        group = torch.tensor(owner, device=teacher.device)
        states, *_ = teacher.encode(context, group_ids=group)
        tokens = states[0].float()
        observed = teacher.patch(context).isfinite().any(dim=-1)
        always = observed.new_ones(len(rows), tokens.shape[1] - observed.shape[1])
        seen = torch.cat([observed, always], dim=1)
        pooled = (tokens * seen[..., None]).sum(dim=1) / seen.sum(dim=1, keepdim=True)
        total = pooled.new_zeros(owner[-1] + 1, pooled.shape[1]).index_add(0, group, pooled)
        means.append((total / torch.bincount(group)[:, None]).cpu())
    return torch.cat(means)


def cluster_domains(
    domains: Sequence[Domain], teacher: ExactChronos2Model, *, num_clusters: int, seed: int
) -> list[Domain]:
    """Regroup the series of some domains by k-means on their embeddings.

    Series keep the split and seasonality of the domain they come from, so a cluster can hold parts of several; each
    part is a domain called ``cluster-<c>/<domain>``, and those of one cluster train one expert. Series that lie on a
    disk stay there, a batch of them in memory at a time.

    Raises:
        InputError: fewer series than clusters.
    """
    sizes = [len(domain.series) for domain in domains]
    if not 1 <= num_clusters <= sum(sizes):
        raise InputError(
            f"the number of clusters must be from 1 to {sum(sizes)}, the number of series, got {num_clusters}"
        )
    stops = [[domain.cutoffs.of(int(length)).train for length in lengths_of(domain.series)] for domain in domains]
    found = [embed_series(teacher, domain.series, stops=own) for domain, own in zip(domains, stops, strict=True)]
    embedding = torch.cat(found)
    standard = (embedding - embedding.mean(dim=0)) / embedding.std(dim=0, correction=0).clamp(min=1e-6)
    labels = KMeans(num_clusters, n_init=10, random_state=seed).fit_predict(standard.numpy())
    clusters = []
    for cluster in range(num_clusters):
        for domain, own in zip(domains, np.split(labels == cluster, np.cumsum(sizes)[:-1]), strict=True):
            if own.any():
                series = take(domain.series, np.flatnonzero(own))
                clusters.append(replace(domain, name=f"cluster-{cluster}/{domain.name}", series=series))
    return clusters
