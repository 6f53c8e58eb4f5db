"""Is exact per-group attention faster than upstream's attention over the whole batch, at equal numbers?

Both forecast the same rows in turns, as groups of one and of ten. The model has the width of Chronos-2 and fewer
layers, which are all alike: 1,000 rows of the whole model would take upstream minutes.
"""

import argparse

import torch
from answer import answer, exact, full_size, in_turns, medians, ratio

from chronomoe.models.folded import computing_in
from chronomoe.models.precision import has_bfloat16_units

CONTEXT_LENGTH, NUM_PATCHES = 512, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    upstream = full_size(num_layers=options.layers, d_model=options.d_model)
    ours = exact(upstream)
    context = torch.randn(options.rows, CONTEXT_LENGTH, generator=torch.Generator().manual_seed(0))
    cases, reach = [], {}
    for size in options.group_sizes:
        inputs = {"group_ids": torch.arange(options.rows) // size, "num_output_patches": NUM_PATCHES}
        outputs = {}

        def run(name: str, model=ours, *, dtype=torch.float32, inputs=inputs, outputs=outputs) -> None:
            with torch.inference_mode(), computing_in(dtype):
                outputs[name] = model(context, **inputs)

        sides = {"upstream": lambda run=run: run("upstream", upstream), "exact": lambda run=run: run("exact")}
        if has_bfloat16_units(context.device):
            sides["exact bf16"] = lambda run=run: run("exact bf16", dtype=torch.bfloat16)
        seconds = in_turns(sides, repeats=options.repeats)
        difference = (outputs["upstream"].quantile_preds - outputs["exact"].quantile_preds).abs().max().item()
        cases.append({"rows": options.rows, "group_size": size, **medians(seconds), "max_difference": difference})
        for name in list(sides)[1:]:
            kind = "bf16" if "bf16" in name else "float32"
            groups = f"{options.rows // size} groups of {size}, exact against upstream, {kind}"
            reach[groups] = ratio(seconds, over="upstream", under=name)
    answer("exact group attention against upstream's", reach=reach, layers=options.layers, cases=cases)


if __name__ == "__main__":
    main()
