"""A training step and a forecast, timed on this machine before a run."""

import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from chronomoe.data.windows import Batch, Window, collate, model_inputs, to_device
from chronomoe.evaluation.cost import live_bytes
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.training.losses import quantile_loss

FIRST_ROWS = 4
"""Windows of the first trial; a whole batch is timed where these take less than ``QUICK`` seconds."""
QUICK = 0.3
ROUTER_BATCH = 256


class Trial(NamedTuple):
    """What one window costs with one model."""

    step: float
    """Seconds of its part of a training step."""
    forecast: float
    """Seconds of a forecast."""
    activations: float
    """Bytes that are alive at once in a training step."""


def measure(model: ExactChronos2Model, windows: Sequence[Window], *, train: bool = True, bf16: bool = False) -> Trial:
    """Time a forecast of a model and, unless told not to, a training step, and find the most that activations take.

    The step is one of ``bf16`` autocast or not, the forecast in the type of ``computing_in``. A few windows first; all
    of them where that is quick, since a large batch costs less a window. Weights stay.
    """
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.0)

    def step(part: Sequence[Window]) -> None:
        if train:
            optimizer.zero_grad(set_to_none=False)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                found = model.train()(**_inputs(model, part)).normalized_preds
            found.float().abs().mean().backward()
            optimizer.step()
            _finish(model)

    def forecast(part: Sequence[Window]) -> None:
        with torch.inference_mode():
            model.eval()(**_inputs(model, part))
        _finish(model)

    few = windows[:FIRST_ROWS]
    step(few)  # makes gradients and moments, which are counted elsewhere
    forecast(few)
    activations = live_bytes(lambda: step(few)) / len(few)
    if max(_least(step, few), _least(forecast, few)) < QUICK:
        few = windows
    found = Trial(_least(step, few) / len(few), _least(forecast, few) / len(few), activations)
    optimizer.zero_grad()
    model.eval()
    return found


def _finish(model: ExactChronos2Model) -> None:
    """Wait for a GPU, which works on while the call that gave it work returns."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _inputs(model: ExactChronos2Model, windows: Sequence[Window]) -> Batch:
    batch = collate(windows, patch_size=model.chronos_config.output_patch_size)
    return model_inputs(to_device(batch, model.device))


def _least(call: Callable[..., None], *given: Any, repeats: int = 2) -> float:
    """Return the least time of a call, without the time that it waits for other work on the machine."""
    times = []
    for _ in range(repeats):
        wall, busy = time.perf_counter(), time.process_time()
        call(*given)
        times += [time.perf_counter() - wall, time.process_time() - busy]
    return min(times)


def router_step(experts: int, levels: int, horizon: int) -> float:
    """Time a training step of a router on forecasts of its experts, which is nearly all that a step takes."""
    quantiles = torch.randn(ROUTER_BATCH, experts, levels, horizon).half()
    target, numbers = torch.randn(ROUTER_BATCH, horizon), torch.linspace(0.01, 0.99, levels)
    score = torch.zeros(ROUTER_BATCH, experts, requires_grad=True)

    def step() -> None:
        mixed = torch.einsum("re,reqh->rqh", score.softmax(dim=1), quantiles.float())
        quantile_loss(mixed, target, levels=numbers).mean().backward()

    return _least(step)


def machine() -> dict[str, Any]:
    """Say what this machine is, and what it computes with."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return {
        "processor": names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "chronos": version("chronos-forecasting"),
        "python": platform.python_version(),
    }
