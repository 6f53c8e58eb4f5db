"""The type in which a model computes fastest on this machine: asked of the processor, then tried."""

import statistics
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch

from chronomoe.errors import InputError
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.models.folded import computing_in
from chronomoe.models.mixture.mixture import DistilledMoE

TRIAL_SECONDS = 0.25
"""Of each type, at most, after a first pass."""
TRIAL_TOKENS = 512
"""Tokens of a trial's batch, at most: beyond, the ratio of both types stays as it is."""
MIN_GAIN = 1.05
"""A narrower type must be faster by this factor: it costs accuracy."""
Model = ExactChronos2Model | DistilledMoE
Precision = Literal["auto", "float32", "bfloat16"]
"""What is computed in, where a run must repeat to the bit: see :func:`settled`."""


class DtypeTrials:
    """Which type a model computes fastest in, found by one trial for each size of a batch.

    Sizes that are alike, to a power of two, share a trial.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.found: dict[tuple[int, int, int], torch.dtype] = {}

    def best(self, model: Model, shapes: Sequence[tuple[int, int]], *, horizon: int, batch_size: int) -> torch.dtype:
        """Return the type in which a model is fastest on batches like these: see :func:`best_dtype`.

        ``shapes`` are rows and steps of each series.
        """
        settings = model.chronos_config
        patches = -(-min(max(steps for _, steps in shapes), settings.context_length) // settings.input_patch_size)
        patches = 1 << max(patches - 1, 0).bit_length()
        ahead = min(settings.max_output_patches, -(-horizon // settings.output_patch_size))
        rows = min(batch_size, sum(rows for rows, _ in shapes), max(1, TRIAL_TOKENS // (patches + ahead)))
        size = (min(patches * settings.input_patch_size, settings.context_length), ahead, 1 << (rows.bit_length() - 1))
        if size not in self.found:
            length, ahead, rows = size
            steps = ahead * settings.output_patch_size
            best = best_dtype(model, context_length=length, horizon=steps, batch_size=rows, clock=self.clock)
            self.found.setdefault(size, best)  # of another thread
            for part in model.modules():
                if isinstance(part, ExactChronos2Model):
                    part.forget_folds(keep={*self.found.values()})
        return self.found[size]


def settled(wanted: Precision, model: Model) -> torch.dtype:
    """Return the type that a name stands for: with ``auto``, bfloat16 where the model's processor has units for it.

    No trial by a clock, whose answer may be another one tomorrow: a run that is repeated must end with the same bits.

    Raises:
        InputError: the name is none of these.
    """
    if wanted not in (names := get_args(Precision)):
        raise InputError(f"dtype must be one of {', '.join(names)}, got {wanted!r}")
    narrow = wanted == "bfloat16" or (wanted == "auto" and has_bfloat16_units(model.device))
    return torch.bfloat16 if narrow else torch.float32


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 in hardware; elsewhere it is some 30 times slower than float32."""
    if device.type == "cpu":
        return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


@torch.no_grad()
def best_dtype(
    model: Model,
    *,
    context_length: int,
    horizon: int,
    batch_size: int,
    clock: Callable[[], float],
) -> torch.dtype:
    """Return the type for ``computing_in`` in which a model forecasts batches of this size fastest.

    The processor must have units for bfloat16 *and* a trial on random series must show that it wins at this size. A
    forecast's weighted quantile loss on real series changes by less than 0.1 %.

    Args:
        model: with float32 parameters, else the answer is float32; it is left as it was.
        context_length: steps of a series.
        horizon: steps of a forecast, of one pass at most.
        batch_size: rows at a time.
        clock: tells seconds, as ``time.perf_counter`` does.
    """
    device = model.device
    if not has_bfloat16_units(device) or model.dtype != torch.float32:
        return torch.float32
    settings = model.chronos_config
    series = torch.randn(batch_size, context_length, generator=torch.Generator().manual_seed(0)).cumsum(dim=1)
    patches = min(settings.max_output_patches, -(-horizon // settings.output_patch_size))
    types, training, seconds = (torch.float32, torch.bfloat16), model.training, []
    try:
        model.eval()
        for dtype in types:
            with computing_in(dtype):
                seconds.append(_median_seconds(model, series.to(device), patches, clock))
    finally:
        model.train(training)
    return types[seconds[1] * MIN_GAIN < seconds[0]]


def _median_seconds(model: Model, series: torch.Tensor, patches: int, clock: Callable[[], float]) -> float:
    taken: list[float] = []
    while len(taken) < 3 or sum(taken[1:]) < TRIAL_SECONDS and len(taken) < 20:
        begin = clock()
        model(series, num_output_patches=patches).normalized_preds.sum().item()  # waits for an accelerator
        taken.append(clock() - begin)
    return statistics.median(taken[1:])  # the first pass folds the weights
