"""How much faster than upstream's full-size Chronos-2 is a mixture of students of it, at batches of 1, 64 and 256?

Upstream's code in float32 and in bf16 autocast, our exact forward pass of the same 119.5M model, one student and a
mixture of four, each in float32 and bf16, forecast the same rows in turns. Upstream's best is its faster type at that
batch. The router is as sure as a trained one: most rows take one expert, and the mean is stated.
"""

from collections import Counter

import torch
from answer import answer, batch_options, exact, forecast, full_size, in_turns, medians, mixture_of

from chronomoe.evaluation.cost import count_flops, varied_context
from chronomoe.models.precision import has_bfloat16_units

TYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
TURNS = {1: 20, 64: 4, 256: 2}
"""For each size of a batch; long ones are steady."""


def main() -> None:
    options = batch_options(__doc__, batch_sizes=[1, 64, 256])
    upstream = full_size(num_layers=options.layers)
    mixture = mixture_of(upstream, preset=options.preset, num_experts=options.num_experts)
    models = {"upstream": upstream, "exact": exact(upstream), "student": mixture.experts[0], "mixture": mixture}
    types = {name: dtype for name, dtype in TYPES.items() if name == "float32" or has_bfloat16_units(upstream.device)}
    found, experts = {}, {}
    for rows in options.batch_sizes:
        context = varied_context(rows, context_length=options.context_length)
        sides = {
            f"{name} {kind}": forecast(model, context, horizon=options.horizon, dtype=dtype)
            for name, model in models.items()
            for kind, dtype in types.items()
        }
        routing = sides["mixture float32"]().routing
        experts[rows] = round((routing.gate > 0).sum(dim=1).float().mean().item(), 2)
        found[rows] = medians(in_turns(sides, repeats=options.repeats or TURNS.get(rows, 3)))

    def best(name: str, rows: int) -> float:
        return min(time for side, time in found[rows].items() if side.startswith(name))

    large, few = max(options.batch_sizes), min(options.batch_sizes)
    middle = sorted(options.batch_sizes)[len(options.batch_sizes) // 2]
    reach = Counter()
    for kind in types:
        times = {rows: found[rows] for rows in found}
        reach[f"mixture against upstream float32, batch {large}, {kind}"] = (
            times[large]["upstream float32"] / times[large][f"mixture {kind}"]
        )
        reach[f"mixture against upstream at its best, batch {large}, {kind}"] = (
            best("upstream", large) / times[large][f"mixture {kind}"]
        )
        reach[f"mixture against upstream float32, batch {few}, {kind}"] = (
            times[few]["upstream float32"] / times[few][f"mixture {kind}"]
        )
        reach[f"exact forward pass of the whole model, batch {middle}, {kind}"] = (
            times[middle]["upstream float32"] / times[middle][f"exact {kind}"]
        )
    flops = {name: count_flops(model, context[:1], horizon=options.horizon) for name, model in models.items()}
    answer(
        "speed against upstream's full-size Chronos-2",
        reach={measure: round(value, 2) for measure, value in reach.items()},
        context_length=options.context_length,
        horizon=options.horizon,
        preset=options.preset,
        num_experts=options.num_experts,
        parameters={name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        mean_experts=experts,
        milliseconds=found,
        flop_ratio={name: round(flops["upstream"] / count, 2) for name, count in flops.items()},
    )


if __name__ == "__main__":
    main()
