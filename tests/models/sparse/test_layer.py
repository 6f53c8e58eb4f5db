import copy
import math

import pytest
import torch
from chronos.chronos2.config import Chronos2CoreConfig
from chronos.chronos2.layers import FeedForward

from chronomoe.errors import InputError
from chronomoe.models.balancing import z_loss
from chronomoe.models.sparse.config import MoEConfig
from chronomoe.models.sparse.layer import Chronos2MoELayer, route_tokens

NUM_EXPERTS, D_MODEL, D_FF = 4, 16, 48
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SETTINGS = {
    "one choice": {"top_k": 1},
    "two choices": {"top_k": 2},
    "all experts": {"top_k": NUM_EXPERTS},
    "late softmax": {"gating": "top_k_then_softmax"},
    "slices": {"granularity": 2},
    "shared": {"shared_width": 16},
    "bias": {"bias_rate": 0.1},
    "all of it": {"granularity": 2, "shared_width": 16, "gating": "top_k_then_softmax", "bias_rate": 0.1},
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())


def configured(**settings):
    return MoEConfig(**{"num_experts": NUM_EXPERTS, "top_k": 2} | settings)


@pytest.fixture
def make_layer():
    """A layer in evaluation mode that looks trained: its router and its bias take sides."""

    def make(**settings):
        layer = Chronos2MoELayer(d_model=D_MODEL, d_ff=D_FF, config=configured(**settings))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.2 * noise if name == "layer_norm.weight" else 0.5 * noise)
            layer.balance_bias.bias.copy_(torch.randn(NUM_EXPERTS, generator=generator))
        return layer.eval()

    return make


@pytest.fixture
def dense():
    core = Chronos2CoreConfig(d_model=D_MODEL, d_ff=D_FF, d_kv=4, num_heads=4, num_layers=1, dropout_rate=0.1)
    block = FeedForward(core).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return block


