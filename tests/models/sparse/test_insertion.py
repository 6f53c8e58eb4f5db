import copy
import json

import pytest
import torch
from chronos.chronos2 import Chronos2Model
from safetensors.torch import load_file, save_file

from chronomoe.errors import InputError
from chronomoe.models.chronos2 import cast_parameters, use_exact_group_attention
from chronomoe.models.configuration import parse
from chronomoe.models.sparse.config import MoEConfig
from chronomoe.models.sparse.insertion import MoEEnhancedChronos2, MoEEnhancedConfig, MoEInsertionConfig, hash_weights
from chronomoe.models.sparse.upcycling import upcycle
from moe_models import train_by_chance

PLACES = [(0,), (3,), (1, 1), (3, 0, 3), (0, 1, 2, 3)]
NORMALIZED = {"rtol": 1e-4, "atol": 2e-5}  # float32, in the normalised space


@pytest.fixture
def dense(teacher):
    return use_exact_group_attention(copy.deepcopy(teacher))


@pytest.fixture
def grow(teacher):
    """Insert layers that already do something."""

    def make(after=(3, 0, 3), **settings):
        layer = MoEConfig(**{"num_experts": 4, "top_k": 1} | settings)
        return train_by_chance(MoEEnhancedChronos2(teacher, MoEInsertionConfig(after=after, layer=layer)))

    return make


@torch.no_grad()
def forecast(model, batch):
    return model(**batch).normalized_preds


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("after", PLACES)
@pytest.mark.parametrize("settings", [{}, {"top_k": 4}, {"shared_width": 8}, {"gating": "top_k_then_softmax"}])
def test_inserted_layers_are_the_identity_at_first(teacher, dense, batch, after, settings):
    layer = MoEConfig(**{"num_experts": 4, "top_k": 2} | settings)
    grown = MoEEnhancedChronos2(teacher, MoEInsertionConfig(after=after, layer=layer))
    torch.testing.assert_close(forecast(grown, batch), forecast(dense, batch), **NORMALIZED)
    hidden = torch.randn(2, 3, 48)
    assert all(torch.equal(layer(hidden), hidden) for layer in grown.moe_layers.values())


@pytest.mark.parametrize("after", PLACES)
def test_the_forward_pass_equals_upstream_s_around_the_same_layers(grow, batch, after):
    grown = grow(after)
    with torch.no_grad():
        expected = grown(**batch, output_attentions=True)
        output = grown(**batch)
    torch.testing.assert_close(output.normalized_preds, expected.normalized_preds, **NORMALIZED)
    assert len(output.moe) == len(after)


def test_inserted_layers_follow_their_block_in_the_order_of_insertion(grow, dense, context):
    grown = grow((3, 0, 3))
    assert grown.moe_blocks == [0, 3, 3]
    assert list(grown.moe_layers) == [1, 0, 2]
    with torch.no_grad():
        for block, layers in ((0, (1,)), (3, (0, 2))):
            feed_forward, hidden = grown.encoder.block[block].layer[2], torch.randn(2, 3, 48)
            expected = dense.encoder.block[block].layer[2](hidden)
            for number in layers:
                expected = grown.moe_layers[number](expected)
            torch.testing.assert_close(feed_forward(hidden), expected)


