"""What a forecast costs: parameters, operations, time and memory.

Times depend on the machine, its other load and the number of threads, so only ratios of one call of :func:`compare`
mean much: it runs the models in turns, so that whatever slows the machine slows all of them.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from chronomoe.errors import InputError

WARM_UP = 2  # calls of each kind before the clock counts
ROUNDS_PER_BATCH = 4  # a full batch takes long enough to be steady: it is timed in one round of so many


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """What one model costs, with what it was measured on."""

    parameters: int
    """All parameters, shared ones once."""
    active_parameters: int
    """Parameters that one forecast uses: the model's own ``active_parameters()``, or all of them."""
    flops: int
    """Floating point operations of matrix products and attention for one window; a multiply-add counts as two."""
    latency_p50_ms: float
    """Median time of one window alone."""
    latency_p95_ms: float
    """95th percentile of that time: on a busy machine, mostly the machine's."""
    throughput: float
    """Windows a second in batches of ``batch_size``, from the median time of a batch."""
    batch_size: int
    context_length: int
    horizon: int
    threads: int
    """Threads torch may use inside one operation."""


def measure(model: nn.Module, *, context_length: int, horizon: int, batch_size: int, repeats: int = 20) -> Efficiency:
    """Measure one model; to compare several, measure them together with :func:`compare`."""
    return compare(
        {"model": model}, context_length=context_length, horizon=horizon, batch_size=batch_size, repeats=repeats
    )["model"]


def compare(
    models: Mapping[str, nn.Module], *, context_length: int, horizon: int, batch_size: int, repeats: int = 20
) -> dict[str, Efficiency]:
    """Measure models on the same windows, in turns; each is called as a ``Chronos2Model`` is.

    After a warm-up, each of ``repeats`` rounds times one window with every model, back and forth through the models,
    and one round in four a batch. The windows differ from each other, so that a mixture routes them to different
    experts. Models run where they are, in evaluation mode, and are left in the mode they were in.
    """
    for name, value in (("horizon", horizon), ("batch_size", batch_size), ("repeats", repeats)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    context = varied_context(batch_size, context_length=context_length)
    alone: dict[str, list[float]] = {name: [] for name in models}
    batch: dict[str, list[float]] = {name: [] for name in models}
    with _evaluating(models):
        for model in models.values():
            for rows in (1, batch_size):
                for _ in range(WARM_UP):
                    _timed_forecast(model, context[:rows], horizon=horizon)
        for index in range(repeats):
            turns = list(models.items())[:: 1 if index % 2 == 0 else -1]
            for name, model in turns:
                row = index % batch_size
                alone[name].append(_timed_forecast(model, context[row : row + 1], horizon=horizon))
                if index % ROUNDS_PER_BATCH == 0:
                    batch[name].append(_timed_forecast(model, context, horizon=horizon))
        flops = {name: count_flops(model, context[:1], horizon=horizon) for name, model in models.items()}
    return {
        name: Efficiency(
            parameters=count_parameters(model),
            active_parameters=count_active_parameters(model),
            flops=flops[name],
            latency_p50_ms=1000 * float(np.median(alone[name])),
            latency_p95_ms=1000 * float(np.quantile(alone[name], 0.95)),
            throughput=batch_size / float(np.median(batch[name])),
            batch_size=batch_size,
            context_length=context_length,
            horizon=horizon,
            threads=torch.get_num_threads(),
        )
        for name, model in models.items()
    }


def count_parameters(model: nn.Module) -> int:
    """Count all parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_active_parameters(model: nn.Module) -> int:
    """Return what the model's own ``active_parameters()`` says, or all parameters where it has none."""
    own = getattr(model, "active_parameters", None)
    return int(own()) if callable(own) else count_parameters(model)


def count_flops(model: nn.Module, context: Float[Tensor, "batch time"], *, horizon: int) -> int:
    """Count floating point operations of a forecast of independent rows.

    Attention runs as plain matrix products here: torch's counter does not see its fused CPU kernel.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        _forecast(model, context, horizon=horizon)
    return int(counter.get_total_flops())


def checkpoint_bytes(folder: Path | str) -> int:
    """Return the size of all files of a checkpoint, weights and configuration."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"a checkpoint is a folder, got {str(folder)!r}; save the model there first")
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def peak_memory_bytes(
    folder: Path | str, *, context_length: int, horizon: int, batch_size: int, threads: int = 1
) -> int:
    """Return the most memory a fresh process holds while it loads a checkpoint and forecasts one batch.

    The process is new because a peak never falls: in this one it would be that of everything done so far. What it
    counts is what a user's process takes: the interpreter and its libraries (some 0.5 GB, whatever the model), the
    weights and the largest moment of the forward pass. Resident memory only: swapped pages and memory of an accelerator
    are not in it, pages of libraries shared with other processes are. Needs Linux or macOS.
    """
    checkpoint_bytes(folder)
    code = f"from {__name__} import _report_peak; _report_peak()"
    arguments = [str(folder), *(str(value) for value in (context_length, horizon, batch_size, threads))]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"could not measure the memory of {str(folder)!r}:\n{done.stderr}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])


def varied_context(rows: int, *, context_length: int, seed: int = 0) -> Float[Tensor, "rows context_length"]:
    """Make windows unlike each other: waves of many periods, walks and noise in different proportions."""
    if context_length < 1:
        raise InputError(f"context_length must be at least 1, got {context_length}")
    rng = torch.Generator().manual_seed(seed)
    period = 2 ** (1 + 7 * torch.rand(rows, 1, generator=rng))
    wave = torch.sin(2 * torch.pi * torch.arange(context_length) / period)
    walk = torch.randn(rows, context_length, generator=rng).cumsum(dim=1) / context_length**0.5
    noise = torch.randn(rows, context_length, generator=rng)
    share = torch.rand(3, rows, 1, generator=rng)
    context: Tensor = share[0] * wave + share[1] * walk + share[2] * noise
    return context


def _forecast(model: nn.Module, context: Float[Tensor, "batch time"], *, horizon: int) -> None:
    patch_size: int = model.chronos_config.output_patch_size  # type: ignore[union-attr, assignment]
    device = next(model.parameters()).device
    model(
        context=context.to(device),
        group_ids=torch.arange(len(context), device=device),
        num_output_patches=-(-horizon // patch_size),
    )
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed_forecast(model: nn.Module, context: Float[Tensor, "batch time"], *, horizon: int) -> float:
    with torch.inference_mode():
        start = time.perf_counter()
        _forecast(model, context, horizon=horizon)
        return time.perf_counter() - start


@contextmanager
def _evaluating(models: Mapping[str, nn.Module]) -> Iterator[None]:
    training = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    try:
        yield
    finally:
        for name, model in models.items():
            model.train(training[name])


def _report_peak() -> None:
    """Load a checkpoint, forecast one batch and print the peak: the body of the fresh process."""
    from chronos.chronos2 import Chronos2Pipeline

    import chronomoe  # noqa: F401  registers our architectures

    folder, *numbers = sys.argv[1:]
    context_length, horizon, batch_size, threads = map(int, numbers)
    torch.set_num_threads(threads)
    model = Chronos2Pipeline.from_pretrained(folder).model.eval()
    _timed_forecast(model, varied_context(batch_size, context_length=context_length), horizon=horizon)
    print(json.dumps({"peak": _peak_of_this_process()}))


def _peak_of_this_process() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # getrusage of a child starts from its parent's peak on Linux; VmHWM does not
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
