import copy
import json

import pytest
import torch
from chronos.chronos2 import Chronos2Model
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from chronomoe.errors import InputError
from chronomoe.models.balancing import expert_load
from chronomoe.models.chronos2 import cast_parameters, use_exact_group_attention
from chronomoe.models.sparse.config import MoEConfig
from chronomoe.models.sparse.layer import Chronos2MoELayer
from chronomoe.models.sparse.upcycling import Chronos2MoEConfig, Chronos2MoEModel, upcycle
from chronomoe.models.student import StudentConfig, create_student_model
from chronomoe.pipeline import load_model
from moe_models import train_by_chance

SETTINGS = {
    "copies": {"num_experts": 4, "top_k": 2},
    "one choice": {"num_experts": 4, "top_k": 1},
    "all experts": {"num_experts": 3, "top_k": 3},
    "one expert": {"num_experts": 1, "top_k": 1},
    "slices": {"num_experts": 8, "top_k": 4, "granularity": 4},
    "slices of two copies": {"num_experts": 8, "top_k": 4, "granularity": 2},
    "shared": {"num_experts": 4, "top_k": 2, "shared_width": 32},
    "shared and slices": {"num_experts": 8, "top_k": 2, "granularity": 2, "shared_width": 32},
    "late softmax": {"num_experts": 4, "top_k": 2, "gating": "top_k_then_softmax"},
    "late softmax of slices": {"num_experts": 8, "top_k": 4, "granularity": 2, "gating": "top_k_then_softmax"},
    "some blocks": {"num_experts": 4, "top_k": 2, "layers": (1, 3)},
    "bias": {"num_experts": 4, "top_k": 2, "bias_rate": 0.1, "balance": "none"},
}
NORMALIZED = {"rtol": 1e-4, "atol": 2e-5}  # float32, in the normalised space


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


@pytest.fixture
def dense(teacher):
    return use_exact_group_attention(copy.deepcopy(teacher))


@pytest.fixture
def make_moe(teacher):
    """An upcycled model whose experts differ and whose router takes sides."""

    def make(**settings):
        return train_by_chance(upcycle(teacher, MoEConfig(**{"num_experts": 4, "top_k": 2} | settings)))

    return make


@torch.no_grad()
def forecast(model, batch, **options):
    return model(**batch, **options).normalized_preds


def largest_gap(one, other):
    return (one - other).abs().max().item()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_an_upcycled_model_computes_at_first_what_the_dense_one_does(teacher, dense, batch, settings):
    upcycled = upcycle(teacher, MoEConfig(**settings))
    assert largest_gap(forecast(upcycled, batch), forecast(dense, batch)) < 1e-5
    assert len(upcycled.moe_layers) == len(settings.get("layers", range(4)))


def test_a_block_of_the_full_size_computes_at_first_what_the_dense_one_does(make_teacher, context):
    teacher = make_teacher(d_model=768, d_kv=64, d_ff=3072, num_heads=12, num_layers=1)
    dense = use_exact_group_attention(copy.deepcopy(teacher))
    for settings in (SETTINGS["copies"], SETTINGS["slices of two copies"]):
        upcycled = upcycle(teacher, MoEConfig(**settings))
        assert largest_gap(forecast(upcycled, {"context": context}), forecast(dense, {"context": context})) < 1e-5


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_an_upcycled_tiny_teacher_gives_the_same_quantiles_of_standardised_series(tiny, make_context, settings):
    context = make_context(batch=16, length=256)
    context = (context - context.mean(dim=1, keepdim=True)) / context.std(dim=1, keepdim=True)
    with torch.no_grad():
        expected = tiny(context, num_output_patches=2).quantile_preds
        assert (
            largest_gap(upcycle(tiny, MoEConfig(**settings))(context, num_output_patches=2).quantile_preds, expected)
            < 1e-5
        )


@pytest.mark.parametrize("change", [{"noise": 0.1}, {"reinit": 0.25}])
def test_noise_and_fresh_units_tell_copies_apart(teacher, dense, batch, change):
    upcycled = upcycle(teacher, MoEConfig(**change))
    assert largest_gap(forecast(upcycled, batch), forecast(dense, batch)) > 1e-3
    first, second = upcycled.moe_layers[0].wi[:2]
    assert not torch.equal(first, second)