def test_only_inserted_layers_learn_and_the_base_keeps_its_bits(teacher, batch):
    grown = MoEEnhancedChronos2(teacher, MoEInsertionConfig(after=(1, 3))).train()
    before, base_hash = weights(grown), hash_weights(teacher.named_parameters())
    optimizer = torch.optim.AdamW(grown.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(8):
        output = grown(**batch)
        losses.append(output.loss.item())
        optimizer.zero_grad()
        (output.loss + 0.01 * output.aux_loss).backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert grown.base_hash() == base_hash
    moved = {name for name, value in grown.state_dict().items() if not torch.equal(value, before[name])}
    learned = {name for name, parameter in grown.named_parameters() if parameter.requires_grad}
    assert moved == learned
    assert learned == {name for name in before if ".inserted." in name and not name.endswith(".bias")}
    assert {name for name, _ in grown.base_parameters()} == {name for name, _ in teacher.named_parameters()}


def test_the_model_inserted_into_is_a_copy(teacher, grow):
    before = weights(teacher)
    grow((0,)).shared.weight.data.zero_()
    assert type(teacher) is Chronos2Model
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("after", PLACES)
def test_a_checkpoint_keeps_every_bit_and_freezes_the_base(grow, batch, tmp_path, after):
    grown = grow(after, shared_width=8)
    grown.save_pretrained(tmp_path)
    loaded, report = MoEEnhancedChronos2.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.state_dict().keys() == grown.state_dict().keys()
    assert all(torch.equal(value, grown.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert loaded.insertion == grown.insertion
    assert loaded.config.base_sha256 == grown.base_hash()
    frozen = {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in loaded.base_parameters()}
    torch.testing.assert_close(forecast(loaded, batch), forecast(grown, batch), **NORMALIZED)


def test_a_layer_added_later_is_the_identity_and_the_others_keep_their_weights(grow, teacher, batch):
    first = grow((2, 0))
    second = first.with_layer(2)
    assert second.insertion.after == (2, 0, 2)
    assert first.insertion.after == (2, 0)
    torch.testing.assert_close(forecast(second, batch), forecast(first, batch), rtol=0, atol=1e-6)
    kept = first.state_dict()
    assert all(torch.equal(second.state_dict()[name], value) for name, value in kept.items())
    assert second.base_hash() == first.base_hash()
    assert all(parameter.requires_grad for parameter in second.moe_layers[2].parameters())
    train_by_chance(second)
    assert all(torch.equal(first.state_dict()[name], value) for name, value in kept.items())


def test_layers_added_one_by_one_are_those_inserted_at_once(teacher):
    at_once = MoEEnhancedChronos2(teacher, MoEInsertionConfig(after=(2, 0, 2)))
    one_by_one = MoEEnhancedChronos2(teacher, MoEInsertionConfig(after=(2,))).with_layer(0).with_layer(2)
    assert at_once.config.to_dict() == one_by_one.config.to_dict()
    assert all(torch.equal(value, one_by_one.state_dict()[name]) for name, value in at_once.state_dict().items())
    routers = [layer.router for layer in at_once.moe_layers.values()]
    assert not torch.equal(routers[0], routers[1])


def test_earlier_layers_stay_frozen_when_another_is_added(grow):
    first = grow((1,))
    first.requires_grad_(False)
    second = first.with_layer(1)
    learns = {name for name, parameter in second.named_parameters() if parameter.requires_grad}
    assert learns
    assert all(".inserted.1." in name for name in learns)


def test_a_base_that_was_changed_is_neither_saved_nor_loaded(grow, tmp_path):
    grown = grow()
    grown.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["shared.weight"] += 1
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="base's weights must stay .* the file was changed, save the model again"):
        MoEEnhancedChronos2.from_pretrained(tmp_path)
    grown.shared.weight.data += 1
    with pytest.raises(InputError, match="base's weights must stay those that layers were inserted into: their sha256"):
        grown.save_pretrained(tmp_path)


def test_half_precision_loads_and_saves_with_the_hash_of_the_rounded_base(grow, batch, tmp_path):
    grown = grow()
    grown.save_pretrained(tmp_path / "float32")
    narrow = MoEEnhancedChronos2.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    assert forecast(narrow, batch).isfinite().all()
    narrow.save_pretrained(tmp_path / "bfloat16")
    config = json.loads((tmp_path / "bfloat16" / "config.json").read_text())
    assert config["base_dtype"] == "bfloat16"
    assert config["base_sha256"] == narrow.base_hash() != grown.base_hash()
    widened = MoEEnhancedChronos2.from_pretrained(tmp_path / "bfloat16", dtype=torch.float32)
    assert widened.base_hash() == narrow.base_hash()
    widened.save_pretrained(tmp_path / "widened")
    assert MoEEnhancedChronos2.from_pretrained(tmp_path / "widened").base_hash() == narrow.base_hash()


def test_a_half_precision_base_gets_layers_of_its_type(dense, batch):
    cast_parameters(dense, torch.bfloat16)
    grown = MoEEnhancedChronos2(dense, MoEInsertionConfig(after=(0,)))
    assert grown.moe_layers[0].wi.dtype == torch.bfloat16
    assert grown.moe_layers[0].router.dtype == torch.float32
    assert torch.equal(forecast(grown, batch), forecast(dense, batch))


def test_the_hash_depends_on_names_shapes_and_every_bit(teacher):
    parameters = dict(teacher.named_parameters())
    same = hash_weights(reversed(parameters.items()))
    assert same == hash_weights(parameters.items())
    value = parameters["shared.weight"].detach().clone()
    flipped = value.clone()
    flipped.view(torch.int32)[0, 0] ^= 1
    others = [
        parameters | {"shared.weight": flipped},
        parameters | {"shared.weight": value.view(-1)},
        {name.replace("shared", "common"): one for name, one in parameters.items()},
    ]
    assert len({same, *(hash_weights(other.items()) for other in others)}) == 4


def test_experts_are_a_quarter_as_wide_as_the_dense_block_unless_told(grow):
    assert grow().moe_layers[0].width == 24
    assert grow(expert_width=7).moe_layers[0].width == 7


def test_costs_count_the_active_experts(grow, teacher):
    grown = grow((0, 0), num_experts=4, top_k=2, expert_width=10, shared_width=6)
    active = 2 * (48 + 4 * 48 + 2 * 2 * 48 * 10 + 2 * 48 * 6)
    dense = sum(parameter.numel() for parameter in teacher.parameters())
    assert grown.active_parameters() == dense + active


def test_padding_is_not_routed(grow, gappy):
    with torch.no_grad():
        layers = grow((0, 1))(gappy, num_output_patches=2).moe
    padding = ~torch.nn.functional.pad(gappy.isfinite(), (12, 0)).view(len(gappy), 7, 16).any(dim=-1)
    for layer in layers:
        assert torch.equal((layer.expert == -1).all(dim=-1)[:, :7], padding)


def test_a_model_from_a_configuration_is_frozen_and_saves_its_own_hash(grow, tmp_path):
    config = MoEEnhancedConfig(**grow().config.to_dict() | {"base_sha256": ""})
    model = MoEEnhancedChronos2(config)
    model.save_pretrained(tmp_path)
    loaded = MoEEnhancedChronos2.from_pretrained(tmp_path)
    assert loaded.base_hash() == loaded.config.base_sha256 == model.base_hash()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"after": ()}, r"after must name at least 1, got \(\)"),
        ({"after": (0, -1)}, r"after\[1\] must be at least 0, got -1"),
        ({"after": (0,), "layer": MoEConfig(noise=0.1)}, "noise changes copies of a dense block.* leave it at 0"),
        ({"after": (0,), "layer": MoEConfig(reinit=0.1)}, "reinit changes copies of a dense block"),
    ],
)
def test_impossible_insertions_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        MoEInsertionConfig(**settings)