@pytest.fixture
def hidden():
    return torch.randn(3, 10, D_MODEL, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def observed():
    """Padding at the start of two rows and in the middle of one."""
    observed = torch.ones(3, 10, dtype=torch.bool)
    observed[0, :4] = observed[1, :9] = observed[2, 5] = False
    return observed


def slow(layer, hidden, observed=None):
    """What a layer is defined to compute, one token and one expert at a time."""
    config, bias = layer.config, layer.balance_bias.bias
    output = hidden.clone()
    for place in [(row, token) for row in range(hidden.shape[0]) for token in range(hidden.shape[1])]:
        if observed is not None and not observed[place]:
            continue
        token = layer.layer_norm(hidden[place])
        score = layer.router.float() @ token.float()
        order = (score + bias if config.bias_rate else score).argsort(descending=True)[: config.top_k]
        gates = score[order].softmax(dim=0) if config.gating == "top_k_then_softmax" else score.softmax(dim=0)[order]
        update = torch.zeros(D_MODEL)
        for index, gate in zip(order.tolist(), gates, strict=True):
            update = update + layer.scale * gate * (layer.wo[index] @ torch.relu(layer.wi[index] @ token))
        if config.shared_width:
            update = update + layer.shared_wo @ torch.relu(layer.shared_wi @ token)
        output[place] = hidden[place] + update
    return output


@every_setting
@torch.no_grad()
def test_a_layer_equals_one_token_and_one_expert_at_a_time(make_layer, hidden, observed, settings):
    layer = make_layer(**settings)
    torch.testing.assert_close(layer(hidden), slow(layer, hidden), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.mix(hidden, observed)[0], slow(layer, hidden, observed), rtol=1e-4, atol=1e-4)


@every_setting
@torch.no_grad()
def test_a_layer_made_from_a_dense_block_computes_the_same(dense, hidden, settings):
    layer = Chronos2MoELayer.from_dense(dense, configured(**settings))
    torch.testing.assert_close(layer(hidden), dense(hidden), rtol=1e-5, atol=1e-4)  # outputs are near 100
    assert not layer.training
    assert layer.dropout.p == dense.dropout.p


@every_setting
@torch.no_grad()
def test_a_fresh_layer_is_the_identity(hidden, settings):
    layer = Chronos2MoELayer(d_model=D_MODEL, d_ff=D_FF, config=configured(**settings))
    assert torch.equal(layer(hidden), hidden)


@every_setting
@torch.no_grad()
def test_what_a_token_becomes_does_not_depend_on_the_others(make_layer, hidden, settings):
    layer = make_layer(**settings)
    together = layer(hidden)
    torch.testing.assert_close(layer(hidden[1:2, 3:4]), together[1:2, 3:4], **CLOSE)
    torch.testing.assert_close(layer(hidden.flip(0, 1)), together.flip(0, 1), **CLOSE)


@pytest.mark.parametrize("top_k", [1, 2, NUM_EXPERTS])
@torch.no_grad()
def test_the_order_of_experts_does_not_matter(make_layer, hidden, top_k):
    layer = make_layer(top_k=top_k, bias_rate=0.1)
    shuffled, order = copy.deepcopy(layer), torch.tensor([2, 0, 3, 1])
    for weight in (shuffled.router, shuffled.wi, shuffled.wo, shuffled.balance_bias.bias):
        weight.copy_(weight[order])
    torch.testing.assert_close(shuffled(hidden), layer(hidden), **CLOSE)


@every_setting
@torch.no_grad()
def test_padding_is_neither_routed_nor_counted_and_stays_as_it_is(make_layer, hidden, observed, settings):
    layer = make_layer(**settings)
    mixed, aux = layer.mix(hidden, observed)
    assert torch.equal(mixed[~observed], hidden[~observed])
    assert (aux.expert[~observed] == -1).all()
    alone, expected = layer.mix(hidden[observed][None])
    torch.testing.assert_close(mixed[observed], alone[0], **CLOSE)
    for name in ("balance_loss", "z_loss", "load", "entropy", "dropped"):
        torch.testing.assert_close(getattr(aux, name), getattr(expected, name))
    assert torch.equal(aux.expert[observed], expected.expert[0])


@every_setting
@pytest.mark.parametrize("training", [False, True])
def test_padding_alone_and_no_tokens_at_all_pass(make_layer, hidden, settings, training):
    layer = make_layer(**settings, capacity_factor=1.0).train(training)
    bias = layer.balance_bias.bias.clone()
    for tokens in (hidden, hidden[:, :0], hidden[:0]):
        mixed, aux = layer.mix(tokens, torch.zeros(tokens.shape[:2], dtype=torch.bool))
        assert torch.equal(mixed, tokens)
        assert not aux.load.any()
        assert all(torch.isfinite(value).all() for value in aux)
    assert torch.equal(layer.balance_bias.bias, bias)


@torch.no_grad()
def test_all_tokens_may_choose_one_expert(make_layer, hidden):
    layer = make_layer(top_k=1, bias_rate=0.1)
    layer.balance_bias.bias.copy_(torch.tensor([0.0, 0.0, 1e6, 0.0]))
    mixed, aux = layer.mix(hidden)
    assert aux.load.tolist() == [0, 0, 1, 0]
    torch.testing.assert_close(mixed, slow(layer, hidden), rtol=1e-4, atol=1e-4)


def test_gates_by_hand():
    score = torch.tensor([[1.0, 3.0, 2.0]]).log()
    early = route_tokens(score, MoEConfig(num_experts=3, top_k=2))
    assert early.expert.tolist() == [[1, 2]]
    assert early.gate[0].tolist() == pytest.approx([3 / 6, 2 / 6])
    assert early.prob[0].tolist() == pytest.approx([1 / 6, 3 / 6, 2 / 6])
    late = route_tokens(score, MoEConfig(num_experts=3, top_k=2, gating="top_k_then_softmax"))
    assert late.gate[0].tolist() == pytest.approx([3 / 5, 2 / 5])


def test_a_bias_moves_the_choice_and_not_the_gates():
    score, bias = torch.tensor([[1.0, 3.0, 2.0]]).log(), torch.tensor([5.0, 0.0, 0.0])
    routing = route_tokens(score, MoEConfig(num_experts=3, top_k=2), bias=bias)
    assert routing.expert.tolist() == [[0, 1]]
    assert routing.gate[0].tolist() == pytest.approx([1 / 6, 3 / 6])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tokens_are_routed_in_float32(make_layer, hidden, dtype):
    layer, narrow = make_layer(), hidden.to(dtype).flatten(0, 1)
    expected = narrow.float() @ layer.router.T
    assert torch.equal(layer.route(narrow).score, expected)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(layer.route(narrow).score, expected)
    aux = layer.cast(dtype).mix(hidden.to(dtype))[1]
    assert aux.balance_loss.dtype == aux.z_loss.dtype == aux.load.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_half_precision_block_gives_a_layer_of_its_type_with_a_router_in_float32(dense, hidden, dtype):
    wide = dense(hidden)
    dense.to(dtype)
    layer, narrow = Chronos2MoELayer.from_dense(dense, configured(top_k=3)), dense(hidden.to(dtype))
    assert layer.router.dtype == torch.float32
    assert layer.router.abs().min() > 0
    assert layer.wi.dtype == layer.layer_norm.weight.dtype == dtype
    assert (layer(hidden.to(dtype)) - narrow).abs().max() <= 2 * (narrow - wide).abs().max()


def test_the_bias_rises_for_experts_used_too_little_in_training_alone(make_layer, hidden, observed):
    layer = make_layer(top_k=1, bias_rate=0.1)
    layer.mix(hidden, observed)
    start = layer.balance_bias.bias.clone()
    load = layer.train().mix(hidden, observed)[1].load
    assert torch.equal(layer.balance_bias.bias, start + 0.1 * torch.sign(1 / NUM_EXPERTS - load))


@pytest.mark.parametrize("top_k", [1, 2, NUM_EXPERTS])
def test_auxiliary_outputs_are_those_of_the_router(make_layer, hidden, top_k):
    layer = make_layer(top_k=top_k, balance="switch")
    _, aux = layer.mix(hidden)
    score = layer.layer_norm(hidden).flatten(0, 1) @ layer.router.T
    prob = score.softmax(dim=1)
    assert aux.load.tolist() == pytest.approx((aux.expert.flatten().bincount(minlength=4) / (30 * top_k)).tolist())
    switch, small = 4 * (aux.load * prob.mean(dim=0)).sum(), z_loss(score)
    torch.testing.assert_close((aux.balance_loss, aux.z_loss), (switch, small))
    found, expected = (
        torch.autograd.grad(one + other, layer.router)
        for one, other in ((aux.balance_loss, aux.z_loss), (switch, small))
    )
    torch.testing.assert_close(found, expected)
    assert 0 < aux.entropy < math.log(NUM_EXPERTS)
    assert aux.entropy.item() == pytest.approx(-(prob * prob.log()).sum(dim=1).mean().item(), rel=1e-5)
    l2 = make_layer(top_k=top_k, balance="l2").mix(hidden)[1].balance_loss
    assert l2.item() == pytest.approx(4 * (prob.mean(dim=0) - 1 / 4).square().sum().item(), rel=1e-5)
    assert make_layer(top_k=top_k, balance="none").mix(hidden)[1].balance_loss == 0


@torch.no_grad()
def test_capacity_drops_the_choices_of_the_smallest_gates(make_layer, hidden, observed):
    free, tight = make_layer(top_k=1), make_layer(top_k=1, capacity_factor=0.5).train()
    (plain, aux), (mixed, dropped) = free.mix(hidden, observed), tight.mix(hidden, observed)
    num_tokens = int(observed.sum())
    most = math.ceil(0.5 * num_tokens / NUM_EXPERTS)
    gate = free.route(free.layer_norm(hidden)[observed]).gate[:, 0]
    kept = torch.zeros(num_tokens, dtype=torch.bool)
    for index in range(NUM_EXPERTS):
        own = torch.where(aux.expert[observed][:, 0] == index)[0]
        kept[own[gate[own].argsort(descending=True)[:most]]] = True
    assert torch.equal(mixed[observed][~kept], hidden[observed][~kept])
    torch.testing.assert_close(mixed[observed][kept], plain[observed][kept], **CLOSE)
    assert dropped.dropped.item() == pytest.approx(1 - kept.float().mean().item())
    assert torch.equal(dropped.load, aux.load)
    roomy = make_layer(top_k=1, capacity_factor=float(NUM_EXPERTS))
    assert torch.equal(roomy(hidden), free(hidden))


@every_setting
def test_gradients_are_those_of_one_token_and_one_expert_at_a_time(make_layer, hidden, observed, settings):
    layer = make_layer(**settings)
    leaves = [*layer.parameters(), hidden.requires_grad_()]
    found, expected = (
        torch.autograd.grad(output.square().mean(), leaves)
        for output in (layer.mix(hidden, observed)[0], slow(layer, hidden, observed))
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("top_k", [1, 2, NUM_EXPERTS])
def test_the_forecast_teaches_the_router_unless_its_gates_are_constant(make_layer, hidden, top_k):
    for gating in ("softmax_then_top_k", "top_k_then_softmax"):
        layer = make_layer(top_k=top_k, gating=gating)
        (gradient,) = torch.autograd.grad(layer(hidden).square().mean(), layer.router)
        assert bool(gradient.abs().max() > 1e-6) == (top_k > 1 or gating == "softmax_then_top_k")


def test_dropout_is_that_of_the_dense_block(dense, hidden):
    layer = Chronos2MoELayer.from_dense(dense.train(), configured())
    assert layer.training
    assert not torch.equal(layer(hidden), layer(hidden))
    assert torch.equal(layer.eval()(hidden), layer(hidden))


@every_setting
@torch.no_grad()
def test_a_saved_layer_is_loaded_with_every_bit(make_layer, hidden, tmp_path, settings):
    layer = make_layer(**settings)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    with torch.device("meta"):
        loaded = Chronos2MoELayer(d_model=D_MODEL, d_ff=D_FF, config=configured(**settings))
    loaded.load_state_dict(torch.load(tmp_path / "layer.pt"), assign=True)
    assert torch.equal(loaded.eval()(hidden), layer(hidden))
    assert torch.equal(copy.deepcopy(layer)(hidden), layer(hidden))


def test_the_seed_decides_router_and_experts():
    one, same, other = (
        Chronos2MoELayer(d_model=D_MODEL, d_ff=D_FF, config=configured(seed=seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(one.router, same.router)
    assert torch.equal(one.wi, same.wi)
    assert not torch.equal(one.wi, other.wi)


def test_active_parameters_are_those_of_a_token_by_hand():
    config = MoEConfig(num_experts=8, top_k=2, granularity=2, shared_width=16)
    layer = Chronos2MoELayer(d_model=D_MODEL, d_ff=D_FF, config=config)
    norm, router, shared, expert = D_MODEL, 8 * D_MODEL, 2 * 16 * D_MODEL, 2 * 16 * D_MODEL
    assert layer.active_parameters() == norm + router + shared + 2 * expert


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"granularity": 2, "shared_width": 1}, "granularity must divide the 47 hidden units"),
        ({"shared_width": D_FF}, "shared_width must be below 48"),
        ({"expert_width": 24}, "expert_width must be 48 for granularity 1"),
    ],
)
def test_widths_that_do_not_fit_the_dense_block_are_refused(dense, settings, message):
    with pytest.raises(InputError, match=message):
        Chronos2MoELayer.from_dense(dense, configured(**settings))
