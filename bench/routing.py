"""What does choosing an expert cost beside the forecast of the expert?

A mixture of four students with K = 1 forecasts in turns with one of its students alone, and with the router alone.
"""

import argparse

import torch
from answer import answer, forecast, full_size, in_turns, medians, mixture_of, ratio

from chronomoe.evaluation.cost import varied_context
from chronomoe.models.precision import has_bfloat16_units


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--preset", default="slim")
    parser.add_argument("--layers", type=int, default=12, help="of the teacher; 12 is the full size")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    mixture = mixture_of(full_size(num_layers=options.layers), preset=options.preset, num_experts=4, top_k=1)
    types = {"float32": torch.float32}
    if has_bfloat16_units(mixture.device):
        types["bf16"] = torch.bfloat16
    reach, found = {}, {}
    for rows in options.batch_sizes:
        context = varied_context(rows, context_length=512)
        for kind, dtype in types.items():

            def route(context: torch.Tensor = context) -> None:
                with torch.inference_mode():
                    mixture.route(context)

            sides = {
                "mixture": forecast(mixture, context, horizon=96, dtype=dtype),
                "student": forecast(mixture.experts[0], context, horizon=96, dtype=dtype),
                "routing": route,
            }
            seconds = in_turns(sides, repeats=options.repeats * (8 if rows == 1 else 1), warm_up=2)
            found[f"{rows} {kind}"] = medians(seconds)
            reach[f"K = 1 mixture against its student, batch {rows}, {kind}"] = ratio(
                seconds, over="mixture", under="student"
            )
            reach[f"router's share of a K = 1 forecast, batch {rows}, {kind}"] = ratio(
                seconds, over="routing", under="mixture"
            )
    answer("what routing costs", reach=reach, preset=options.preset, milliseconds=found)


if __name__ == "__main__":
    main()
