"""What a pipeline promises of every forecast: quantiles in order, constants forecast as constants."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def constant_level(values: Float[Tensor, "batch time"], *, group_ids: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Return the value that each row always has; NaN for rows that vary or share a group with one that does.

    Chronos-2 scales a row that never varies by 1e-5: what a model says of it is noise of that size.

    Args:
        values: of each row, past and known future; NaN where unknown. A row without any is not constant.
        group_ids: rows of one group may move each other.
    """
    seen = ~values.isnan()
    low = values.where(seen, torch.inf).amin(dim=1)
    high = values.where(seen, -torch.inf).amax(dim=1)
    moved = torch.isin(group_ids, group_ids[low != high])
    return low.masked_fill(moved, torch.nan)


def put_in_order(
    quantiles: Float[Tensor, "row quantile horizon"], *, level: Float[Tensor, " row"]
) -> Float[Tensor, "row quantile horizon"]:
    """Sort the quantiles of each step, and take ``level`` for all of them where it is not NaN."""
    level = level[:, None, None]
    return torch.where(level.isnan(), quantiles.sort(dim=1).values, level)
