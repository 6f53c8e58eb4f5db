"""How much of what the processor can multiply does a forecast of the full-size model use?

Operations of the exact forward pass over its time, against those of one large matrix product in the same type.
"""

import argparse

import torch
from answer import answer, exact, forecast, full_size, in_turns, medians

from chronomoe.evaluation.cost import count_flops, varied_context
from chronomoe.models.packing import pack, product
from chronomoe.models.precision import has_bfloat16_units


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=12, help="12 is the full size")
    parser.add_argument("--product", type=int, default=4096, help="rows of the large product")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model = exact(full_size(num_layers=options.layers))
    context = varied_context(options.batch_size, context_length=512)
    flops = count_flops(model, context[:1], horizon=96) * options.batch_size
    types = {"float32": torch.float32}
    if has_bfloat16_units(model.device):
        types["bf16"] = torch.bfloat16
    reach, rates = {}, {}
    for kind, dtype in types.items():
        a, packed = torch.randn(options.product, 3072, dtype=dtype), pack(torch.randn(768, 3072, dtype=dtype))
        sides = {
            "forecast": forecast(model, context, horizon=96, dtype=dtype),
            "product": lambda a=a, packed=packed: product(a, packed),
        }
        times = medians(in_turns(sides, repeats=options.repeats))
        rate = {"forecast": flops / times["forecast"], "product": 2 * options.product * 3072 * 768 / times["product"]}
        rates[kind] = {name: round(value / 1e6, 1) for name, value in rate.items()}
        reach[f"share of the matrix-product peak, batch {options.batch_size}, {kind}"] = round(
            rate["forecast"] / rate["product"], 3
        )
    answer("share of the matrix-product peak", reach=reach, gigaflops=rates)


if __name__ == "__main__":
    main()
