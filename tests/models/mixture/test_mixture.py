import copy
from inspect import signature

import pytest
import torch
from chronos.chronos2 import Chronos2Model
from chronos.chronos2.model import Chronos2Output

from chronomoe.models.chronos2 import use_exact_group_attention
from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.training.finetuning import extend
from conftest import EXPERTS

TOP_K = [1, 2, len(EXPERTS)]
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}  # float32, in the normalised space


@pytest.fixture
def expert(make_teacher):
    return use_exact_group_attention(make_teacher(seed=9, num_layers=2))


def assert_same_forecast(output, expected):
    assert expected.normalized_preds.std() > 0.1
    torch.testing.assert_close(output.normalized_preds, expected.normalized_preds, **TOLERANCE)
    torch.testing.assert_close(output.quantile_preds, expected.quantile_preds, rtol=1e-3, atol=1e-3)
    if expected.loss is not None:
        torch.testing.assert_close(output.loss, expected.loss, rtol=1e-4, atol=1e-5)


def rows_seen(mixture):
    """Count the rows that each call of each expert gets."""
    seen = [[] for _ in mixture.experts]
    for calls, expert in zip(seen, mixture.experts, strict=True):
        expert.register_forward_hook(lambda module, args, output, calls=calls: calls.append(len(args[0])))
    return seen


def test_a_mixture_of_one_is_its_expert(make_mixture, expert, batch):
    mixture = make_mixture(members={"only": expert}, routing={"top_k": 1})
    assert_same_forecast(mixture(**batch), expert(**batch))


def test_a_mixture_of_one_is_its_expert_under_masks(make_mixture, expert, batch):
    mixture = make_mixture(members={"only": expert}, routing={"top_k": 1})
    generator = torch.Generator().manual_seed(0)
    masks = {
        "context": batch["context"].nan_to_num(5.0),
        "context_mask": torch.rand(batch["context"].shape, generator=generator) > 0.3,
        "future_covariates": batch["future_covariates"].nan_to_num(0.0),
        "future_covariates_mask": batch["future_covariates"].isfinite().float(),
        "future_target_mask": torch.rand(batch["future_target"].shape, generator=generator) > 0.3,
    }
    assert_same_forecast(mixture(**batch | masks), expert(**batch | masks))


def test_a_mixture_is_called_as_upstream_s_model_and_returns_the_routing_too(make_mixture, batch):
    upstream = list(signature(Chronos2Model.forward).parameters)
    assert list(signature(DistilledMoE.forward).parameters)[: len(upstream)] == upstream
    output = make_mixture()(**batch)
    assert isinstance(output, Chronos2Output)
    assert output.routing.expert.shape == (8, 2)
    assert output.aux_loss.shape == ()


@pytest.mark.parametrize("top_k", TOP_K)
def test_a_mixture_of_identical_experts_is_that_expert(make_mixture, expert, batch, top_k):
    mixture = make_mixture(members={name: copy.deepcopy(expert) for name in EXPERTS}, routing={"top_k": top_k})
    output = mixture(**batch)
    assert len(output.routing.expert.unique()) > 1
    assert_same_forecast(output, expert(**batch))


@pytest.mark.parametrize("top_k", TOP_K)
def test_a_forecast_equals_the_slow_loop_over_rows(make_mixture, gappy, top_k):
    mixture = make_mixture(routing={"top_k": top_k})
    output = mixture(gappy, num_output_patches=2)
    assert len(output.routing.expert[:, 0].unique()) > 1
    for row in range(len(gappy)):
        expected = torch.zeros(9, 32)
        for index, gate in zip(output.routing.expert[row], output.routing.gate[row], strict=True):
            own = mixture.experts[index](gappy[row : row + 1], num_output_patches=2)
            expected += gate * own.normalized_preds[0]
        torch.testing.assert_close(output.normalized_preds[row], expected, **TOLERANCE)
        loc, scale = (part[row] for part in output.loc_scale)
        torch.testing.assert_close(output.quantile_preds[row], expected.sinh() * scale + loc, rtol=1e-3, atol=1e-3)


def test_the_loss_is_upstream_s_on_the_mixed_quantiles(make_mixture, batch):
    mixture = make_mixture()
    output = mixture(**batch)
    target = (batch["future_target"] - output.loc_scale[0]) / output.loc_scale[1]
    gap = target.arcsinh()[:, None] - output.normalized_preds
    levels = torch.linspace(0.1, 0.9, 9)[:, None]
    pinball = 2 * torch.maximum(levels * gap, (levels - 1) * gap)
    counted = batch["future_covariates"].isnan()[:, None]
    torch.testing.assert_close(output.loss, (pinball * counted).mean(dim=2).sum(dim=1).mean(), rtol=1e-4, atol=1e-5)


