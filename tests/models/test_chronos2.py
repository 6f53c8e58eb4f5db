import copy

import pytest
import torch
from chronos.chronos2 import Chronos2Model
from einops import rearrange

from chronomoe.models.attention import plan_groups
from chronomoe.models.chronos2 import ExactChronos2Model, use_exact_group_attention

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}  # float32, in the normalised space


@pytest.fixture
def exact(teacher):
    return use_exact_group_attention(copy.deepcopy(teacher))


@pytest.fixture
def grouped(make_context):
    """Eight rows and ids that are neither sorted nor of equal size: groups of 3, 2, 2 and 1."""
    context = make_context(batch=8, seed=1)
    context[1, :50] = torch.nan
    context[4, 30:70] = torch.nan
    return context, torch.tensor([7, 2, 7, 0, 2, 5, 7, 0])


def normalized(stock, **inputs):
    """Forecast with upstream's code, before it is unscaled."""
    seen = []
    hook = stock.output_patch_embedding.register_forward_hook(lambda module, args, output: seen.append(output))
    output = stock(**inputs)
    hook.remove()
    return rearrange(seen[0], "b n (q p) -> b q (n p)", q=stock.num_quantiles), output


def assert_equal_to_upstream(exact, stock, **inputs):
    with torch.no_grad():
        expected, stock_output = normalized(stock, **inputs)
        output = exact(**inputs)
    assert type(stock) is Chronos2Model
    assert expected.std() > 0.1  # the comparison means something
    torch.testing.assert_close(output.normalized_preds, expected, **TOLERANCE)
    torch.testing.assert_close(output.quantile_preds, stock_output.quantile_preds, rtol=1e-3, atol=1e-3)
    if "future_target" in inputs:
        assert stock_output.loss > 0.1
        torch.testing.assert_close(output.loss, stock_output.loss, rtol=1e-5, atol=1e-6)


def test_univariate_forecasts_equal_upstream(exact, teacher, context):
    assert_equal_to_upstream(exact, teacher, context=context, num_output_patches=2)


def test_nan_padded_forecasts_equal_upstream(exact, teacher, gappy):
    assert_equal_to_upstream(exact, teacher, context=gappy, num_output_patches=3)


def test_forecasts_equal_upstream_where_whole_leading_patches_are_missing(exact, teacher, context):
    context[:, :50] = torch.nan
    context[1, :75] = torch.nan
    assert_equal_to_upstream(exact, teacher, context=context, num_output_patches=2)


def test_a_batch_without_any_value_equals_upstream(exact, teacher, context):
    assert_equal_to_upstream(exact, teacher, context=torch.full_like(context, torch.nan), num_output_patches=2)


@pytest.mark.parametrize("length", [5, 16, 128, 300])
def test_contexts_of_any_length_equal_upstream(exact, teacher, make_context, length):
    assert_equal_to_upstream(exact, teacher, context=make_context(length=length), num_output_patches=1)


def test_mixed_and_interleaved_groups_equal_upstream(exact, teacher, grouped):
    context, group_ids = grouped
    assert_equal_to_upstream(exact, teacher, context=context, group_ids=group_ids, num_output_patches=2)


def test_one_group_of_everything_equals_upstream(exact, teacher, gappy):
    group_ids = torch.zeros(len(gappy), dtype=torch.long)
    assert_equal_to_upstream(exact, teacher, context=gappy, group_ids=group_ids, num_output_patches=2)


def test_groups_of_equal_size_equal_upstream(exact, teacher, context):
    assert_equal_to_upstream(exact, teacher, context=context, group_ids=torch.tensor([0, 1, 2, 0, 1, 2]))


def test_a_group_with_a_row_never_observed_equals_upstream(exact, teacher, gappy):
    group_ids = torch.tensor([0, 0, 1, 1, 2, 2])  # the last row has no value
    assert_equal_to_upstream(exact, teacher, context=gappy, group_ids=group_ids, num_output_patches=2)


def test_groups_matter(exact, context):
    group_ids = torch.zeros(len(context), dtype=torch.long)
    together, apart = exact(context, group_ids=group_ids), exact(context)
    assert (together.normalized_preds - apart.normalized_preds).abs().max() > 0.1


def test_known_covariates_and_the_loss_equal_upstream(exact, teacher, grouped, make_context):
    context, group_ids = grouped
    future = make_context(batch=8, length=27, seed=2)
    covariates = torch.where(torch.tensor([1, 0, 0, 1, 0, 0, 0, 0]).bool()[:, None], future, torch.nan)
    future[6, 3:9] = torch.nan
    batch = {"context": context, "group_ids": group_ids, "future_covariates": covariates, "future_target": future}
    assert_equal_to_upstream(exact, teacher, **batch, num_output_patches=2)


