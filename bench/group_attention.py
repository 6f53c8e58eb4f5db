"""Is exact per-group attention faster than upstream's attention over the whole batch, at equal numbers?

Both forecast the same batch in turns, for univariate batches of growing size and for groups of four rows.
"""

import argparse
import json
import statistics
import time

import torch
from chronos.chronos2 import Chronos2Model
from chronos.chronos2.config import Chronos2CoreConfig

from chronomoe.models.chronos2 import use_exact_group_attention

CONTEXT_LENGTH, NUM_PATCHES = 512, 6
CONFIG = Chronos2CoreConfig(
    d_model=256,
    d_kv=64,
    d_ff=1024,
    num_layers=4,
    num_heads=4,
    dropout_rate=0.0,
    chronos_config={
        "context_length": CONTEXT_LENGTH,
        "input_patch_size": 16,
        "input_patch_stride": 16,
        "output_patch_size": 16,
        "max_output_patches": NUM_PATCHES,
        "quantiles": [0.1, 0.5, 0.9],
        "use_reg_token": True,
        "use_arcsinh": True,
    },
)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    upstream = Chronos2Model(CONFIG).eval()
    exact = Chronos2Model(CONFIG).eval()
    exact.load_state_dict(upstream.state_dict())
    use_exact_group_attention(exact)
    cases = []
    for rows in options.rows:
        for size in (1, 4):
            context, group_ids = torch.randn(rows, CONTEXT_LENGTH), torch.arange(rows) // size
            seconds: dict[str, list[float]] = {"upstream": [], "exact": []}
            outputs = {}
            for _ in range(options.repeats + 1):
                for name, model in (("upstream", upstream), ("exact", exact)):
                    begin = time.perf_counter()
                    outputs[name] = model(context, group_ids=group_ids, num_output_patches=NUM_PATCHES).quantile_preds
                    seconds[name].append(time.perf_counter() - begin)
            median = {name: statistics.median(times[1:]) for name, times in seconds.items()}
            cases.append(
                {
                    "rows": rows,
                    "group_size": size,
                    "upstream_ms": round(1000 * median["upstream"], 1),
                    "exact_ms": round(1000 * median["exact"], 1),
                    "speedup": round(median["upstream"] / median["exact"], 2),
                    "max_difference": (outputs["upstream"] - outputs["exact"]).abs().max().item(),
                }
            )
    print(
        json.dumps({"question": "exact against upstream forward", "threads": torch.get_num_threads(), "cases": cases})
    )


if __name__ == "__main__":
    main()