def test_upcycling_leaves_the_dense_model_as_it_was(teacher):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    train_by_chance(upcycle(teacher, MoEConfig())).encoder.block[0].layer[0].self_attention.q.weight.data.zero_()
    assert type(teacher) is Chronos2Model
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_the_same_seed_upcycles_to_the_same_bits(teacher):
    first, second, other = (upcycle(teacher, MoEConfig(noise=0.1, seed=seed)).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_forward_pass_equals_upstream_s_around_the_same_layers(make_moe, batch, settings):
    moe = make_moe(**settings)
    with torch.no_grad():
        expected = moe(**batch, output_attentions=True)
        output = moe(**batch)
    assert len(expected.enc_time_self_attn_weights) == 4
    torch.testing.assert_close(output.normalized_preds, expected.normalized_preds, **NORMALIZED)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-4, atol=1e-5)
    assert expected.moe is None


def test_encoded_tokens_of_observed_patches_equal_upstream_s(make_moe, gappy):
    moe = make_moe()
    expected = moe.encode(gappy, num_output_patches=2, output_attentions=True)[0][0]
    encoded = moe.encode(gappy, num_output_patches=2)[0][0]  # with a gradient: from the weights as they are
    torch.testing.assert_close(encoded[observed(gappy)], expected[observed(gappy)], **NORMALIZED)


def test_folded_weights_round_no_worse_than_upstream_s_by_more_than_a_small_factor(make_moe, gappy):
    """A router that takes sides magnifies float32's rounding, upstream's too: float64 is the measure."""
    moe = make_moe()
    precise = copy.deepcopy(moe).double().encode(gappy.double(), num_output_patches=2)[0][0]
    with torch.no_grad():
        folded = moe.encode(gappy, num_output_patches=2)[0][0]
        upstream = moe.encode(gappy, num_output_patches=2, output_attentions=True)[0][0]
    error, allowed = ((found - precise)[observed(gappy)].abs().mean() for found in (folded, upstream))
    assert error <= 4 * allowed


def observed(context):
    """Mark the tokens of observed patches, the register and the future."""
    patches = torch.nn.functional.pad(context.isfinite(), (12, 0)).view(len(context), 7, 16).any(dim=-1)
    return torch.nn.functional.pad(patches, (0, 3), value=True)