def test_settings_survive_json_and_unknown_ones_are_refused():
    config = MoEInsertionConfig(after=(1, 0), layer=MoEConfig(num_experts=6, top_k=3))
    values = json.loads(json.dumps({"after": [1, 0], "layer": {"num_experts": 6, "top_k": 3}}))
    assert parse(values, MoEInsertionConfig, source="x") == config
    with pytest.raises(InputError, match="unknown key 'before' at the top. Available: after, layer"):
        parse({"before": [0]}, MoEInsertionConfig, source="x")


@pytest.mark.parametrize("after", [(4,), (0, 7)])
def test_blocks_that_are_not_there_are_refused(teacher, grow, after):
    with pytest.raises(InputError, match="layers can follow the encoder blocks 0 to 3, the model's own, got"):
        MoEEnhancedChronos2(teacher, MoEInsertionConfig(after=after))
    with pytest.raises(InputError, match=r"layers can follow the encoder blocks 0 to 3, the model's own, got \[4\]"):
        grow().with_layer(4)


def test_bases_that_are_not_dense_are_refused(teacher, grow, make_mixture, unchecked):
    insertion = MoEInsertionConfig(after=(0,))
    for model in (grow(), upcycle(teacher, MoEConfig())):
        with pytest.raises(InputError, match="inserting MoE layers needs a dense .* or use with_layer"):
            MoEEnhancedChronos2(model, insertion)
    with pytest.raises(InputError, match="inserting MoE layers needs a dense Chronos-2 model, got a DistilledMoE"):
        MoEEnhancedChronos2(make_mixture(), insertion)
