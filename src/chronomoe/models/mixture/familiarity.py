"""Which series are unlike all that a router learned from."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from chronomoe.models.configuration import configuration
from chronomoe.models.mixture.router import Routing

RIDGE = 0.03
"""Added to the variance of each standardised feature."""


@configuration
class UnfamiliarConfig:
    """Series unlike all that the router learned from."""

    forecast_by: Literal["experts", "teacher"] = "experts"
    """Who forecasts them: the experts that the router picks, or the teacher alone, which joins the checkpoint."""
    familiar: float = Field(0.98, gt=0, lt=1)
    """Share of the router's validation windows that count as familiar: with less, the teacher forecasts more series."""


class Familiarity(nn.Module):
    """The distance of a series from all that a router learned from.

    A Gaussian is fitted to the router's inputs of each domain, and the distance is the Mahalanobis distance to the
    nearest of them (Lee et al., 2018, https://arxiv.org/abs/1807.03888), less the log-determinant of its precision. The
    covariance of a domain of few windows is drawn to that of all (Friedman, 1989,
    https://doi.org/10.1080/01621459.1989.10478752).
    """

    centre: Tensor
    spread: Tensor
    mean: Tensor
    precision: Tensor
    offset: Tensor
    limit: Tensor

    def __init__(self, *, num_domains: int, num_features: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(num_features))
        self.register_buffer("spread", torch.ones(num_features))
        self.register_buffer("mean", torch.zeros(num_domains, num_features))
        self.register_buffer("precision", torch.eye(num_features).repeat(num_domains, 1, 1))
        self.register_buffer("offset", torch.zeros(num_domains))
        self.register_buffer("limit", torch.tensor(torch.inf))

    @classmethod
    def of(cls, features: Float[Tensor, "row feature"], domain: Int[Tensor, " row"]) -> Familiarity:
        """Fit it to the router's inputs of its training windows; every series counts as familiar until a limit is set.

        Args:
            features: inputs of each row.
            domain: of each row.
        """
        own = domain.unique(return_inverse=True)[1]
        made = cls(num_domains=int(own.max()) + 1, num_features=features.shape[1]).to(features.device)
        made.centre.copy_(features.mean(dim=0))
        made.spread.copy_(features.std(dim=0, correction=0).clamp(min=1e-3))
        z = made._standardized(features).double()
        count = own.bincount().double()
        mean = z.new_zeros(made.mean.shape).index_add(0, own, z) / count[:, None]
        gap = z - mean[own]
        pooled = gap.T @ gap / len(z)
        ridge = RIDGE * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        for place, rows in enumerate(count.tolist()):
            part = gap[own == place]
            weight = rows / (rows + z.shape[1])
            covariance = weight * part.T @ part / rows + (1 - weight) * pooled + ridge
            made.precision[place] = torch.linalg.inv(covariance)
            made.offset[place] = torch.linalg.slogdet(covariance).logabsdet
        made.mean.copy_(mean)
        return made

    def _standardized(self, features: Float[Tensor, "row feature"]) -> Float[Tensor, "row feature"]:
        return ((features.float() - self.centre.float()) / self.spread.float()).clamp(-5, 5)

    def forward(self, features: Float[Tensor, "row feature"]) -> Float[Tensor, " row"]:
        """Return the distance of each row from the nearest domain."""
        gap = self._standardized(features)[None] - self.mean.float()[:, None]  # (domain, row, feature)
        square = ((gap @ self.precision.float()) * gap).sum(dim=2)
        return (square + self.offset.float()[:, None]).amin(dim=0)


def divert(routing: Routing, unfamiliar: Bool[Tensor, " group"]) -> Routing:
    """Give unfamiliar series to one expert more than the router scores, alone; its probability stays 0."""
    alone = torch.zeros_like(routing.gate)
    alone[:, 0] = 1
    last = torch.full_like(routing.expert, routing.prob.shape[1])
    away = unfamiliar[:, None]
    return Routing(
        expert=torch.where(away, torch.cat([last[:, :1], routing.expert[:, 1:]], dim=1), routing.expert),
        gate=torch.where(away, alone, routing.gate),
        prob=torch.nn.functional.pad(routing.prob, (0, 1)),
        score=torch.nn.functional.pad(routing.score, (0, 1), value=torch.finfo(torch.float32).min),
    )
