"""Is one batched kernel over experts of equal shape faster than a loop over the experts of a mixture?

Rows choose among experts at random, one each. The loop runs each expert once on its own rows, as ``DistilledMoE`` does.
The batched way sorts rows by expert, pads every expert's share to the largest and takes the products of a block
(queries, keys and values; output; feed-forward) of all experts as one batched product. Attention is left out of both:
it has no weights.
"""

import argparse
from collections.abc import Callable

import torch
from answer import answer, in_turns, medians, ratio
from torch import Tensor

from chronomoe.models.precision import has_bfloat16_units


class Products:
    """The weights of one encoder block of each expert, and both ways to apply them to rows of tokens."""

    def __init__(self, num_experts: int, *, d_model: int, d_ff: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = {"qkv": (3 * d_model, d_model), "o": (d_model, d_model), "wi": (d_ff, d_model), "wo": (d_model, d_ff)}
        self.weight = {
            name: (torch.randn(num_experts, *shape, generator=generator) * shape[1] ** -0.5).to(dtype)
            for name, shape in shapes.items()
        }

    def apply(self, states: Tensor, product: Callable[[Tensor, str], Tensor]) -> Tensor:
        """Apply a block, given what multiplies states by the weight of a name."""
        width = states.shape[-1]
        mixed = product(states, "qkv")[..., :width]
        states = states + product(mixed, "o")
        return states + product(product(states, "wi").relu_(), "wo")

    def loop(self, tokens: Tensor, expert: Tensor) -> Tensor:
        """Run each expert on its rows."""
        out = torch.empty_like(tokens)
        for index in expert.unique().tolist():
            rows = torch.where(expert == index)[0]
            one = {name: weight[index] for name, weight in self.weight.items()}
            out[rows] = self.apply(tokens[rows], lambda x, name, one=one: torch.nn.functional.linear(x, one[name]))
        return out

    def batched(self, tokens: Tensor, expert: Tensor) -> Tensor:
        """Run all experts at once, each on its rows and padding."""
        rows, length, width = tokens.shape
        num_experts = len(self.weight["qkv"])
        order = expert.argsort(stable=True)
        count = expert.bincount(minlength=num_experts)
        place = torch.arange(rows) - (count.cumsum(0) - count)[expert[order]]
        most = int(count.max())
        share = tokens.new_zeros(num_experts, most, length, width)
        share[expert[order], place] = tokens[order]
        states = share.view(num_experts, most * length, width)
        states = self.apply(states, lambda x, name: torch.bmm(x, self.weight[name].transpose(1, 2)))
        out = torch.empty_like(tokens)
        out[order] = states.view(num_experts, most, length, width)[expert[order], place]
        return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--tokens", type=int, default=38)
    parser.add_argument("--d-model", type=int, default=384)
    parser.add_argument("--d-ff", type=int, default=1536)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    cases = []
    types = {"float32": torch.float32}
    if has_bfloat16_units(torch.device("cpu")):
        types["bf16"] = torch.bfloat16
    for kind, dtype in types.items():
        for num_experts in options.experts:
            products = Products(num_experts, d_model=options.d_model, d_ff=options.d_ff, dtype=dtype)
            for rows in options.rows:
                generator = torch.Generator().manual_seed(1)
                tokens = torch.randn(rows, options.tokens, options.d_model, generator=generator).to(dtype)
                expert = torch.randint(num_experts, (rows,), generator=generator)
                both = {
                    "loop": lambda p=products, t=tokens, e=expert: p.loop(t, e),
                    "batched": lambda p=products, t=tokens, e=expert: p.batched(t, e),
                }
                difference = (both["loop"]().float() - both["batched"]().float()).abs().max().item()
                seconds = in_turns(both, repeats=options.repeats)
                case = {"dtype": kind, "num_experts": num_experts, "rows": rows, **medians(seconds)}
                gain = ratio(seconds, over="loop", under="batched")
                cases.append(case | {"loop_over_batched": gain, "max_difference": round(difference, 6)})
    answer("one batched kernel over experts against the loop", cases=cases)


if __name__ == "__main__":
    main()
