"""How much faster than upstream's full-size Chronos-2 are K = 2 mixtures of our preset students of it?

The teacher is randomly initialised at the size of amazon/chronos-2 (119.5M parameters): time does not depend on the
weights. Upstream's code, our exact forward pass of the same model and a mixture of each preset forecast the same batch
in turns, in one process; medians and ratios of one run.
"""

import argparse
import json

import torch
from chronos.chronos2 import Chronos2Model
from chronos.chronos2.config import Chronos2CoreConfig
from transformers import PreTrainedModel

from chronomoe.evaluation.cost import compare, count_flops, varied_context
from chronomoe.models.chronos2 import use_exact_group_attention
from chronomoe.models.mixture.mixture import MixtureConfig, build_mixture
from chronomoe.models.mixture.router import RoutingConfig
from chronomoe.models.student import StudentConfig, create_student_model
from chronomoe.pretraining.teacher import QUANTILE_LEVELS

FULL_SIZE = Chronos2CoreConfig(
    d_model=768,
    d_kv=64,
    d_ff=3072,
    num_layers=12,
    num_heads=12,
    dropout_rate=0.0,
    chronos_config={
        "context_length": 8192,
        "input_patch_size": 16,
        "input_patch_stride": 16,
        "output_patch_size": 16,
        "max_output_patches": 64,
        "quantiles": list(QUANTILE_LEVELS),
        "use_reg_token": True,
        "use_arcsinh": True,
    },
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context-length", type=int, default=512)
    parser.add_argument("--horizon", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-experts", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=1)  # what most series use
    parser.add_argument("--presets", nargs="+", default=["slim", "small"])
    parser.add_argument("--repeats", type=int, default=8)
    options = parser.parse_args()

    torch.manual_seed(0)
    upstream = Chronos2Model(FULL_SIZE).eval()
    exact = Chronos2Model(FULL_SIZE).eval()
    exact.load_state_dict(upstream.state_dict())
    models: dict[str, PreTrainedModel] = {"upstream": upstream, "exact": use_exact_group_attention(exact)}
    students = {}
    for preset in options.presets:
        size = StudentConfig.preset(preset, upstream)
        experts = {f"expert-{index}": create_student_model(upstream, size) for index in range(options.num_experts)}
        students[preset] = next(iter(experts.values())).num_parameters()
        models[preset] = build_mixture(experts, MixtureConfig(routing=RoutingConfig(top_k=options.top_k))).eval()
    context = varied_context(options.batch_size, context_length=options.context_length)
    costs = compare(models, context, horizon=options.horizon, repeats=options.repeats)
    flops = {name: count_flops(model, context[:1], horizon=options.horizon) for name, model in models.items()}
    base = costs["upstream"]
    answer = {
        "question": "speed against upstream's full-size Chronos-2",
        **vars(options),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "parameters": {name: cost.parameters for name, cost in costs.items()},
        "student_parameters": students,
        "throughput": {name: round(cost.throughput, 2) for name, cost in costs.items()},
        "latency_p50_ms": {name: round(cost.latency_p50_ms, 1) for name, cost in costs.items()},
        "throughput_ratio": {name: round(cost.throughput / base.throughput, 2) for name, cost in costs.items()},
        "latency_ratio": {name: round(base.latency_p50_ms / cost.latency_p50_ms, 2) for name, cost in costs.items()},
        "flop_ratio": {name: round(flops["upstream"] / count, 2) for name, count in flops.items()},
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
