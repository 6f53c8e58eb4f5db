"""Windows: one context and what follows it, cut at a cutoff, with all rows of its group."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Window(NamedTuple):
    """One group of rows cut at one cutoff: first the target's variates, then the covariates.

    NaN means missing in ``context``; no loss is taken where ``target`` is NaN, as in every covariate row.
    """

    context: NDArray[np.float32]
    """Past values, oldest first, ``(row, time)``."""
    target: NDArray[np.float32]
    """What followed, ``(row, horizon)``."""
    known: NDArray[np.float32]
    """Covariates known into the future, ``(row, horizon)``; NaN where not known."""
    index: int
    """Which window of its data set this is."""


def collate(windows: Sequence[Window], *, patch_size: int) -> dict[str, Tensor | int]:
    """Stack windows into the inputs of ``Chronos2Model.forward``.

    Contexts are padded on the left with NaN to the longest of the batch and every window is a group of its own.
    """
    longest = max(window.context.shape[1] for window in windows)
    horizon = max(window.target.shape[1] for window in windows)
    batch: dict[str, Tensor | int] = {
        "context": _stack([window.context for window in windows], longest, left=True),
        "future_target": _stack([window.target for window in windows], horizon, left=False),
        "group_ids": torch.repeat_interleave(
            torch.arange(len(windows)), torch.tensor([len(window.context) for window in windows])
        ),
        "num_output_patches": -(-horizon // patch_size),
    }
    if any(not np.isnan(window.known).all() for window in windows):
        batch["future_covariates"] = _stack([window.known for window in windows], horizon, left=False)
    return batch


def _stack(parts: Sequence[NDArray[np.float32]], length: int, *, left: bool) -> Tensor:
    stacked = np.full((sum(len(part) for part in parts), length), np.nan, dtype=np.float32)
    row = 0
    for part in parts:
        place = slice(length - part.shape[1], None) if left else slice(0, part.shape[1])
        stacked[row : row + len(part), place] = part
        row += len(part)
    return torch.from_numpy(stacked)
