"""Why a router chose an expert: the parts of a series that speak for it."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from chronomoe.models.mixture.features import LAGS, NUM_BANDS, NUM_FEATURES, NUM_RECENT
from chronomoe.models.mixture.mixture import DistilledMoE

STEPS = 32
"""Points of the path on which gradients are taken."""
UNFAMILIAR = "unlike all series that the router learned from"
SHAPE = (
    *("skewness", "heavy tails", "mean deviation", "trend", "level of the last quarter", "spread of the last quarter"),
    *("size of steps", "change of steps", "share missing", "length", "share unchanged", "share at the lowest value"),
)


def feature_groups(*, length: int, size: int) -> Iterator[tuple[str, slice]]:
    """Name the router's inputs, those that mean little alone together.

    Args:
        length: steps that the features describe.
        size: number of inputs; those beyond ``NUM_FEATURES`` are a patch embedding.
    """
    yield from ((name, slice(place, place + 1)) for place, name in enumerate(SHAPE))
    start = len(SHAPE)
    yield from ((f"autocorrelation at {lag} steps", slice(start + at, start + at + 1)) for at, lag in enumerate(LAGS))
    start += len(LAGS)
    edges = [length / (length // 2) ** (band / NUM_BANDS) for band in range(NUM_BANDS + 1)]  # periods
    for band, (longest, shortest) in enumerate(zip(edges, edges[1:], strict=False)):
        yield f"seasons of {shortest:.3g} to {longest:.3g} steps", slice(start + band, start + band + 1)
    start += NUM_BANDS
    yield "latest values", slice(start, start + NUM_RECENT)
    if size > NUM_FEATURES:
        yield "patch embedding", slice(NUM_FEATURES, size)


def explain(mixture: DistilledMoE, context: Float[Tensor, "row time"], *, most: int = 5) -> list[tuple[str, float]]:
    """Return the groups of features that speak most for the first expert of a series and against the second.

    Integrated gradients (Sundararajan et al., 2017, https://arxiv.org/abs/1703.01365) of the difference of both scores,
    from the average training series to this one: over all groups they sum to what this series adds to that difference.
    A series that the teacher forecasts because it is unfamiliar has that one reason.

    Args:
        mixture: whose router chose.
        context: a series with its covariates, which choose together.
        most: groups to return, those of the largest size first; negative ones speak for the second expert.
    """
    router = mixture.router
    if mixture.teacher is not None:
        whole = torch.zeros(len(context), dtype=torch.long, device=context.device)
        if int(mixture.route(context, group_ids=whole).expert[0, 0]) == router.num_experts:
            return [(UNFAMILIAR, 1.0)]
    seen = context.isfinite().any(dim=1)
    inputs = mixture.router_inputs(context[seen] if seen.any() else context)
    with torch.no_grad():
        first, second = router(inputs).mean(dim=0).topk(min(2, router.num_experts)).indices[[0, -1]].tolist()
    reach = (inputs.float() - router.mean.float()) / router.spread.float()
    total = torch.zeros_like(reach)
    for step in range(STEPS):
        point = router.mean + (step + 0.5) / STEPS * reach * router.spread
        point = point.to(inputs.dtype).requires_grad_()
        with torch.enable_grad():
            score = router(point)
            total += torch.autograd.grad((score[:, first] - score[:, second]).sum(), point)[0] * router.spread / STEPS
    parts = (total * reach).mean(dim=0)
    names = feature_groups(length=mixture.moe.router.feature_length, size=len(parts))
    sums = [(name, float(parts[place].sum())) for name, place in names]
    return sorted(sums, key=lambda each: -abs(each[1]))[:most]