def test_rows_of_a_group_are_never_split(make_mixture, batch):
    mixture = make_mixture(routing={"top_k": 2})
    routing = mixture(**batch).routing
    for group in batch["group_ids"].unique():
        rows = batch["group_ids"] == group
        for part in routing:
            assert (part[rows] == part[rows][:1]).all()
    alone = mixture.route(batch["context"])
    assert not torch.equal(alone.expert, routing.expert)  # the rows would not have gone together


@pytest.mark.parametrize("top_k", TOP_K)
def test_series_of_one_group_are_routed_apart_and_learn_from_those_with_the_same_expert(make_mixture, batch, top_k):
    """The slow way: route each series alone, then give each expert the rows that chose it as one group."""
    mixture = make_mixture(routing={"top_k": top_k})
    series = batch.pop("group_ids")
    del batch["future_target"]
    output = mixture(**batch, group_ids=torch.zeros(8, dtype=torch.long), route_ids=series)
    expected = torch.zeros_like(output.normalized_preds)
    for place, expert in enumerate(mixture.experts):
        gates = torch.zeros(8)
        for name in series.unique():
            alone = mixture.route(batch["context"][series == name], group_ids=series[series == name])
            gates[series == name] = (alone.gate * (alone.expert == place)).sum(dim=1)
        row = torch.where(gates > 0)[0]
        if len(row):
            part = expert(
                batch["context"][row],
                group_ids=torch.zeros(len(row), dtype=torch.long),
                future_covariates=batch["future_covariates"][row],
                num_output_patches=2,
            )
            expected[row] += gates[row, None, None] * part.normalized_preds
    assert len(output.routing.expert[:, 0].unique()) > 1
    torch.testing.assert_close(output.normalized_preds, expected, rtol=1e-4, atol=1e-4)


def test_a_group_of_one_series_is_routed_the_same_with_and_without_route_ids(make_mixture, batch):
    mixture = make_mixture()
    plain, named = mixture(**batch), mixture(**batch, route_ids=batch["group_ids"])
    assert torch.equal(plain.normalized_preds, named.normalized_preds)


