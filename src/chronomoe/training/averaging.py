"""AdamW that also keeps a running average of the weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

AVERAGE = "average"
"""Key of the average in the optimiser's state of a parameter."""


class AveragedAdamW(torch.optim.AdamW):
    """AdamW, plus an exponential moving average of each parameter in its state.

    The average lies in the optimiser's state, so checkpoints hold it and resuming continues it with no further code. It
    takes the place of most of a learning rate decay; Hägele et al., 2024, https://arxiv.org/abs/2405.18392.

    Args:
        params: as AdamW takes them.
        average_decay: weight of the old average in each step, from 0 (no average: the weights themselves) to below 1.
            Early on it is less, so that the initial weights are soon forgotten.
        **options: as AdamW takes them.
    """

    def __init__(self, params: Any, *, average_decay: float = 0.999, **options: Any) -> None:
        super().__init__(params, **options)
        for group in self.param_groups:
            group["average_decay"] = average_decay

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step of AdamW, then move the averages."""
        loss: float | None = super().step(closure)
        for group in self.param_groups:
            group["taken"] = taken = group.get("taken", 0) + 1
            decay = min(group["average_decay"], taken / (taken + 10))
            averages, weights = [], []
            for weight in group["params"]:
                state = self.state.get(weight)
                if not state:
                    continue  # no gradient has come yet
                if AVERAGE not in state:
                    state[AVERAGE] = weight.detach().clone(memory_format=torch.preserve_format)
                averages.append(state[AVERAGE])
                weights.append(weight.detach())
            if averages:
                torch._foreach_lerp_(averages, weights, 1 - decay)
        return loss


@contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Replace the weights by the optimiser's averages while the block runs."""
    swapped: list[tuple[Tensor, Tensor]] = []
    if optimizer is not None:
        for weight, state in optimizer.state.items():
            if AVERAGE in state:
                swapped.append((weight, weight.detach().clone()))
                weight.data.copy_(state[AVERAGE])
    try:
        yield
    finally:
        for weight, own in swapped:
            weight.data.copy_(own)


def use_averaged_weights(optimizer: torch.optim.Optimizer) -> None:
    """Replace the weights by their averages for good."""
    for weight, state in optimizer.state.items():
        if AVERAGE in state:
            weight.data.copy_(state[AVERAGE])
