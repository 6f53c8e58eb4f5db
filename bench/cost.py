"""What does a forecast cost as context, horizon, batch, experts a series and experts in all grow?

A mixture of equal students forecasts while one of these varies and the rest stay at a usual size. `tools/cost_model.py`
fits a formula to the cases.
"""

import argparse
from itertools import product

import torch
from answer import answer, forecast, full_size, in_turns, medians, mixture_of

from chronomoe.evaluation.cost import varied_context
from chronomoe.models.mixture.router import RoutingConfig
from chronomoe.models.precision import has_bfloat16_units

USUAL = {"context_length": 512, "horizon": 96, "rows": 64, "num_experts": 4, "mean_experts": 1}
VARIED = {
    "context_length": [64, 256, 1024, 2048],
    "horizon": [16, 384],
    "rows": [1, 8, 256],
    "num_experts": [1, 2, 8],
    "mean_experts": [2],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="slim")
    parser.add_argument("--layers", type=int, default=12, help="of the teacher; 12 is the full size")
    parser.add_argument("--vary", nargs="*", default=list(VARIED), choices=list(VARIED))
    parser.add_argument("--repeats", type=int, default=4)
    options = parser.parse_args()
    teacher = full_size(num_layers=options.layers)
    sizes = [USUAL, *(USUAL | {name: value} for name in options.vary for value in VARIED[name])]
    types = {"float32": torch.float32}
    if has_bfloat16_units(teacher.device):
        types["bf16"] = torch.bfloat16
    cases = []
    for size, (kind, dtype) in product(sizes, types.items()):
        mixture = mixture_of(teacher, preset=options.preset, num_experts=size["num_experts"], top_k=1)
        mixture.set_routing(RoutingConfig(top_k=min(size["mean_experts"], size["num_experts"]), threshold=None))
        context = varied_context(size["rows"], context_length=size["context_length"])
        run = forecast(mixture, context, horizon=size["horizon"], dtype=dtype)
        experts_run = run().routing.expert.unique().numel()
        milliseconds = medians(in_turns({"forecast": run}, repeats=options.repeats))["forecast"]
        cases.append({**size, "dtype": kind, "experts_run": experts_run, "milliseconds": milliseconds})
    answer("the cost of a forecast by its sizes", preset=options.preset, patch_size=16, cases=cases)


if __name__ == "__main__":
    main()
