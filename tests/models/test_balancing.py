import math

import pytest
import torch

from chronomoe.errors import InputError
from chronomoe.models.balancing import LossFreeBias, expert_load, load_balancing_loss, z_loss

NUM_EXPERTS = 4


@pytest.fixture
def prob():
    return torch.randn(50, NUM_EXPERTS, generator=torch.Generator().manual_seed(0)).softmax(dim=1)


def test_loads_sum_to_one():
    expert = torch.randint(NUM_EXPERTS, (30, 2), generator=torch.Generator().manual_seed(0))
    load = expert_load(expert, num_experts=NUM_EXPERTS)
    assert load.shape == (NUM_EXPERTS,)
    assert load.sum() == pytest.approx(1)


def test_load_by_hand():
    expert = torch.tensor([[0, 1], [0, 2], [0, 1]])
    assert expert_load(expert, num_experts=4).tolist() == pytest.approx([3 / 6, 2 / 6, 1 / 6, 0])


def test_unused_choices_do_not_count():
    expert, used = torch.tensor([[0, 1], [0, 2]]), torch.tensor([[True, False], [True, True]])
    assert expert_load(expert, num_experts=3, used=used).tolist() == pytest.approx([2 / 3, 0, 1 / 3])
    assert expert_load(expert, num_experts=3, used=torch.zeros_like(used)).tolist() == [0, 0, 0]


def test_an_even_router_has_the_least_loss(prob):
    even = torch.full((8, NUM_EXPERTS), 1 / NUM_EXPERTS)
    load = torch.full((NUM_EXPERTS,), 1 / NUM_EXPERTS)
    assert load_balancing_loss(even, load, kind="l2") == pytest.approx(0, abs=1e-7)
    assert load_balancing_loss(even, load, kind="switch") == pytest.approx(1)
    assert load_balancing_loss(prob, load, kind="l2") > 0


def test_a_collapsed_router_has_the_most_loss(prob):
    collapsed = torch.eye(NUM_EXPERTS)[:1].expand(8, -1)
    load = collapsed[0]
    assert load_balancing_loss(collapsed, load, kind="l2") == pytest.approx(NUM_EXPERTS - 1)
    assert load_balancing_loss(collapsed, load, kind="switch") == pytest.approx(NUM_EXPERTS)


def test_losses_by_hand():
    prob, load = torch.tensor([[0.7, 0.3], [0.5, 0.5]]), torch.tensor([0.75, 0.25])
    assert load_balancing_loss(prob, load, kind="l2") == pytest.approx(2 * (0.1**2 + 0.1**2))
    assert load_balancing_loss(prob, load, kind="switch") == pytest.approx(2 * (0.75 * 0.6 + 0.25 * 0.4))


@pytest.mark.parametrize("kind", ["l2", "switch"])
def test_descent_on_the_loss_evens_the_router(kind):
    score = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0]], requires_grad=True)
    load = expert_load(score.argmax(dim=1, keepdim=True), num_experts=3).requires_grad_()
    load_balancing_loss(score.softmax(dim=1), load, kind=kind).backward()
    assert (score.grad[:, 0] > 0).all()  # the crowded expert's score falls
    assert load.grad is None


def test_z_loss_by_hand():
    score = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    assert z_loss(score) == pytest.approx((math.log(2) ** 2 + math.log(4) ** 2) / 2)


def test_the_bias_rises_for_idle_and_falls_for_crowded_experts():
    balance = LossFreeBias(4, rate=0.5)
    balance.update(torch.tensor([0.5, 0.25, 0.25, 0.0]))
    assert balance.bias.tolist() == [-0.5, 0, 0, 0.5]
    balance.update(torch.tensor([0.5, 0.5, 0.0, 0.0]))
    assert balance.bias.tolist() == [-1.0, -0.5, 0.5, 1.0]


@pytest.mark.parametrize("num_experts", [2, 3, 5, 7, 10])
def test_an_even_load_leaves_the_bias(num_experts):
    balance = LossFreeBias(num_experts)
    balance.update(expert_load(torch.arange(num_experts)[:, None].expand(-1, 3), num_experts=num_experts))
    assert balance.bias.abs().max() == 0


def test_the_bias_is_saved_and_carries_no_gradient():
    balance = LossFreeBias(3)
    assert list(balance.state_dict()) == ["bias"]
    assert list(balance.parameters()) == []


def test_the_bias_evens_a_skewed_router():
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(400, 4, generator=generator) + torch.tensor([2.0, 0.0, 0.0, -2.0])
    balance = LossFreeBias(4, rate=0.05)
    for _ in range(200):
        balance.update(expert_load((score + balance.bias).topk(2).indices, num_experts=4))
    load = expert_load((score + balance.bias).topk(2).indices, num_experts=4)
    torch.testing.assert_close(load, torch.full((4,), 0.25), rtol=0, atol=0.03)


def test_an_unknown_kind_is_refused(unchecked, prob):
    with pytest.raises(InputError, match="the balance loss must be 'l2' or 'switch', got 'kl'"):
        load_balancing_loss(prob, prob[0], kind="kl")
