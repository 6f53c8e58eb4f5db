import copy

import pytest
import torch
from chronos.chronos2 import Chronos2Model

from chronomoe.errors import InputError
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.models.student import PRESETS, StudentConfig, create_student_model, kept_layers


@pytest.fixture
def large(make_teacher):
    """The published model's proportions, every width an eighth."""
    patches = {"input_patch_size": 2, "input_patch_stride": 2, "output_patch_size": 2}
    levels = {"quantiles": [level / 22 for level in range(1, 22)]}
    return make_teacher(
        d_model=96, d_kv=8, d_ff=384, num_layers=12, num_heads=12, forecasting={"context_length": 64} | patches | levels
    )


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def forecast(model, context):
    with torch.no_grad():
        return model.eval()(context, num_output_patches=2).quantile_preds


def test_a_student_that_keeps_everything_equals_its_teacher(teacher, gappy):
    student = create_student_model(teacher, StudentConfig())
    torch.testing.assert_close(forecast(student, gappy), forecast(teacher, gappy), rtol=1e-3, atol=1e-3)
    for name, weight in teacher.state_dict().items():
        assert torch.equal(student.state_dict()[name], weight), name


def test_depth_pruning_copies_evenly_spaced_layers_with_the_first_and_the_last(teacher):
    student = create_student_model(teacher, StudentConfig(num_layers=3))
    for own, source in zip(student.encoder.block, (0, 2, 3), strict=True):
        for name, weight in teacher.encoder.block[source].state_dict().items():
            assert torch.equal(own.state_dict()[name], weight), (source, name)
    for name in ("shared", "input_patch_embedding", "output_patch_embedding", "encoder.final_layer_norm"):
        for key, weight in teacher.get_submodule(name).state_dict().items():
            assert torch.equal(student.get_submodule(name).state_dict()[key], weight), (name, key)


@pytest.mark.parametrize("total", [2, 3, 6, 12])
def test_the_first_and_the_last_layer_are_always_kept(total):
    for kept in range(2, total + 1):
        layers = kept_layers(total, kept)
        assert layers[0] == 0
        assert layers[-1] == total - 1
        assert len(set(layers)) == kept
        gaps = torch.tensor(layers).diff()
        assert gaps.max() - gaps.min() <= 1


def test_kept_layers_by_hand():
    assert kept_layers(12, 1) == [0]
    assert kept_layers(12, 2) == [0, 11]
    assert kept_layers(12, 4) == [0, 4, 7, 11]
    assert kept_layers(5, 3) == [0, 2, 4]


def test_the_heads_kept_are_the_largest(teacher):
    chosen, d_kv = (1, 3), teacher.config.d_kv
    units = torch.cat([torch.arange(head * d_kv, (head + 1) * d_kv) for head in chosen])
    layers = [layer.self_attention for block in teacher.encoder.block for layer in block.layer[:2]]
    with torch.no_grad():
        for attention in layers:
            for module in (attention.q, attention.k, attention.v):
                module.weight[units] *= 3
    student = create_student_model(teacher, StudentConfig(num_heads=2))
    own = [layer.self_attention for block in student.encoder.block for layer in block.layer[:2]]
    for kept, full in zip(own, layers, strict=True):
        for name in ("q", "k", "v"):
            assert torch.equal(getattr(kept, name).weight, getattr(full, name).weight[units]), name
        assert torch.equal(kept.o.weight, full.o.weight[:, units])


def test_the_feed_forward_units_kept_are_the_largest(teacher):
    units = torch.arange(5, 96, 3)
    with torch.no_grad():
        for block in teacher.encoder.block:
            block.layer[2].mlp.wi.weight[units] *= 10
        for embedding in (teacher.input_patch_embedding, teacher.output_patch_embedding):
            embedding.output_layer.weight[:, units] *= 10
    student = create_student_model(teacher, StudentConfig(d_ff=len(units)))
    for own, block in zip(student.encoder.block, teacher.encoder.block, strict=True):
        assert torch.equal(own.layer[2].mlp.wi.weight, block.layer[2].mlp.wi.weight[units])
        assert torch.equal(own.layer[2].mlp.wo.weight, block.layer[2].mlp.wo.weight[:, units])
    for name in ("input_patch_embedding", "output_patch_embedding"):
        own, full = getattr(student, name), getattr(teacher, name)
        assert torch.equal(own.hidden_layer.weight, full.hidden_layer.weight[units])
        assert torch.equal(own.hidden_layer.bias, full.hidden_layer.bias[units])
        assert torch.equal(own.output_layer.weight, full.output_layer.weight[:, units])
        assert torch.equal(own.output_layer.bias, full.output_layer.bias)


def test_heads_and_units_without_effect_are_pruned_without_effect(teacher, gappy):
    with torch.no_grad():
        for block in teacher.encoder.block:
            for layer in block.layer[:2]:
                layer.self_attention.o.weight[:, 16:32] = 0
                layer.self_attention.q.weight[16:32] = 0
            block.layer[2].mlp.wo.weight[:, ::2] = 0
        for embedding in (teacher.input_patch_embedding, teacher.output_patch_embedding):
            embedding.output_layer.weight[:, ::2] = 0
    student = create_student_model(teacher, StudentConfig(num_heads=3, d_ff=48))
    torch.testing.assert_close(forecast(student, gappy), forecast(teacher, gappy), rtol=1e-3, atol=1e-3)