def test_given_masks_equal_upstream(exact, teacher, grouped, make_context):
    context, group_ids = grouped
    context = context.nan_to_num(1.0)
    mask = torch.rand(context.shape, generator=torch.Generator().manual_seed(0)) > 0.3
    mask[0, :40] = False
    future = make_context(batch=8, length=32, seed=2)
    future_mask = torch.arange(8)[:, None].expand(-1, 32) % 3 == 0
    assert_equal_to_upstream(
        exact,
        teacher,
        context=context,
        context_mask=mask,
        group_ids=group_ids,
        future_covariates=future,
        future_covariates_mask=future_mask.float(),
        future_target=future,
        future_target_mask=~future_mask,
        num_output_patches=2,
    )


def test_gradients_equal_upstream(exact, teacher, grouped, make_context):
    context, group_ids = grouped
    batch = {"context": context, "group_ids": group_ids, "future_target": make_context(batch=8, length=32, seed=2)}
    for model in (exact, teacher):
        model(**batch, num_output_patches=2).loss.backward()
    expected = dict(teacher.named_parameters())
    for name, parameter in exact.named_parameters():
        assert expected[name].grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-4, msg=name)


def test_encoded_tokens_of_observed_patches_equal_upstream(exact, teacher, gappy):
    with torch.no_grad():
        expected, (loc, scale), known, patches = teacher.encode(gappy, num_output_patches=2)
        encoded, loc_scale, own_known, own_patches = exact.encode(gappy, num_output_patches=2)
    assert own_patches == patches == 7
    observed = gappy.isfinite()
    observed = torch.nn.functional.pad(observed, (12, 0)).view(len(gappy), patches, 16).any(dim=-1)
    observed = torch.nn.functional.pad(observed, (0, 3), value=True)  # the register and the future
    assert 0 < (~observed).sum() < observed.numel()
    torch.testing.assert_close(encoded[0][observed], expected[0][observed], **TOLERANCE)
    torch.testing.assert_close(loc_scale, (loc, scale))
    torch.testing.assert_close(own_known, known)


def test_hidden_states_are_the_tokens_after_each_block(exact, teacher, context):
    seen = []
    for block in teacher.encoder.block:
        block.register_forward_hook(lambda module, args, output: seen.append(output.hidden_states))
    with torch.no_grad():
        expected = normalized(teacher, context=context, num_output_patches=2)[0]
        output = exact(context, num_output_patches=2, output_hidden_states=True)
    torch.testing.assert_close(output.hidden_states, tuple(seen), **TOLERANCE)
    torch.testing.assert_close(output.normalized_preds, expected, **TOLERANCE)


def test_attention_weights_are_upstream_s(exact, teacher, grouped):
    context, group_ids = grouped
    with torch.no_grad():
        expected = teacher(context, group_ids=group_ids, num_output_patches=2, output_attentions=True)
        output = exact(context, group_ids=group_ids, num_output_patches=2, output_attentions=True)
        plain = exact(context, group_ids=group_ids, num_output_patches=2)
    assert len(output.enc_time_self_attn_weights) == teacher.config.num_layers
    torch.testing.assert_close(output.enc_time_self_attn_weights, expected.enc_time_self_attn_weights)
    torch.testing.assert_close(output.enc_group_self_attn_weights, expected.enc_group_self_attn_weights)
    torch.testing.assert_close(output.quantile_preds, plain.quantile_preds, rtol=1e-3, atol=1e-3)


def test_normalized_quantiles_unscale_to_the_forecast(exact, context):
    output = exact(context, num_output_patches=2)
    loc, scale = (part[:, None] for part in output.loc_scale)
    torch.testing.assert_close(output.normalized_preds.sinh() * scale + loc, output.quantile_preds)


def test_parameters_are_kept_in_place(teacher):
    before = {name: parameter.data_ptr() for name, parameter in teacher.named_parameters()}
    exact = use_exact_group_attention(teacher)
    assert exact is teacher
    assert isinstance(exact, ExactChronos2Model)
    assert {name: parameter.data_ptr() for name, parameter in exact.named_parameters()} == before
    assert use_exact_group_attention(exact) is exact


def test_a_saved_checkpoint_loads_in_stock_pipelines_without_this_package(stock_forecasts):
    own, stock = stock_forecasts["exact"]
    for forecast in stock:
        torch.testing.assert_close(forecast, own, rtol=1e-3, atol=1e-3)


def test_rows_are_planned_by_the_size_of_their_group():
    plan = plan_groups(torch.tensor([7, 2, 7, 0, 2, 5, 7, 0]))
    assert plan.alone.tolist() == [5]
    assert [rows.tolist() for rows in plan.together] == [[[3, 7], [1, 4]], [[0, 2, 6]]]


def test_another_model_is_refused_by_name():
    class Other(Chronos2Model):
        def __init__(self):
            torch.nn.Module.__init__(self)

    with pytest.raises(TypeError, match="exact group attention needs a Chronos2Model, got Other"):
        use_exact_group_attention(Other())


def test_a_forecast_longer_than_asked_is_refused_as_upstream_does(exact, context):
    with pytest.raises(ValueError, match="must be large enough to accommodate the length of future_target"):
        exact(context, future_target=torch.zeros(len(context), 17), num_output_patches=1)
