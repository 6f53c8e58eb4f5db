"""Cross-learning with a mixture: the batch is one group, and each series is routed on its own."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from chronomoe.models.mixture.mixture import DistilledMoE


class RoutedBySeries:
    """A mixture that routes each series of a batch on its own, though the batch may be one group."""

    def __init__(self, mixture: DistilledMoE, series: Tensor) -> None:
        self.mixture, self.series = mixture, series.to(mixture.device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.mixture, name)

    def __call__(self, context: Tensor, **inputs: Any) -> Any:
        """Forecast; each series has several rows in turn, one a path, where a long horizon is unrolled."""
        paths = len(context) // len(self.series)
        path = torch.arange(paths, device=self.series.device)
        return self.mixture(context=context, route_ids=(self.series[:, None] * paths + path).flatten(), **inputs)


def series_of_rows(target_idx_ranges: Sequence[Sequence[int]], rows: int) -> Int[Tensor, " row"]:
    """Number the series of each row of a batch; a series' covariates follow its targets."""
    first = torch.tensor([start for start, _ in target_idx_ranges])
    return torch.searchsorted(first, torch.arange(rows), right=True) - 1
