"""Packed weights multiply as plain ones do, and where there is no packed form nothing changes."""

import pytest
import torch
from torch.nn.functional import linear

from chronomoe.evaluation.cost import count_flops, live_bytes
from chronomoe.models import packing
from chronomoe.models.chronos2 import use_exact_group_attention
from chronomoe.models.folded import computing_in

needs_packing = pytest.mark.skipif(not packing._packs(torch.float32), reason="oneDNN packs nothing on this processor")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 5), (1,), (7,), (2, 3), (4, 5, 6)])
def test_products_are_those_of_plain_weights(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(*size, generator=generator).to(dtype) for size in ((*shape, 40), (24, 40)))
    found, expected = packing.product(states, packing.pack(weight)), linear(states, weight)
    assert (found.shape, found.dtype) == (expected.shape, dtype)
    torch.testing.assert_close(found, expected, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)


def test_weights_and_states_need_not_be_contiguous():
    weight, states = torch.randn(40, 24).mT, torch.randn(3, 9, 40)[:, -4:]
    torch.testing.assert_close(packing.product(states, packing.pack(weight)), linear(states, weight))


@needs_packing
def test_a_packed_weight_is_a_copy():
    weight = torch.randn(8, 8)
    packed = packing.pack(weight)
    before = packing.product(torch.eye(8), packed)
    weight.zero_()
    assert torch.equal(packing.product(torch.eye(8), packed), before)


@pytest.mark.parametrize(("device", "dtype"), [("meta", torch.float32), ("cpu", torch.float64)])
def test_other_devices_and_types_keep_plain_weights(device, dtype):
    weight = torch.zeros(4, 3, device=device, dtype=dtype)
    assert packing.pack(weight) is weight


@needs_packing
def test_memory_of_packed_weights_is_counted_while_they_live():
    weight = torch.randn(64, 64)
    kept = []
    assert live_bytes(lambda: kept.append(packing.pack(weight))) == weight.nbytes
    assert live_bytes(lambda: [packing.pack(weight).shape for _ in range(3)]) == weight.nbytes


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_changes_no_forecast_and_no_count_of_operations(make_teacher, make_context, monkeypatch, dtype):
    packed, plain = (use_exact_group_attention(make_teacher()) for _ in range(2))
    context = make_context(3, 90)

    def ask(model):
        with torch.inference_mode(), computing_in(dtype):
            found = model(context, group_ids=torch.tensor([0, 0, 1]), num_output_patches=2).quantile_preds
            return found, count_flops(model, context, horizon=20)

    found, operations = ask(packed)
    monkeypatch.setattr(packing, "_packs", lambda dtype: False)
    expected, plain_operations = ask(plain)
    assert operations == plain_operations
    torch.testing.assert_close(found, expected, rtol=1e-4 if dtype == torch.float32 else 5e-2, atol=1e-4)
