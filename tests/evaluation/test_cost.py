import pytest
import torch
from chronos.chronos2 import Chronos2Model
from chronos.chronos2.config import Chronos2CoreConfig
from torch import nn

from chronomoe.errors import InputError
from chronomoe.evaluation.cost import (
    compare,
    count_active_parameters,
    count_flops,
    count_parameters,
    peak_bytes,
    varied_context,
    weight_bytes,
)
from chronomoe.models.chronos2 import use_exact_group_attention

CONTEXT = varied_context(4, context_length=64)


def tiny(num_layers=2):
    torch.manual_seed(0)
    config = Chronos2CoreConfig(d_model=32, d_kv=16, d_ff=64, num_layers=num_layers, num_heads=2)
    config.chronos_config = {
        "context_length": 64,
        "input_patch_size": 16,
        "input_patch_stride": 16,
        "output_patch_size": 16,
        "max_output_patches": 4,
        "quantiles": [0.1, 0.5, 0.9],
        "use_reg_token": True,
        "use_arcsinh": True,
        "time_encoding_scale": 64,
    }
    return use_exact_group_attention(Chronos2Model(config))


def measure(model, *, repeats):
    return compare({"model": model}, CONTEXT, horizon=20, repeats=repeats)["model"]


class Sparse(nn.Module):
    """Uses the first of two models: what a mixture looks like from outside."""

    def __init__(self, *members):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.chronos_config = members[0].chronos_config
        self.seen = []

    def active_parameters(self):
        return count_parameters(self.members[0])

    def forward(self, **inputs):
        self.seen.append((len(inputs["context"]), inputs["num_output_patches"]))
        return self.members[0](**inputs)


def test_a_model_is_measured():
    cost = measure(tiny(), repeats=5)
    assert cost.parameters == count_parameters(tiny())
    assert 0 < cost.latency_p50_ms <= cost.latency_p95_ms
    assert cost.throughput > 0
    assert (cost.batch_size, cost.threads) == (4, torch.get_num_threads())
    assert cost.checkpoint_mb == pytest.approx(weight_bytes(tiny()) / 1e6)


def test_a_model_says_which_parameters_are_active():
    model = Sparse(tiny(), tiny())
    assert count_active_parameters(model) == count_parameters(tiny())
    assert count_parameters(model) == 2 * count_active_parameters(model)


def test_forecasts_are_asked_for_in_whole_patches():
    model = Sparse(tiny())
    measure(model, repeats=1)
    assert set(model.seen) == {(1, 2), (4, 2)}


def test_flops_of_independent_rows_add_up():
    model, context = tiny().eval(), varied_context(3, context_length=64)
    together, one = (count_flops(model, rows, horizon=16) for rows in (context, context[:1]))
    assert together == pytest.approx(3 * one, rel=0.01)  # the encoding of time is computed once


def test_flops_count_every_matrix_product():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.chronos_config = tiny().chronos_config
            self.weight = nn.Parameter(torch.ones(64, 8))

        def forward(self, context, **_):
            q = (context @ self.weight).view(1, 1, 4, 2)
            return nn.functional.scaled_dot_product_attention(q, q, q)

    products = 2 * 64 * 8 + 2 * 2 * 4 * 4 * 2  # projection; scores and mix of 4 tokens of width 2
    assert count_flops(Product(), torch.ones(1, 64), horizon=16) == products


def test_a_deeper_model_takes_longer():
    costs = compare({"deep": tiny(12), "shallow": tiny(1)}, CONTEXT, horizon=20, repeats=15)
    assert costs["deep"].latency_p50_ms > 2 * costs["shallow"].latency_p50_ms
    assert costs["deep"].throughput < costs["shallow"].throughput


def test_models_take_turns():
    order = []

    class Watched(Sparse):
        def forward(self, **inputs):
            order.append((self, len(inputs["context"])))
            return super().forward(**inputs)

    a, b = Watched(tiny()), Watched(tiny())
    compare({"a": a, "b": b}, CONTEXT, horizon=20, repeats=4)
    rounds = [model for model, rows in order[8:-2] if rows == 1]  # between the warm-up and memory
    assert rounds == [a, b, b, a, a, b, b, a]


def test_the_mode_of_a_model_is_left_as_it_was():
    training, evaluating = tiny().train(), tiny().eval()
    compare({"a": training, "b": evaluating}, CONTEXT, horizon=20, repeats=1)
    assert training.training
    assert not evaluating.training


def test_windows_differ_and_repeat():
    context = varied_context(5, context_length=32)
    assert torch.equal(context, varied_context(5, context_length=32))
    assert len(context.unique(dim=0)) == 5


def test_an_impossible_size_is_refused():
    with pytest.raises(InputError, match="horizon must be at least 1"):
        compare({"a": tiny()}, CONTEXT, horizon=0)
    with pytest.raises(InputError, match="repeats must be at least 1"):
        compare({"a": tiny()}, CONTEXT, horizon=20, repeats=0)
    with pytest.raises(InputError, match="batch_size must be at least 1"):
        compare({"a": tiny()}, CONTEXT[:0], horizon=20)


def test_memory_is_weights_and_the_largest_moment():
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.chronos_config = tiny().chronos_config
            self.weight = nn.Parameter(torch.ones(10))

        def forward(self, context, **_):
            large = context.repeat(100, 1)  # gone before the next one is made
            del large
            return (context.repeat(70, 1) + 1).sum()  # two at once

    row = CONTEXT.numel() * 4
    assert peak_bytes(Sums(), CONTEXT, horizon=16) == pytest.approx(40 + 140 * row, rel=0.01)
    assert peak_bytes(tiny().eval(), CONTEXT, horizon=16) > weight_bytes(tiny())
