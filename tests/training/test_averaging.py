import copy

import pytest
import torch
from torch import nn

from chronomoe.training.averaging import AVERAGE, AveragedAdamW, averaged_weights, use_averaged_weights

OPTIONS = {"lr": 0.1, "weight_decay": 0.01}


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def train(network, optimizer, *, steps, first=0):
    """Take steps on inputs that depend on the step alone; return the weights after each."""
    seen = []
    for step in range(first, first + steps):
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        network(inputs).square().mean().backward()
        optimizer.step()
        seen.append({name: value.detach().clone() for name, value in network.named_parameters()})
    return seen


def averages(network, optimizer):
    return {name: optimizer.state[value][AVERAGE].clone() for name, value in network.named_parameters()}


def test_the_weights_are_those_of_adamw(network):
    plain = copy.deepcopy(network)
    expected = train(plain, torch.optim.AdamW(plain.parameters(), **OPTIONS), steps=5)
    found = train(network, AveragedAdamW(network.parameters(), average_decay=0.5, **OPTIONS), steps=5)
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_the_average_is_the_one_computed_by_hand(network, decay):
    optimizer = AveragedAdamW(network.parameters(), average_decay=decay, **OPTIONS)
    seen = train(network, optimizer, steps=6)
    expected = dict(seen[0])
    for taken, weights in enumerate(seen[1:], start=2):
        kept = min(decay, taken / (taken + 10))
        expected = {name: kept * expected[name] + (1 - kept) * value for name, value in weights.items()}
    torch.testing.assert_close(averages(network, optimizer), expected, rtol=1e-5, atol=1e-6)


def test_without_decay_the_average_is_the_weights(network):
    optimizer = AveragedAdamW(network.parameters(), average_decay=0.0, **OPTIONS)
    seen = train(network, optimizer, steps=4)
    found = averages(network, optimizer)
    assert all(torch.equal(found[name], value) for name, value in seen[-1].items())


@pytest.mark.parametrize("fused", [False, True])
def test_the_average_goes_on_after_the_state_is_saved_and_loaded(network, tmp_path, fused):
    whole, halves = copy.deepcopy(network), network
    options = OPTIONS | {"average_decay": 0.9, "fused": fused}
    one = AveragedAdamW(whole.parameters(), **options)
    train(whole, one, steps=8)
    first = AveragedAdamW(halves.parameters(), **options)
    train(halves, first, steps=5)
    torch.save({"weights": halves.state_dict(), "optimizer": first.state_dict()}, tmp_path / "half.pt")
    saved = torch.load(tmp_path / "half.pt")
    later = nn.Linear(3, 2)
    later.load_state_dict(saved["weights"])
    second = AveragedAdamW(later.parameters(), **options)
    second.load_state_dict(saved["optimizer"])
    train(later, second, steps=3, first=5)
    expected, found = averages(whole, one), averages(later, second)
    for name, value in whole.named_parameters():
        assert torch.equal(found[name], expected[name])
        assert torch.equal(dict(later.named_parameters())[name], value)


def test_averaged_weights_hold_inside_the_block_and_are_put_back_whatever_happens(network):
    optimizer = AveragedAdamW(network.parameters(), average_decay=0.9, **OPTIONS)
    own, expected = train(network, optimizer, steps=5)[-1], averages(network, optimizer)
    with averaged_weights(optimizer):
        for name, value in network.named_parameters():
            assert torch.equal(value, expected[name])
            assert not torch.equal(value, own[name])
    with pytest.raises(KeyboardInterrupt), averaged_weights(optimizer):
        raise KeyboardInterrupt
    for name, value in network.named_parameters():
        assert torch.equal(value, own[name])
    found = averages(network, optimizer)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_averaged_weights_without_an_optimizer_or_a_step_change_nothing(network):
    before = copy.deepcopy(network.state_dict())
    for optimizer in (None, AveragedAdamW(network.parameters()), torch.optim.AdamW(network.parameters())):
        with averaged_weights(optimizer):
            assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_the_averages_can_take_the_place_of_the_weights_for_good(network):
    optimizer = AveragedAdamW(network.parameters(), average_decay=0.9, **OPTIONS)
    train(network, optimizer, steps=5)
    expected = averages(network, optimizer)
    use_averaged_weights(optimizer)
    assert all(torch.equal(value, expected[name]) for name, value in network.named_parameters())


def test_a_parameter_without_gradient_has_no_average_until_one_comes(network):
    optimizer = AveragedAdamW(network.parameters(), average_decay=0.9, **OPTIONS)
    network.bias.requires_grad_(False)
    train(network, optimizer, steps=2)
    assert AVERAGE not in optimizer.state[network.bias]
    network.bias.requires_grad_(True)
    train(network, optimizer, steps=1)
    assert torch.equal(optimizer.state[network.bias][AVERAGE], network.bias)


def test_a_closure_is_evaluated_and_its_loss_returned(network):
    optimizer = AveragedAdamW(network.parameters(), **OPTIONS)

    def closure():
        optimizer.zero_grad()
        loss = network(torch.ones(1, 3)).square().mean()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) > 0
    assert AVERAGE in optimizer.state[network.weight]


def test_the_weight_of_the_average_grows_up_to_its_limit():
    """A weight that jumps from 0 to 1 at the second step, by hand: 0 (1 - 12/12...), decays of 2/12, 3/13 and 0.25."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = AveragedAdamW([weight], average_decay=0.25, lr=0.0, weight_decay=0.0)
    values = []
    for step in range(4):
        weight.grad = torch.ones(1)
        with torch.no_grad():
            weight.fill_(float(step > 0))
        optimizer.step()
        values.append(optimizer.state[weight][AVERAGE].item())
    second = 1 - 2 / 12
    third = second + (1 - second) * (1 - 3 / 13)
    fourth = third + (1 - third) * 0.75
    assert values == pytest.approx([0.0, second, third, fourth])
