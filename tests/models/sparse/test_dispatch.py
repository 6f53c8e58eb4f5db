import pytest
import torch

from chronomoe.models.sparse import dispatch as moe_dispatch
from chronomoe.models.sparse.dispatch import dispatch_tokens, run_experts, within_capacity

NUM_EXPERTS, WIDTH, D_MODEL = 5, 12, 8


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    return {
        "wi": torch.randn(NUM_EXPERTS, WIDTH, D_MODEL, generator=generator),
        "wo": torch.randn(NUM_EXPERTS, D_MODEL, WIDTH, generator=generator),
    }


def choices(num_tokens, top_k, *, seed=0):
    """Draw tokens, their experts and the gates of these."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(num_tokens, D_MODEL, generator=generator)
    prob = torch.randn(num_tokens, NUM_EXPERTS, generator=generator).softmax(dim=1)
    gate, expert = prob.topk(top_k, dim=1)
    return tokens, expert, gate


def loop(tokens, expert, gate, *, wi, wo, activate=torch.relu):
    """One token and one choice at a time."""
    rows = [torch.zeros_like(token) for token in tokens]
    for row, token in enumerate(tokens):
        for index, weight in zip(expert[row].tolist(), gate[row], strict=True):
            if index < len(wi):
                rows[row] = rows[row] + weight * (wo[index] @ activate(wi[index] @ token))
    return torch.stack(rows) if rows else torch.zeros_like(tokens)


def grouped(*choice, **weights):
    return run_experts(*choice, **weights, activate=torch.relu)


@pytest.fixture(params=[0, NUM_EXPERTS], ids=["sorted", "searched"])
def way(request, monkeypatch):
    """Sort all choices, or look for each expert's where experts are few; the latter only without gradients."""
    monkeypatch.setattr(moe_dispatch, "FEW_EXPERTS", request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 40])
@pytest.mark.parametrize("top_k", [1, 2, NUM_EXPERTS])
def test_grouped_dispatch_equals_the_plain_loop(weights, top_k, num_tokens, gradients):
    choice = choices(num_tokens, top_k)
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(grouped(*choice, **weights), loop(*choice, **weights), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("gradients", [False, True])
def test_all_tokens_may_go_to_one_expert(weights, gradients):
    tokens, expert, gate = choices(20, 1)
    expert.fill_(3)
    with torch.set_grad_enabled(gradients):
        found = grouped(tokens, expert, gate, **weights)
    alone = gate * (torch.relu(tokens @ weights["wi"][3].T) @ weights["wo"][3].T)
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, NUM_EXPERTS])
def test_tokens_sent_out_in_parts_come_back_the_same(weights, top_k, monkeypatch):
    choice = choices(40, top_k)
    choice[1][:9] = NUM_EXPERTS  # nothing is left to send of a whole part
    at_once = grouped(*choice, **weights)
    monkeypatch.setattr(moe_dispatch, "SLOTS_AT_ONCE", 7 * top_k)
    monkeypatch.setattr(moe_dispatch, "FEW_EXPERTS", 0)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(grouped(*choice, **weights), at_once, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("gradients", [False, True])
def test_a_dropped_choice_counts_for_nothing_whatever_its_gate(weights, gradients):
    tokens, expert, gate = choices(30, 2)
    expert[::3, 1] = NUM_EXPERTS
    expert[4] = NUM_EXPERTS
    with torch.set_grad_enabled(gradients):
        found = grouped(tokens, expert, gate, **weights)
        torch.testing.assert_close(found, loop(tokens, expert, gate, **weights), rtol=1e-5, atol=1e-5)
        assert not found[4].any()
        assert not grouped(tokens, torch.full_like(expert, NUM_EXPERTS), gate, **weights).any()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("gradients", [False, True])
def test_bf16_equals_the_loop_in_float32_but_for_rounding(weights, gradients):
    tokens, expert, gate = choices(40, 2)
    narrow = {name: value.bfloat16() for name, value in weights.items()}
    with torch.set_grad_enabled(gradients):
        found = grouped(tokens.bfloat16(), expert, gate, **narrow)
    assert found.dtype == torch.bfloat16
    expected = loop(tokens.bfloat16().float(), expert, gate, **{name: value.float() for name, value in narrow.items()})
    assert (found.float() - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("top_k", [1, 2, NUM_EXPERTS])
def test_gradients_are_those_of_the_plain_loop(weights, top_k):
    tokens, expert, gate = choices(12, top_k)
    leaves = [value.double().requires_grad_() for value in (tokens, gate, weights["wi"], weights["wo"])]

    def outcome(run):
        tokens, gate, wi, wo = leaves
        output = run(tokens, expert, gate, wi=wi, wo=wo, activate=torch.tanh)
        return output, torch.autograd.grad(output.square().sum(), leaves)

    (output, gradients), (expected, slow) = outcome(run_experts), outcome(loop)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients, slow)


def test_gradients_are_those_of_finite_differences(weights):
    tokens, expert, gate = choices(4, 2)
    expert[1, 1] = NUM_EXPERTS
    leaves = [value.double().requires_grad_() for value in (tokens, gate, weights["wi"], weights["wo"])]
    assert torch.autograd.gradcheck(
        lambda tokens, gate, wi, wo: run_experts(tokens, expert, gate, wi=wi, wo=wo, activate=torch.tanh),
        leaves,
        fast_mode=True,
    )


@pytest.mark.parametrize("top_k", [1, 2, NUM_EXPERTS])
def test_every_choice_has_a_slot_among_those_of_its_expert(top_k):
    _, expert, _ = choices(30, top_k)
    sent = dispatch_tokens(expert, num_experts=NUM_EXPERTS)
    assert sorted(sent.slot.flatten().tolist()) == list(range(30 * top_k))
    owner = torch.repeat_interleave(torch.arange(NUM_EXPERTS), torch.tensor(sent.counts))
    assert torch.equal(owner[sent.slot], expert)
    assert torch.equal(sent.token[sent.slot], torch.arange(30)[:, None].expand(-1, top_k))


def test_dispatch_by_hand():
    sent = dispatch_tokens(torch.tensor([[2, 0], [0, 3], [2, 0]]), num_experts=3)
    assert sent.token.tolist() == [0, 1, 2, 0, 2]
    assert sent.counts == [3, 0, 2]
    assert sent.slot.tolist() == [[3, 0], [1, 0], [4, 2]]  # the choice of expert 3 is dropped


@pytest.mark.parametrize("capacity", [0, 1, 4, 100])
@pytest.mark.parametrize("top_k", [1, 2, NUM_EXPERTS])
def test_an_expert_keeps_its_largest_gates_up_to_capacity(top_k, capacity):
    _, expert, gate = choices(30, top_k)
    kept = within_capacity(expert, gate, num_experts=NUM_EXPERTS, capacity=capacity)
    for index in range(NUM_EXPERTS):
        own = expert == index
        assert (own & kept).sum() == min(capacity, int(own.sum()))
        if (own & kept).any() and (own & ~kept).any():
            assert gate[own & kept].min() >= gate[own & ~kept].max()


def test_capacity_by_hand():
    expert, gate = torch.tensor([[0, 1], [0, 1], [0, 2]]), torch.tensor([[0.5, 0.2], [0.9, 0.1], [0.5, 0.3]])
    kept = within_capacity(expert, gate, num_experts=3, capacity=2)
    assert kept.tolist() == [[True, True], [True, True], [False, True]]  # of equal gates the first stays
    kept = within_capacity(expert, gate, num_experts=3, capacity=1)
    assert kept.tolist() == [[False, True], [True, False], [False, True]]