def test_hidden_states_end_in_the_forecast(make_moe, batch):
    moe = make_moe()
    with torch.no_grad():
        output = moe(**batch, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    torch.testing.assert_close(output.normalized_preds, forecast(moe, batch), **NORMALIZED)


def test_a_group_s_forecast_does_not_depend_on_the_rest_of_the_batch(make_moe, batch):
    moe = make_moe()
    together = forecast(moe, batch)
    for group in batch["group_ids"].unique():
        rows = batch["group_ids"] == group
        alone = {name: value if name == "num_output_patches" else value[rows] for name, value in batch.items()}
        torch.testing.assert_close(forecast(moe, alone), together[rows], **NORMALIZED)


def test_padding_is_neither_routed_nor_counted(make_moe, gappy):
    moe = make_moe()
    with torch.no_grad():
        layers = moe(gappy, num_output_patches=2).moe
    padding = ~torch.nn.functional.pad(gappy.isfinite(), (12, 0)).view(len(gappy), 7, 16).any(dim=-1)
    assert 0 < padding.sum() < padding.numel()
    for layer in layers[:-1]:
        assert layer.expert.shape == (len(gappy), 7 + 1 + 2, 2)
        assert torch.equal((layer.expert == -1).all(dim=-1)[:, :7], padding)
        assert torch.equal((layer.expert == -1).any(dim=-1)[:, :7], padding)
        counted = layer.expert[layer.expert[..., 0] >= 0]
        torch.testing.assert_close(layer.load, expert_load(counted, num_experts=4))
    assert layers[-1].expert.shape == (len(gappy), 2, 2)
    assert (layers[-1].expert >= 0).all()


def test_missing_values_before_the_series_change_neither_forecast_nor_auxiliary_losses(make_moe, context):
    moe, padded = make_moe(), torch.nn.functional.pad(context, (48, 0), value=torch.nan)
    padded = torch.cat([padded[:, -128:], torch.full_like(padded[:1, -128:], torch.nan)])
    with torch.no_grad():
        short = moe(torch.cat([context, torch.full_like(context[:1], torch.nan)]))
        long = moe(padded)
    torch.testing.assert_close(long.normalized_preds, short.normalized_preds, **NORMALIZED)
    torch.testing.assert_close(long.aux_loss, short.aux_loss)
    for one, other in zip(long.moe, short.moe, strict=True):
        torch.testing.assert_close((one.load, one.entropy), (other.load, other.entropy))


def test_the_auxiliary_loss_is_the_sum_over_layers(make_moe, batch):
    output = make_moe(z_weight=0.5)(**batch)
    expected = sum(layer.balance_loss + 0.5 * layer.z_loss for layer in output.moe)
    assert expected > 0.1
    torch.testing.assert_close(output.aux_loss, expected)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_both_losses_reach_experts_and_routers(make_moe, batch, top_k):
    moe = make_moe(top_k=top_k)
    for name in ("loss", "aux_loss"):
        moe.zero_grad()
        output = moe(**batch)
        getattr(output, name).backward()
        for layer in moe.moe_layers.values():
            assert layer.router.grad.abs().max() > 0
        learns = moe.moe_layers[0].wi.grad.abs().amax(dim=(1, 2)) > 0
        assert torch.equal(learns, output.moe[0].load > 0)


def test_flops_are_those_of_the_chosen_experts(teacher, context):
    count = {}
    for top_k in (1, 2, 3):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            upcycle(teacher, MoEConfig(num_experts=4, top_k=top_k))(context)
        count[top_k] = counter.get_total_flops()
    rows, tokens, last = len(context), 7 + 1 + 1, 1
    block = 2 * 2 * 48 * 96  # one token through one dense block
    assert count[2] - count[1] == count[3] - count[2] == rows * (3 * tokens + last) * block


def test_active_parameters_are_those_of_the_dense_model_and_the_routers(teacher):
    dense = sum(parameter.numel() for parameter in teacher.parameters())
    routers = 4 * 4 * 48
    assert upcycle(teacher, MoEConfig(num_experts=4, top_k=1)).active_parameters() == dense + routers
    four_times = dense + routers + 4 * 3 * 2 * 48 * 96
    assert upcycle(teacher, MoEConfig(num_experts=4, top_k=4)).active_parameters() == four_times
    slices = upcycle(teacher, MoEConfig(num_experts=4, top_k=2, granularity=2))
    assert slices.active_parameters() == dense + routers
    assert slices.num_parameters() == dense + routers + 4 * 2 * 48 * 96


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_checkpoint_keeps_every_bit(make_moe, batch, tmp_path, settings):
    moe = make_moe(**settings)
    moe.moe_layers[1].balance_bias.bias.fill_(0.25)
    moe.save_pretrained(tmp_path)
    loaded, report = Chronos2MoEModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.state_dict().keys() == moe.state_dict().keys()
    assert all(torch.equal(value, moe.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert list(loaded.moe_layers) == list(moe.moe_layers)
    assert all(layer.config == MoEConfig(**settings) for layer in loaded.moe_layers.values())
    torch.testing.assert_close(forecast(loaded, batch), forecast(moe, batch), **NORMALIZED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_leaves_routers_as_they_are(teacher, dense, batch, tmp_path, dtype):
    upcycle(teacher, MoEConfig(num_experts=4, top_k=2)).save_pretrained(tmp_path)
    loaded, wide = (Chronos2MoEModel.from_pretrained(tmp_path, dtype=one) for one in (dtype, torch.float32))
    narrow = copy.deepcopy(dense)
    cast_parameters(narrow, dtype)
    upcycled = upcycle(narrow, MoEConfig(num_experts=4, top_k=2))
    for model in (loaded, upcycled):
        assert model.dtype == dtype
        for index, layer in model.moe_layers.items():
            assert layer.wi.dtype == layer.layer_norm.weight.dtype == dtype
            assert layer.router.dtype == layer.balance_bias.bias.dtype == torch.float32
            assert torch.equal(layer.router, wide.moe_layers[index].router)
        gap = largest_gap(forecast(model, batch), forecast(narrow, batch))
        assert gap <= largest_gap(forecast(narrow, batch), forecast(dense, batch))
    upcycled.save_pretrained(tmp_path)
    again = Chronos2MoEModel.from_pretrained(tmp_path, dtype=dtype)
    assert all(torch.equal(value, upcycled.state_dict()[name]) for name, value in again.state_dict().items())


def test_mixed_precision_trains_experts_and_routers(make_moe, batch):
    moe = make_moe().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = moe(**batch)
        loss = output.loss + output.aux_loss
    loss.backward()
    assert output.aux_loss.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in moe.parameters())
    assert all(layer.router.grad.abs().max() > 0 for layer in moe.moe_layers.values())


def test_half_precision_keeps_most_choices_of_a_trained_router(make_moe, batch, tmp_path):
    moe = make_moe(top_k=1)
    moe.save_pretrained(tmp_path)
    narrow = Chronos2MoEModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        pairs = zip(moe(**batch).moe, narrow(**batch).moe, strict=True)
        assert all((one.expert == other.expert).float().mean() > 0.8 for one, other in pairs)


def test_a_capacity_drops_choices_and_says_so(make_moe, batch):
    free, tight = make_moe(), make_moe(capacity_factor=0.5)
    with torch.no_grad():
        assert all(layer.dropped == 0 for layer in free(**batch).moe)
        assert all(layer.dropped > 0.4 for layer in tight.train()(**batch).moe)
    assert largest_gap(forecast(free, batch), forecast(tight.eval(), batch)) == 0  # a limit of training alone


def test_a_model_from_a_configuration_has_fresh_layers_that_are_the_identity(teacher, context):
    moe = Chronos2MoEModel(Chronos2MoEConfig(**upcycle(teacher, MoEConfig(layers=(0,))).config.to_dict())).eval()
    assert list(moe.moe_layers) == moe.moe_blocks == [0]
    hidden = torch.randn(2, 3, 48)
    assert torch.equal(moe.moe_layers[0](hidden), hidden)
    assert forecast(moe, {"context": context}).isfinite().all()


def test_a_checkpoint_that_lacks_experts_is_refused(make_moe, tmp_path):
    make_moe().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.block.2.layer.2.wo"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 are missing, such as 'encoder.block.2.layer.2.wo'; save the model again"):
        Chronos2MoEModel.from_pretrained(tmp_path)


def test_a_checkpoint_with_unknown_settings_is_refused(make_moe, tmp_path):
    make_moe().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["moe"]["topk"] = config["moe"].pop("top_k")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"unknown key 'topk'.*Did you mean 'top_k'"):
        Chronos2MoEModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": (0, 4)}, "layers must be from 0 to 3, the model's encoder blocks, got 4"),
        ({"granularity": 5, "num_experts": 10, "top_k": 5}, "granularity must divide the 96 hidden units"),
        ({"expert_width": 50}, "expert_width must be 96"),
        ({"shared_width": 96}, "shared_width must be below 96"),
    ],
)
def test_layers_that_do_not_fit_the_model_are_refused(teacher, settings, message):
    with pytest.raises(InputError, match=message):
        upcycle(teacher, MoEConfig(**settings))


def test_models_that_are_not_dense_are_refused(teacher, make_mixture, unchecked):
    upcycled = upcycle(teacher, MoEConfig())
    with pytest.raises(InputError, match="upcycle needs a dense .*, got a Chronos2MoEModel, which has MoE layers"):
        upcycle(upcycled, MoEConfig())
    with pytest.raises(InputError, match="upcycle needs a dense Chronos-2 model, got a DistilledMoE"):
        upcycle(make_mixture(), MoEConfig())
    with pytest.raises(InputError, match="cutting a student needs a dense .*upcycle the student"):
        create_student_model(upcycled, StudentConfig(num_layers=1))


def test_a_student_is_upcycled_as_its_teacher_is(teacher, context):
    student = create_student_model(teacher, StudentConfig(num_layers=1, d_model=32, num_heads=2, d_ff=40)).eval()
    upcycled = upcycle(student, MoEConfig(num_experts=4, top_k=2, granularity=2))
    assert isinstance(upcycled.moe_layers[0], Chronos2MoELayer)
    assert largest_gap(forecast(upcycled, {"context": context}), forecast(student, {"context": context})) < 1e-5
