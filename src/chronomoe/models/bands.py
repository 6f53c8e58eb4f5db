"""Recalibrated bands: how far each quantile lies from the median, stretched so that it covers what it says.

Split-conformal calibration of a forecaster's quantiles (conformalized quantile regression; Romano, Patterson & Candès,
2019, https://arxiv.org/abs/1905.03222) of every central band, with scores relative to the distance from the median, so
that series of any unit share them (the CQR-m of Sesia & Candès, 2020, https://arxiv.org/abs/1909.05433). Each
expert has its own (Mondrian) scores: domains whose bands err in opposite directions do not cancel.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from chronomoe.errors import InputError
from chronomoe.models.mixture.cross_learning import series_of_rows

MEDIAN = 0.5
WIDEST = 100.0
"""Largest factor; where more were needed, the forecast is wrong and not its spread."""


class Bands(NamedTuple):
    """What a quantile's distance from the median is multiplied by."""

    factor: Float[Tensor, "expert quantile horizon"]
    """Quantile levels ascend; a model that is no mixture has one expert."""
    windows: Int[Tensor, " expert"]
    """That each expert's own factors were fitted on; 0 where it takes those of all windows together."""

    def apply(
        self, quantiles: Float[Tensor, "row quantile horizon"], *, expert: Int[Tensor, " row"], median: int
    ) -> Float[Tensor, "row quantile horizon"]:
        """Stretch forecasts whose quantiles ascend; steps beyond the fitted horizon take the factors of its last."""
        steps = torch.arange(quantiles.shape[-1]).clamp(max=self.factor.shape[-1] - 1)
        middle = quantiles[:, median : median + 1]
        return (middle + self.factor[expert][..., steps] * (quantiles - middle)).sort(dim=1).values


def fit_bands(
    quantiles: Float[np.ndarray, "row quantile horizon"],
    target: Float[np.ndarray, "row horizon"],
    *,
    expert: Int[np.ndarray, " row"],
    num_experts: int,
    levels: Sequence[float],
) -> Bands:
    """Fit bands to forecasts of windows that no training saw.

    The band between two levels covers at least its share of exchangeable windows. An expert with fewer windows than the
    widest band takes to be bounded takes the factors of all windows. Steps that were not observed, and sides of a band
    that have no width, count nowhere.

    Args:
        quantiles: levels ascend.
        target: what happened, NaN where unknown.
        expert: the one with the largest gate, of each row.
        num_experts: of the model; 1 where it is no mixture.
        levels: quantile levels, in pairs around the median.

    Raises:
        InputError: there is no median, a level has no counterpart, or there are too few windows in all.
    """
    median = middle_of(levels)
    share = np.abs(1 - 2 * np.asarray(levels))
    needed = int(np.ceil(round(share.max() / (1 - share.max()), 6)))
    centre = quantiles[:, median : median + 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        score = np.where(quantiles == centre, np.nan, (target[:, None] - centre) / (quantiles - centre))
    score = np.fmax(score, score[:, ::-1])  # a value lies beyond one side of a band at most
    together = _factors(score, share, median=median)
    if np.isnan(together).any():
        raise InputError(
            f"recalibration of the band of {share.max():.0%} needs at least {needed} windows in which every forecast "
            f"step was observed and its quantiles differ, got {len(score)} windows; pass more series or longer ones"
        )
    factor, windows = [], []
    for index in range(num_experts):
        own = _factors(score[expert == index], share, median=median)
        enough = not np.isnan(own).any()
        factor.append(own if enough else together)
        windows.append(int((expert == index).sum()) if enough else 0)
    return Bands(torch.from_numpy(np.stack(factor)).float(), torch.tensor(windows))


def _factors(
    score: Float[np.ndarray, "row quantile horizon"], share: Float[np.ndarray, " quantile"], *, median: int
) -> Float[np.ndarray, "quantile horizon"]:
    """Return the conformal quantile of the scores of each level and step; NaN where there are too few, 1 at the median.

    It is the ``ceil((n + 1) * share)``-th smallest of ``n`` scores.
    """
    count = (~np.isnan(score)).sum(axis=0)  # (Q, H)
    rank = np.ceil(np.round((count + 1) * share[:, None], 6)).astype(int)
    ordered = np.concatenate([np.sort(score, axis=0), np.full((1, *score.shape[1:]), np.nan)])  # NaN last
    place = np.where(rank <= count, rank - 1, len(score))
    factor: np.ndarray = np.clip(np.take_along_axis(ordered, place[None], axis=0)[0], 0.0, WIDEST)
    factor[median] = 1.0
    return factor


def middle_of(levels: Sequence[float]) -> int:
    """Return the place of the median among quantile levels, in ascending order.

    Raises:
        InputError: it is not among them, or a level has no counterpart.
    """
    ordered = np.sort(levels)
    if len(ordered) % 2 == 0 or not np.allclose(ordered + ordered[::-1], 2 * MEDIAN):
        raise InputError(
            f"bands are stretched around the median, between levels such as 0.1 and 0.9; the model has {list(levels)}"
        )
    return len(ordered) // 2


@torch.no_grad()
def with_bands(
    model: Any, forecasts: Sequence[Tensor], context: Tensor, ranges: Sequence[Sequence[int]]
) -> Sequence[Tensor]:
    """Apply the bands of a model to its forecasts; without any, return these as they are.

    Args:
        model: its ``bands`` are read.
        forecasts: of each series, ``(variate, quantile, horizon)``, quantiles ascending.
        context: rows that the model read, ``(row, time)``.
        ranges: first row of each series, and the one after its last target.
    """
    bands = getattr(model, "bands", None)
    if bands is None:
        return forecasts
    expert = torch.zeros(len(context), dtype=torch.long)
    if len(bands.factor) > 1:
        series = series_of_rows(ranges, len(context)).to(model.device)
        expert = model.route(context.to(model.device, torch.float32), group_ids=series).expert[:, 0].cpu()
    median = middle_of(model.chronos_config.quantiles)
    return [
        bands.apply(forecast, expert=expert[first:last], median=median)
        for forecast, (first, last) in zip(forecasts, ranges, strict=True)
    ]
