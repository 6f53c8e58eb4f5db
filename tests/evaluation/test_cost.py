import pytest
import torch
from chronos.chronos2 import Chronos2Model
from chronos.chronos2.config import Chronos2CoreConfig
from torch import nn

from chronomoe.errors import InputError
from chronomoe.evaluation.cost import (
    checkpoint_bytes,
    compare,
    count_flops,
    count_parameters,
    measure,
    peak_memory_bytes,
    varied_context,
)
from chronomoe.models.chronos2 import use_exact_group_attention

SIZES = {"context_length": 64, "horizon": 20, "batch_size": 4}


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
    cost = measure(tiny(), **SIZES, repeats=5)
    assert cost.parameters == cost.active_parameters == count_parameters(tiny())
    assert 0 < cost.latency_p50_ms <= cost.latency_p95_ms
    assert cost.throughput > 0
    assert (cost.batch_size, cost.threads) == (4, torch.get_num_threads())


def test_a_model_says_which_parameters_are_active():
    model = Sparse(tiny(), tiny())
    cost = measure(model, **SIZES, repeats=1)
    assert cost.active_parameters == count_parameters(tiny())
    assert cost.parameters == 2 * cost.active_parameters


def test_forecasts_are_asked_for_in_whole_patches():
    model = Sparse(tiny())
    measure(model, **SIZES, repeats=1)
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
    costs = compare({"deep": tiny(12), "shallow": tiny(1)}, **SIZES, repeats=15)
    assert costs["deep"].latency_p50_ms > 2 * costs["shallow"].latency_p50_ms
    assert costs["deep"].flops > 2 * costs["shallow"].flops
    assert costs["deep"].throughput < costs["shallow"].throughput


def test_models_take_turns():
    order = []

    class Watched(Sparse):
        def forward(self, **inputs):
            order.append((self, len(inputs["context"])))
            return super().forward(**inputs)

    a, b = Watched(tiny()), Watched(tiny())
    compare({"a": a, "b": b}, **SIZES, repeats=4)
    rounds = [model for model, rows in order[8:-2] if rows == 1]  # after the warm-up, before FLOPs
    assert rounds == [a, b, b, a, a, b, b, a]


def test_the_mode_of_a_model_is_left_as_it_was():
    training, evaluating = tiny().train(), tiny().eval()
    compare({"a": training, "b": evaluating}, **SIZES, repeats=1)
    assert training.training
    assert not evaluating.training


def test_windows_differ_and_repeat():
    context = varied_context(5, context_length=32)
    assert torch.equal(context, varied_context(5, context_length=32))
    assert len(context.unique(dim=0)) == 5


@pytest.mark.parametrize("wrong", [{"horizon": 0}, {"batch_size": 0}, {"repeats": 0}, {"context_length": 0}])
def test_an_impossible_size_is_refused(wrong):
    with pytest.raises(InputError, match=f"{next(iter(wrong))} must be at least 1"):
        measure(tiny(), **{**SIZES, "repeats": 1, **wrong})


def test_a_checkpoint_weighs_what_its_files_weigh(tmp_path):
    (tmp_path / "experts").mkdir()
    (tmp_path / "config.json").write_bytes(b"x" * 10)
    (tmp_path / "experts" / "model.safetensors").write_bytes(b"x" * 100)
    assert checkpoint_bytes(tmp_path) == 110
    with pytest.raises(InputError, match="is a folder"):
        checkpoint_bytes(tmp_path / "missing")


def test_memory_is_that_of_a_fresh_process(tmp_path):
    tiny().save_pretrained(tmp_path)
    ballast = bytearray(b"1") * 900_000_000  # must not count
    peak = peak_memory_bytes(tmp_path, **SIZES)
    assert 50e6 < peak < len(ballast)
