"""Is an MoE layer's dispatch never slower than a loop over experts, and the layer as fast as a dense block?

First, grouped dispatch and the plain loop that looks for each expert's tokens run on the same choices in turns, for few
and many experts and tokens. Then a whole layer and a dense feed-forward block of the same active compute forecast and
train on the same tokens in turns. A ratio is the median over turns, each taken within one turn, so that another load
on the machine meets both sides.
"""

import argparse
import statistics

import torch
from answer import Seconds, answer, in_turns
from chronos.chronos2.config import Chronos2CoreConfig
from chronos.chronos2.layers import FeedForward
from torch import Tensor

from chronomoe.models.sparse.config import MoEConfig
from chronomoe.models.sparse.dispatch import run_experts
from chronomoe.models.sparse.layer import Chronos2MoELayer


def summary(seconds: Seconds, *, over: str, under: str) -> dict[str, float]:
    """Return the median time of each side in ms, and how often ``under`` goes into ``over``."""
    ratios = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
    medians = {f"{name}_ms": round(1000 * statistics.median(times), 2) for name, times in seconds.items()}
    fastest = min(seconds[over]) / min(seconds[under])
    return medians | {"ratio": round(statistics.median(ratios), 3), "ratio_of_fastest": round(fastest, 3)}


def loop(tokens: Tensor, expert: Tensor, gate: Tensor, *, wi: Tensor, wo: Tensor) -> Tensor:
    """Look for the tokens of each expert in turn."""
    output = torch.zeros_like(tokens)
    for index in range(len(wi)):
        token, choice = torch.where(expert == index)
        if len(token):
            said = torch.relu(tokens[token] @ wi[index].T) @ wo[index].T
            output.index_add_(0, token, gate[token, choice, None] * said)
    return output


@torch.no_grad()
def dispatch_case(num_experts: int, num_tokens: int, top_k: int, options: argparse.Namespace) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(num_tokens, options.d_model, generator=generator)
    gate, expert = torch.randn(num_tokens, num_experts, generator=generator).softmax(dim=1).topk(top_k)
    weights = {
        "wi": torch.randn(num_experts, options.width, options.d_model, generator=generator) * options.d_model**-0.5,
        "wo": torch.randn(num_experts, options.d_model, options.width, generator=generator) * options.width**-0.5,
    }
    activate = torch.nn.ReLU(inplace=True)
    difference = run_experts(tokens, expert, gate, **weights, activate=activate) - loop(tokens, expert, gate, **weights)
    repeats = options.repeats * max(1, min(8, 4096 // num_tokens))
    seconds = in_turns(
        {
            "loop": lambda: loop(tokens, expert, gate, **weights),
            "grouped": lambda: run_experts(tokens, expert, gate, **weights, activate=activate),
        },
        repeats=repeats,
        warm_up=2,
    )
    case = {"num_experts": num_experts, "tokens": num_tokens, "top_k": top_k}
    return case | summary(seconds, over="loop", under="grouped") | {"max_difference": difference.abs().max().item()}


def layer_against_dense(options: argparse.Namespace) -> dict[str, object]:
    torch.manual_seed(0)
    d_model, d_ff = options.d_model, options.d_ff
    core = Chronos2CoreConfig(d_model=d_model, d_ff=d_ff, d_kv=64, num_heads=4, num_layers=1, dropout_rate=0.0)
    dense = FeedForward(core)
    num_experts, top_k = options.layer
    config = MoEConfig(num_experts=num_experts, top_k=top_k, expert_width=d_ff // top_k)
    layer = Chronos2MoELayer(d_model=d_model, d_ff=d_ff, config=config)
    for weight in (layer.wo, layer.router, dense.mlp.wi.weight, dense.mlp.wo.weight):
        torch.nn.init.normal_(weight, std=d_model**-0.5)
    tokens = torch.randn(options.layer_tokens // 64, 64, d_model)

    def forecast(block: torch.nn.Module) -> None:
        with torch.no_grad():
            block(tokens)

    def train(block: torch.nn.Module) -> None:
        block.zero_grad()
        block(tokens.requires_grad_()).sum().backward()

    result: dict[str, object] = {"num_experts": num_experts, "top_k": top_k, "tokens": options.layer_tokens}
    result |= {"expert_width": d_ff // top_k, "dense_d_ff": d_ff}
    for name, step in (("inference", forecast), ("training", train)):
        sides = {"layer": lambda step=step: step(layer), "dense": lambda step=step: step(dense)}
        seconds = in_turns(sides, repeats=2 * options.repeats, warm_up=2)
        result[name] = summary(seconds, over="layer", under="dense")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 8, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 2048, 8192, 32768])
    parser.add_argument("--top-k", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--width", type=int, default=256, help="hidden units of an expert, against the loop")
    parser.add_argument("--d-ff", type=int, default=1024, help="hidden units of the dense block, against the layer")
    parser.add_argument("--layer", type=int, nargs=2, default=[8, 2], metavar=("EXPERTS", "TOP_K"))
    parser.add_argument("--layer-tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    dense = layer_against_dense(options)
    cases = [
        dispatch_case(num_experts, num_tokens, top_k, options)
        for num_experts in options.experts
        for num_tokens in options.tokens
        for top_k in options.top_k
        if top_k <= num_experts
    ]
    answer(
        "grouped dispatch against a loop over experts; an MoE layer against a dense block",
        d_model=options.d_model,
        width=options.width,
        least_speedup_over_loop=min(case["ratio"] for case in cases),
        layer_against_dense=dense,
        cases=cases,
    )


if __name__ == "__main__":
    main()