def test_the_channels_kept_are_the_largest_and_the_same_ones_everywhere(teacher, gappy):
    channels = torch.arange(1, 48, 2)
    with torch.no_grad():
        teacher.shared.weight[:, channels] *= 30
        teacher.input_patch_embedding.output_layer.weight[channels] *= 30
        teacher.output_patch_embedding.hidden_layer.weight[:, channels] *= 30
        for block in teacher.encoder.block:
            block.layer[2].mlp.wo.weight[channels] *= 30
    student = create_student_model(teacher, StudentConfig(d_model=24))
    assert torch.equal(student.shared.weight, teacher.shared.weight[:, channels])
    for own, full in (
        (student.input_patch_embedding.output_layer, teacher.input_patch_embedding.output_layer),
        (student.input_patch_embedding.residual_layer, teacher.input_patch_embedding.residual_layer),
    ):
        assert torch.equal(own.weight, full.weight[channels])
        assert torch.equal(own.bias, full.bias[channels])
    for own, block in zip(student.encoder.block, teacher.encoder.block, strict=True):
        for kept, layer in zip(own.layer, block.layer, strict=True):
            assert torch.equal(kept.layer_norm.weight, layer.layer_norm.weight[channels])
        for kept, layer in zip(own.layer[:2], block.layer[:2], strict=True):
            assert torch.equal(kept.self_attention.q.weight, layer.self_attention.q.weight[:, channels])
            assert torch.equal(kept.self_attention.o.weight, layer.self_attention.o.weight[channels])
    assert forecast(student, gappy).isfinite().all()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_50_to_98_percent_fewer_parameters_than_a_twelve_layer_teacher(large, preset):
    student = create_student_model(large, StudentConfig.preset(preset, large))
    assert 0.50 <= 1 - parameters(student) / parameters(large) <= 0.98


def test_a_student_can_have_98_percent_fewer_parameters(large, context):
    size = StudentConfig(num_layers=1, d_model=large.config.d_model // 2, num_heads=2, d_ff=large.config.d_ff // 8)
    student = create_student_model(large, size).eval()
    assert 1 - parameters(student) / parameters(large) >= 0.98
    assert forecast(student, context).isfinite().all()


def test_a_student_keeps_groups_covariates_levels_and_limits(teacher, make_context):
    student = create_student_model(teacher, StudentConfig(num_layers=2, d_model=32, num_heads=2, d_ff=40)).eval()
    assert student.config.chronos_config == teacher.config.chronos_config
    context, covariates = make_context(batch=4), make_context(batch=4, length=64, seed=3)
    covariates[::2] = torch.nan
    batch = {"context": context, "group_ids": torch.tensor([0, 0, 1, 1]), "num_output_patches": 4}
    with torch.no_grad():
        plain = student(**batch).normalized_preds
        informed = student(**batch, future_covariates=covariates).normalized_preds
    assert plain.shape == (4, 9, 64)
    assert ((informed - plain).abs().amax(dim=(1, 2)) > 1e-3).all()  # targets follow their group's covariate


def test_a_student_of_a_narrow_teacher_cannot_be_larger(teacher):
    for name, most in (("num_layers", 4), ("d_model", 48), ("num_heads", 4), ("d_ff", 96)):
        with pytest.raises(InputError, match=f"{name} must be at most the teacher's {most}, got {most + 1}"):
            create_student_model(teacher, StudentConfig(**{name: most + 1}))


def test_random_students_follow_the_generator(teacher):
    config = StudentConfig(num_layers=1, init="random")
    one, same, other = (
        create_student_model(teacher, config, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    for name, weight in one.state_dict().items():
        assert torch.equal(same.state_dict()[name], weight), name
    assert not torch.equal(one.shared.weight, other.shared.weight)
    assert not torch.equal(one.shared.weight, teacher.shared.weight)


def test_random_students_without_a_generator_differ(teacher):
    config = StudentConfig(num_layers=1, init="random")
    one, other = create_student_model(teacher, config), create_student_model(teacher, config)
    assert not torch.equal(one.shared.weight, other.shared.weight)


def test_copying_a_teacher_draws_nothing_from_the_global_generator(teacher):
    before = torch.get_rng_state()
    create_student_model(teacher, StudentConfig(num_layers=2))
    create_student_model(teacher, StudentConfig(init="random"), generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_teacher_is_not_changed(teacher):
    weights, config = copy.deepcopy(teacher.state_dict()), copy.deepcopy(teacher.config.to_dict())
    student = create_student_model(teacher, StudentConfig(num_layers=2, d_model=32, num_heads=2, d_ff=40))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert type(teacher) is Chronos2Model
    assert isinstance(student, ExactChronos2Model)
    assert teacher.config.to_dict() == config
    for name, weight in weights.items():
        assert torch.equal(teacher.state_dict()[name], weight), name


def test_a_half_precision_student_keeps_its_rotary_frequencies(teacher):
    student = create_student_model(teacher.to(torch.bfloat16), StudentConfig(num_layers=1))
    assert student.dtype == torch.bfloat16
    frequencies = student.encoder.block[0].layer[0].self_attention.rope_embed.inv_freq
    torch.testing.assert_close(frequencies, 10000.0 ** (-torch.arange(0, 16, 2) / 16), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["shallow", "narrow", "random"])
def test_students_load_in_stock_pipelines_without_this_package(stock_forecasts, name):
    own, stock = stock_forecasts[name]
    for forecast in stock:
        torch.testing.assert_close(forecast, own, rtol=1e-3, atol=1e-3)


def test_impossible_sizes_are_refused(unchecked):
    with pytest.raises(InputError, match="num_layers must be at least 1, got 0"):
        StudentConfig(num_layers=0)
    with pytest.raises(InputError, match="init must be 'teacher' or 'random', got 'zeros'"):
        StudentConfig(init="zeros")


def test_an_unknown_preset_is_refused_with_the_nearest_name(teacher):
    with pytest.raises(InputError, match=r"'smal'\. Available: half, small, slim\. Did you mean 'small'\?"):
        StudentConfig.preset("smal", teacher)
