import pytest
import torch

from chronomoe.errors import InputError
from chronomoe.models.sparse.config import MoEConfig
from chronomoe.models.sparse.init import dense_weights, draw_router, fresh_weights

D_MODEL, D_FF = 16, 96
SETTINGS = [
    {},
    {"num_experts": 1, "top_k": 1},
    {"granularity": 2},
    {"granularity": 8, "top_k": 8},
    {"shared_width": 32},
    {"shared_width": 32, "granularity": 2},
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def block():
    """The weights of a dense block."""
    generator = seeded(7)
    return torch.randn(D_FF, D_MODEL, generator=generator), torch.randn(D_MODEL, D_FF, generator=generator) - 0.3


def feed(tokens, wi, wo):
    return torch.relu(tokens @ wi.T) @ wo.T


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_experts_of_a_copy_and_the_shared_one_add_up_to_the_dense_block(block, settings):
    config = MoEConfig(**settings)
    weights, tokens = dense_weights(*block, config, generator=seeded()), torch.randn(5, D_MODEL)
    shared = feed(tokens, weights["shared_wi"], weights["shared_wo"]) if config.shared_width else 0
    said = torch.stack([feed(tokens, *pair) for pair in zip(weights["wi"], weights["wo"], strict=True)])
    for copy in said.unflatten(0, (-1, config.granularity)):
        torch.testing.assert_close(shared + copy.sum(dim=0), feed(tokens, *block), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("granularity", [1, 2, 4])
def test_the_slices_of_a_copy_share_a_router_row_and_copies_do_not(granularity):
    config = MoEConfig(num_experts=8, top_k=4, granularity=granularity)
    router = draw_router(config, D_MODEL, generator=seeded())
    copies = router.unflatten(0, (-1, granularity))
    assert torch.equal(copies, copies[:, :1].expand_as(copies))
    assert len(router.unique(dim=0)) == 8 // granularity


def test_a_drawn_router_is_even_but_for_rounding_and_ranks_experts():
    config = MoEConfig(num_experts=7)
    score = 10 * torch.randn(100, D_MODEL) @ draw_router(config, D_MODEL, generator=seeded()).T
    torch.testing.assert_close(score.softmax(dim=1), torch.full((100, 7), 1 / 7), rtol=1e-6, atol=0)
    assert score.argmax(dim=1).bincount(minlength=7).min() > 0


@pytest.mark.parametrize("change", [{"noise": 0.1}, {"reinit": 0.25}])
def test_what_tells_copies_apart_leaves_the_shared_expert(block, change):
    config = MoEConfig(shared_width=32, granularity=2, **change)
    weights = dense_weights(*block, config, generator=seeded())
    assert torch.equal(weights["shared_wi"], block[0][:32])
    assert torch.equal(weights["shared_wo"], block[1][:, :32])
    first, second = weights["wi"].unflatten(0, (-1, 2))[:2]
    assert not torch.equal(first, second)


def test_noise_is_relative_to_the_spread_of_the_weights(block):
    config = MoEConfig(num_experts=64, noise=0.2)
    wi = dense_weights(block[0] * 100, block[1], config, generator=seeded())["wi"]
    added = wi - 100 * block[0]
    assert added.std().item() == pytest.approx(20 * block[0].std().item(), rel=0.05)


def test_fresh_units_are_a_share_of_each_expert_with_the_mean_and_spread_of_the_dense_weights(block):
    config = MoEConfig(num_experts=64, reinit=0.25)
    weights = dense_weights(*block, config, generator=seeded())
    fresh = (weights["wi"] != block[0]).any(dim=2)
    assert (fresh.sum(dim=1) == D_FF // 4).all()
    assert torch.equal((weights["wo"] != block[1]).any(dim=1), fresh)
    drawn = weights["wo"].transpose(1, 2)[fresh]
    assert drawn.mean().item() == pytest.approx(block[1].mean().item(), abs=0.02)
    assert drawn.std().item() == pytest.approx(block[1].std().item(), rel=0.05)


def test_the_same_seed_draws_the_same_bits(block):
    config = MoEConfig(noise=0.1, reinit=0.5)
    one, same, other = (dense_weights(*block, config, generator=seeded(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert not torch.equal(one["wi"], other["wi"])


def test_half_precision_weights_are_cut_in_float32_and_the_block_stays(block):
    wi, wo = (weight.bfloat16() for weight in block)
    weights = dense_weights(wi, wo, MoEConfig(noise=0.1), generator=seeded())
    assert all(value.dtype == torch.float32 for value in weights.values())
    assert torch.equal(wi, block[0].bfloat16())


@pytest.mark.parametrize("shared_width", [0, 8])
def test_fresh_experts_read_but_do_not_write(shared_width):
    config = MoEConfig(num_experts=3, shared_width=shared_width, expert_width=24)
    weights = fresh_weights(config, D_MODEL, D_FF, generator=seeded())
    assert weights["wi"].shape == (3, 24, D_MODEL)
    assert weights["wi"].std() == pytest.approx(D_MODEL**-0.5, rel=0.1)
    assert all(not value.any() for name, value in weights.items() if name.endswith("wo"))
    assert ("shared_wo" in weights) == bool(shared_width)


def test_a_width_that_is_no_slice_of_the_block_is_refused(block):
    config = MoEConfig(granularity=2, expert_width=40)
    with pytest.raises(InputError, match="expert_width must be 48 for granularity 2 of a dense block with 96 hidden"):
        dense_weights(*block, config, generator=seeded())
    allowed = MoEConfig(granularity=2, expert_width=48)
    assert dense_weights(*block, allowed, generator=seeded())["wi"].shape == (8, 48, D_MODEL)