@pytest.mark.parametrize("top_k", TOP_K)
def test_float64_as_default_type_changes_no_number(make_mixture, batch, top_k):
    mixture = make_mixture(routing={"top_k": top_k})
    expected = mixture(**batch)
    torch.set_default_dtype(torch.float64)
    try:
        output = mixture(**batch)
        encoded = mixture.encode(batch["context"])[0][0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert output.quantile_preds.dtype == encoded.dtype == torch.float32
    torch.testing.assert_close(output.quantile_preds, expected.quantile_preds)


def test_a_larger_context_limit_does_not_move_the_router(make_mixture, gappy):
    mixture = make_mixture()
    longer = extend(copy.deepcopy(mixture), context_length=4 * gappy.shape[1], horizon=16)
    assert longer.chronos_config.context_length > mixture.chronos_config.context_length
    assert torch.equal(longer.router_inputs(gappy), mixture.router_inputs(gappy))


@pytest.mark.parametrize("feature_length", [64, 512])
def test_features_describe_no_more_steps_than_experts_read(make_mixture, feature_length):
    mixture = make_mixture(router={"feature_length": feature_length})
    assert mixture.moe.router.feature_length == min(feature_length, mixture.chronos_config.context_length)


def test_the_variates_of_a_group_are_forecast_together(make_mixture, batch):
    mixture = make_mixture()
    apart = batch | {"group_ids": torch.arange(8)}
    assert (mixture(**batch).normalized_preds - mixture(**apart).normalized_preds).abs().max() > 0.1


@pytest.mark.parametrize("use_patch_embedding", [False, True])
def test_routing_ignores_the_rest_of_the_batch(make_mixture, gappy, use_patch_embedding):
    mixture = make_mixture(router={"use_patch_embedding": use_patch_embedding})
    together = mixture.route(gappy)
    for row in range(len(gappy)):
        alone = mixture.route(gappy[row : row + 1])
        torch.testing.assert_close(alone.prob[0], together.prob[row], **TOLERANCE)
        assert torch.equal(alone.expert[0], together.expert[row])


def test_values_hidden_by_the_context_mask_do_not_reach_the_router(make_mixture, gappy):
    mixture = make_mixture()
    hidden = mixture(gappy.nan_to_num(77.0), context_mask=gappy.isfinite()).routing
    assert all(torch.equal(*pair) for pair in zip(hidden, mixture(gappy).routing, strict=True))


@pytest.mark.parametrize("use_patch_embedding", [False, True])
@pytest.mark.parametrize(("scale", "shift"), [(1e4, 0.0), (1.0, 50.0), (0.01, -3.0)])
def test_routing_and_forecast_follow_shift_and_scale(make_mixture, gappy, use_patch_embedding, scale, shift):
    mixture = make_mixture(router={"use_patch_embedding": use_patch_embedding})
    spread = gappy.nan_to_num().std(dim=1, keepdim=True) + 1
    moved = scale * (gappy + shift * spread)
    before, after = mixture(gappy, num_output_patches=2), mixture(moved, num_output_patches=2)
    assert torch.equal(after.routing.expert, before.routing.expert)
    torch.testing.assert_close(after.routing.prob, before.routing.prob, rtol=1e-2, atol=1e-3)
    seen = gappy.isfinite().any(dim=1)
    expected = scale * (before.quantile_preds + shift * spread[..., None])
    tolerance = 1e-2 * scale * spread.max().item()
    torch.testing.assert_close(after.quantile_preds[seen], expected[seen], rtol=1e-3, atol=tolerance)


def test_a_router_with_the_patch_embedding_reads_the_first_expert_s_pooled_patches(make_mixture, gappy):
    mixture, plain = make_mixture(router={"use_patch_embedding": True}), make_mixture()
    read, features = mixture.router_inputs(gappy), plain.router_inputs(gappy)
    assert read.shape[1] == features.shape[1] + 48
    torch.testing.assert_close(read[:, :-48], features)
    patches, observed, _ = mixture.experts[0]._prepare_patched_context(gappy)
    tokens = mixture.experts[0].input_patch_embedding(patches)
    torch.testing.assert_close(read[0, -48:], tokens[0, observed[0]].mean(dim=0), **TOLERANCE)
    assert read[5, -48:].abs().max() == 0  # never observed
    assert mixture(gappy).quantile_preds.isfinite().all()


@pytest.mark.parametrize("top_k", TOP_K)
@pytest.mark.parametrize("threshold", [None, 0.6])
def test_only_chosen_experts_run_once_on_just_their_rows(make_mixture, gappy, top_k, threshold):
    mixture = make_mixture(routing={"top_k": top_k, "threshold": threshold})
    seen = rows_seen(mixture)
    routing = mixture(gappy).routing
    chosen = [int(((routing.expert == index) & (routing.gate > 0)).sum()) for index in range(len(EXPERTS))]
    assert seen == [[rows] if rows else [] for rows in chosen]
    assert len(EXPERTS) - seen.count([]) >= top_k if threshold is None else any(seen)


def test_an_expert_that_no_row_chose_does_not_run(make_mixture, gappy):
    mixture = make_mixture(routing={"top_k": 2})
    seen = rows_seen(mixture)
    mixture(gappy[:1])
    assert sorted(seen) == [[], [], [1], [1]]


def test_an_unsure_mixture_is_its_generalist(make_mixture, experts, gappy):
    mixture = make_mixture(routing={"fallback": "generalist", "fallback_below": 1.0})
    seen = rows_seen(mixture)
    assert mixture.generalist == 2
    assert_same_forecast(mixture(gappy, num_output_patches=2), experts["generalist"](gappy, num_output_patches=2))
    assert seen == [[], [], [len(gappy)], []]


def test_encoding_is_the_gated_average_of_tokens(make_mixture, gappy):
    mixture = make_mixture(routing={"top_k": 2})
    encoded, loc_scale, _, patches = mixture.encode(gappy, num_output_patches=2)
    routing = mixture.route(gappy)
    assert patches == 7
    torch.testing.assert_close(loc_scale, mixture(gappy).loc_scale)
    for row, (first, second) in enumerate(routing.expert):
        states = [
            mixture.experts[index].encode(gappy[row : row + 1], num_output_patches=2)[0] for index in (first, second)
        ]
        expected = sum(gate * state[0][0] for gate, state in zip(routing.gate[row], states, strict=True))
        torch.testing.assert_close(encoded[0][row], expected, **TOLERANCE)
