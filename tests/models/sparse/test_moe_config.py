import dataclasses
import json

import pytest

from chronomoe.errors import InputError
from chronomoe.models.configuration import parse
from chronomoe.models.sparse.config import MoEConfig

D_FF = 96


def test_the_settings_of_a_layer_are_valid_without_any():
    config = MoEConfig()
    assert 1 <= config.top_k <= config.num_experts
    assert config.width(D_FF) == D_FF
    assert config.capacity(1000) is None


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_slices_and_the_shared_expert_make_up_the_dense_block(top_k):
    config = MoEConfig(num_experts=4 * top_k, top_k=top_k, granularity=top_k, shared_width=32)
    assert config.shared_width + config.granularity * config.width(D_FF) == D_FF


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_even_gates_times_the_scale_add_up_to_whole_copies(top_k):
    early = MoEConfig(num_experts=8, top_k=top_k)
    assert top_k * (1 / 8) * early.scale == pytest.approx(1)
    late = dataclasses.replace(early, gating="top_k_then_softmax")
    assert top_k * (1 / top_k) * late.scale == pytest.approx(1)


def test_scale_and_capacity_by_hand():
    config = MoEConfig(num_experts=8, top_k=4, granularity=2, capacity_factor=1.25)
    assert config.scale == 4.0
    assert dataclasses.replace(config, gating="top_k_then_softmax").scale == 2.0
    assert config.capacity(10) == 7  # 1.25 * 10 * 4 / 8 = 6.25
    assert config.capacity(0) == 0


def test_settings_survive_json_and_unknown_ones_are_refused():
    config = MoEConfig(num_experts=4, layers=(0, 2), capacity_factor=1.5)
    assert parse(json.loads(json.dumps(dataclasses.asdict(config))), MoEConfig, source="x") == config
    with pytest.raises(InputError, match=r"x: unknown key 'topk' at the top\. Available: .* Did you mean 'top_k'"):
        parse({"topk": 2}, MoEConfig, source="x")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"num_experts": 2, "top_k": 3}, "top_k must be from 1 to 2, the number of experts, got 3"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"granularity": 0}, "granularity must be at least 1, got 0"),
        ({"num_experts": 9, "granularity": 2}, "num_experts must be a multiple of granularity 2, .* got 9"),
        ({"top_k": 1, "granularity": 2}, "top_k must be a multiple of granularity 2, .* got 1"),
        ({"expert_width": 0}, "expert_width must be at least 1, got 0"),
        ({"capacity_factor": 0.0}, r"capacity_factor must be above 0, got 0\.0"),
        ({"gating": "sigmoid"}, "gating must be 'softmax_then_top_k' or 'top_k_then_softmax', got 'sigmoid'"),
        ({"balance": "l1"}, "balance must be 'l2', 'switch' or 'none', got 'l1'"),
        ({"shared_width": -1}, "shared_width must be at least 0, got -1"),
        ({"z_weight": -0.1}, r"z_weight must be at least 0, got -0\.1"),
        ({"bias_rate": float("nan")}, "bias_rate must be a finite number, got nan"),
        ({"noise": -1.0}, "noise must be at least 0, got -1"),
        ({"reinit": 1.5}, r"reinit must be at most 1, got 1\.5"),
        ({"layers": ()}, r"layers must name at least 1, got \(\)"),
        ({"layers": (0, 0)}, r"layers: each block must be named once, got \(0, 0\)"),
        ({"layers": (-1,)}, r"layers\[0\] must be at least 0, got -1"),
    ],
)
def test_impossible_settings_are_refused_with_what_is_accepted(unchecked, settings, message):
    with pytest.raises(InputError, match=message):
        MoEConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shared_width": D_FF}, "shared_width must be below 96, the hidden units of the dense block, got 96"),
        (
            {"granularity": 2, "shared_width": 33},
            "granularity must divide the 63 hidden units that the shared expert leaves of 96, got 2",
        ),
    ],
)
def test_widths_that_do_not_divide_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        MoEConfig(**settings).width(D_FF)
