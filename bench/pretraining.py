"""What does each efficiency measure of pretraining bring in samples per second?

Each measure is tried against the way without it on the same batches, step by step in turns: forward, backward and the
optimiser's step of a teacher of the size given. A sample is a univariate window. Every other measure is as in
pretraining: exact group attention, windows of one length in a batch, fused AdamW, float32, patches of 16 steps. For
packing, windows of mixed lengths are padded to the longest, or sorted by length into batches of as many steps in all.
"""

import argparse
import copy
import statistics
from collections.abc import Callable

import torch
from answer import answer, in_turns, ratio
from chronos.chronos2 import Chronos2Model
from torch import Tensor

from chronomoe.pretraining.batches import MixConfig
from chronomoe.pretraining.config import PretrainConfig, TeacherConfig
from chronomoe.pretraining.corpus import CorpusConfig
from chronomoe.pretraining.teacher import new_teacher
from chronomoe.training.averaging import AveragedAdamW

Batches = list[tuple[Tensor, Tensor]]
"""Contexts and targets."""
Step = Callable[[], None]


def settings(options: argparse.Namespace, *, patch_size: int = 16) -> PretrainConfig:
    """Configure a teacher of the size asked for."""
    heads = max(1, options.d_model // 64)
    return PretrainConfig(
        teacher=TeacherConfig(
            d_model=options.d_model,
            num_heads=heads,
            d_ff=4 * options.d_model,
            num_layers=options.layers,
            patch_size=patch_size,
        ),
        mix=MixConfig(context_length=options.context_length, min_context_length=32, horizon=options.horizon),
        corpus=CorpusConfig(length=options.context_length + options.horizon),
    )


def upstream(model: Chronos2Model) -> Chronos2Model:
    """Return a copy with upstream's own forward pass."""
    stock = Chronos2Model(copy.deepcopy(model.config))
    stock.load_state_dict(model.state_dict())
    return stock


def training_step(
    model: Chronos2Model, batches: Batches, *, bf16: bool = False, optimizer: torch.optim.Optimizer | None = None
) -> Step:
    """Return what trains once on each batch."""
    chosen = optimizer or AveragedAdamW(model.parameters(), lr=1e-4, fused=True)
    patch = model.chronos_config.output_patch_size

    def step() -> None:
        for context, target in batches:
            chosen.zero_grad()
            with torch.autocast(context.device.type, dtype=torch.bfloat16, enabled=bf16):
                loss = model(context, future_target=target, num_output_patches=target.shape[1] // patch).loss
            loss.backward()
            chosen.step()

    return step


def draw(lengths: list[int], *, horizon: int) -> Batches:
    """Make one batch of windows of these lengths, padded to the longest."""
    context = torch.randn(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        context[row, : max(lengths) - length] = torch.nan
    return [(context, torch.randn(len(lengths), horizon))]


def packed(lengths: list[int], *, rows: int, horizon: int) -> Batches:
    """Make batches of windows of about one length each, with about as many steps as ``rows`` of the longest."""
    left, most = sorted(lengths), rows * max(lengths)
    batches: Batches = []
    while left:
        count = 1
        while count < len(left) and (count + 1) * left[count] <= most:
            count += 1
        batches += draw(left[:count], horizon=horizon)
        left = left[count:]
    return batches


def compare(without: Step, with_measure: Step, *, samples: int, repeats: int) -> dict[str, float]:
    """Take both in turns, after one turn to warm up."""
    seconds = in_turns({"without": without, "with": with_measure}, repeats=repeats)
    return {f"{name}_per_second": round(samples / statistics.median(times), 1) for name, times in seconds.items()} | {
        "ratio": ratio(seconds, over="without", under="with")
    }


def measures(options: argparse.Namespace) -> dict[str, tuple[Step, Step, int]]:
    """Return, by measure, the step without it, the step with it, and the samples of each."""
    model = new_teacher(settings(options))
    rows, horizon = options.rows, options.horizon
    full = draw([options.context_length] * rows, horizon=horizon)
    quarters = [options.context_length * (1 + index % 4) // 4 for index in range(4 * rows)]
    padded: Batches = []
    for index in range(4):
        padded += draw(quarters[index * rows : (index + 1) * rows], horizon=horizon)
    plain, fused = copy.deepcopy(model), copy.deepcopy(model)
    coarse = new_teacher(settings(options, patch_size=32))
    return {
        "exact group attention": (
            training_step(upstream(model), full),
            training_step(copy.deepcopy(model), full),
            rows,
        ),
        "packing by length": (
            training_step(copy.deepcopy(model), padded),
            training_step(copy.deepcopy(model), packed(quarters, rows=rows, horizon=horizon)),
            len(quarters),
        ),
        "fused AdamW": (
            training_step(plain, full, optimizer=torch.optim.AdamW(plain.parameters(), lr=1e-4, foreach=False)),
            training_step(fused, full, optimizer=torch.optim.AdamW(fused.parameters(), lr=1e-4, fused=True)),
            rows,
        ),
        "bf16 autocast": (
            training_step(copy.deepcopy(model), full),
            training_step(copy.deepcopy(model), full, bf16=True),
            rows,
        ),
        "patch 32 instead of 16": (training_step(copy.deepcopy(model), full), training_step(coarse, full), rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="windows of a batch of the longest")
    parser.add_argument("--context-length", type=int, default=512, help="a multiple of 128")
    parser.add_argument("--horizon", type=int, default=96, help="a multiple of 32")
    parser.add_argument("--d-model", type=int, default=256, help="width of the teacher")
    parser.add_argument("--layers", type=int, default=4, help="blocks of the teacher")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds; the median counts")
    options = parser.parse_args()
    torch.manual_seed(0)
    found = {
        name: compare(without, with_measure, samples=samples, repeats=options.repeats)
        for name, (without, with_measure, samples) in measures(options).items()
    }
    answer(
        "samples per second with and without each efficiency measure of pretraining",
        rows=options.rows,
        context_length=options.context_length,
        horizon=options.horizon,
        d_model=options.d_model,
        layers=options.layers,
        measures=found,
    )


if __name__ == "__main__":
    main()
