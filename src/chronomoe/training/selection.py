"""Choosing experts among candidates, by the validation loss of the mixture that they form."""

import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from chronomoe.errors import InputError
from chronomoe.training.validation import row_losses


def mixture_loss(
    loss_of: Callable[[tuple[int, ...]], NDArray[np.float64]],
    members: Sequence[int],
    domain: NDArray[np.int64],
    *,
    top_k: int,
) -> float:
    """Loss of the mixture that some experts could form if every domain were sent to its best ``top_k`` of them.

    Args:
        loss_of: per-window loss of the plain average of some experts' forecasts.
        members: the experts.
        domain: of each window.
        top_k: experts of a domain.
    """
    teams = [team for size in range(1, top_k + 1) for team in itertools.combinations(members, size)]
    losses = np.stack([loss_of(team) for team in teams])
    return float(np.mean([losses[:, domain == place].mean(axis=1).min() for place in np.unique(domain)]))


def select_experts(
    quantiles: torch.Tensor,
    target: torch.Tensor,
    levels: torch.Tensor,
    domain: NDArray[np.int64],
    *,
    count: int,
    top_k: int,
) -> list[int]:
    """Choose ``count`` candidates greedily, each time the one that lowers the validation loss of the mixture most.

    Args:
        quantiles: candidates' normalised forecasts of validation rows, ``(row, expert, quantile, horizon)``.
        target: normalised, ``(row, horizon)``; NaN does not count.
        levels: quantile levels.
        domain: of each row.
        count: experts to keep, as a rule 3 to 5.
        top_k: experts that the mixture will use for a series.

    Raises:
        InputError: ``count`` is not from 1 to the number of candidates.
    """
    candidates = quantiles.shape[1]
    if not 1 <= count <= candidates:
        raise InputError(f"the number of experts to keep must be from 1 to {candidates}, got {count}")

    @functools.cache
    def loss_of(team: tuple[int, ...]) -> NDArray[np.float64]:
        loss = row_losses(quantiles[:, list(team)].float().mean(dim=1), target, levels=levels)
        return loss.cpu().double().numpy()

    alone = [mixture_loss(loss_of, (index,), domain, top_k=1) for index in range(candidates)]  # decides ties
    chosen: list[int] = []
    while len(chosen) < count:
        rest = [index for index in range(candidates) if index not in chosen]
        losses = {index: mixture_loss(loss_of, tuple(sorted([*chosen, index])), domain, top_k=top_k) for index in rest}
        chosen.append(min(losses, key=lambda index: (losses[index], alone[index])))
    return chosen
