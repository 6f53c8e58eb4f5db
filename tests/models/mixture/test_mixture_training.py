import copy
import itertools
import json

import pytest
import torch

from chronomoe.errors import InputError
from chronomoe.models.balancing import BalanceConfig, load_balancing_loss, z_loss
from chronomoe.models.mixture.features import series_features
from chronomoe.models.mixture.mixture import DistilledMoE, MixtureConfig, build_mixture
from chronomoe.models.mixture.router import RoutingConfig
from chronomoe.models.student import StudentConfig, create_student_model
from conftest import EXPERTS

TOP_K = [1, 2, len(EXPERTS)]


@pytest.mark.parametrize("top_k", TOP_K)
def test_saving_and_loading_keeps_the_numbers(make_mixture, batch, tmp_path, top_k):
    routing = {"top_k": top_k, "threshold": 0.9, "fallback": "equal", "fallback_below": 0.3, "temperature": 2.0}
    mixture = make_mixture(routing=routing, router={"use_patch_embedding": True, "hidden_sizes": (8, 4)})
    mixture.router.standardize_on(mixture.router_inputs(batch["context"]))
    mixture.balance_bias.bias.copy_(torch.arange(4.0))
    mixture.save_pretrained(tmp_path)
    loaded = DistilledMoE.from_pretrained(tmp_path)
    assert loaded.moe == mixture.moe
    assert loaded.config.expert_names == list(EXPERTS)
    assert {name: weight.tolist() for name, weight in loaded.state_dict().items()} == {
        name: weight.tolist() for name, weight in mixture.state_dict().items()
    }
    output, expected = loaded(**batch), mixture(**batch)
    for part in ("loss", "quantile_preds", "normalized_preds", "aux_loss"):
        assert torch.equal(output[part], expected[part]), part
    assert all(torch.equal(*pair) for pair in zip(output.routing, expected.routing, strict=True))


def test_a_checkpoint_without_a_feature_length_keeps_that_of_its_context_limit(make_mixture, gappy, tmp_path):
    mixture = make_mixture()
    mixture.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    del values["moe"]["router"]["feature_length"]
    for core in values["experts"]:
        core["chronos_config"]["context_length"] = 160
    file.write_text(json.dumps(values))
    loaded = DistilledMoE.from_pretrained(tmp_path)
    assert loaded.moe.router.feature_length == loaded.config.moe["router"]["feature_length"] == 160
    assert torch.equal(loaded.router_inputs(gappy), series_features(gappy, max_length=160))


def test_a_half_precision_mixture_keeps_its_numbers(experts, gappy, tmp_path):
    half = {name: create_student_model(expert.to(torch.bfloat16), StudentConfig()) for name, expert in experts.items()}
    mixture = build_mixture(half, MixtureConfig()).eval()
    mixture.save_pretrained(tmp_path)
    loaded = DistilledMoE.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded(gappy).normalized_preds, mixture(gappy).normalized_preds)


def test_the_gradient_reaches_the_router_and_the_chosen_experts(make_mixture, batch):
    mixture = make_mixture(routing={"top_k": 2})
    output = mixture(**batch)
    output.loss.backward()
    for name, parameter in mixture.router.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    used = set(output.routing.expert.flatten().tolist())
    for index, expert in enumerate(mixture.experts):
        reached = [parameter.grad is not None for parameter in expert.parameters()]
        assert all(reached) if index in used else not any(reached)
    assert len(used) > 1


def test_the_auxiliary_loss_is_the_mean_of_balance_and_z_loss_by_their_weights(make_mixture, gappy):
    assert make_mixture()(gappy).aux_loss == 0
    mixture = make_mixture(balance={"weight": 0.5, "z_weight": 0.25, "kind": "switch"}, routing={"top_k": 2})
    output = mixture(gappy)
    load = output.routing.expert.flatten().bincount(minlength=len(EXPERTS)) / output.routing.expert.numel()
    balance, small = load_balancing_loss(output.routing.prob, load, kind="switch"), z_loss(output.routing.score)
    torch.testing.assert_close(output.aux_loss, (2 * balance + small) / 3)
    assert mixture.aux_weight == 0.75
    output.aux_loss.backward()


def test_the_loss_free_bias_moves_in_training_only_and_steers_the_choice(make_mixture, gappy):
    mixture = make_mixture(balance={"bias_rate": 0.5}, routing={"top_k": 1}, router={"dropout": 0.0})
    before = mixture(gappy).routing.expert
    assert mixture.balance_bias.bias.abs().max() == 0
    mixture.train()
    mixture(gappy)
    crowded = before.flatten().mode().values
    assert mixture.balance_bias.bias[crowded] < 0 < mixture.balance_bias.bias.max()
    mixture.eval().balance_bias.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 99.0]))
    assert (mixture(gappy).routing.expert == 3).all()


def test_routing_can_change_and_the_weights_stay(make_mixture, gappy):
    mixture = make_mixture(routing={"top_k": 2})
    weights = copy.deepcopy(mixture.state_dict())
    mixture.set_routing(RoutingConfig(top_k=3))
    assert mixture.top_k == mixture.config.moe["routing"]["top_k"] == mixture(gappy).routing.gate.shape[1] == 3
    assert all(torch.equal(weights[name], weight) for name, weight in mixture.state_dict().items())
    with pytest.raises(InputError, match="top_k must be from 1 to 4, the number of experts, got 5"):
        mixture.set_routing(RoutingConfig(top_k=5))


def test_active_parameters_are_those_of_the_largest_experts_and_the_router(make_mixture, experts):
    sizes = [sum(parameter.numel() for parameter in expert.parameters()) for expert in experts.values()]
    mixture = make_mixture(routing={"top_k": 2})
    router = sum(parameter.numel() for parameter in mixture.router.parameters())
    assert mixture.active_parameters() - router == max(sum(pair) for pair in itertools.combinations(sizes, 2))


@pytest.mark.parametrize(
    ("key", "value"),
    [("quantiles", [0.1, 0.5, 0.9]), ("max_output_patches", 8), ("context_length", 64), ("use_arcsinh", False)],
)
def test_experts_of_another_task_are_refused(make_teacher, experts, key, value):
    other = make_teacher(num_layers=1, forecasting={key: value})
    with pytest.raises(InputError, match=rf"experts must share {key}: 'power' has .*, 'other' has .*one teacher"):
        build_mixture(experts | {"other": other}, MixtureConfig())


def test_experts_of_another_patch_size_are_refused(make_teacher, experts):
    patches = {"input_patch_size": 8, "input_patch_stride": 8, "output_patch_size": 8}
    with pytest.raises(InputError, match="experts must share input_patch_size: 'power' has 16, 'other' has 8"):
        build_mixture(experts | {"other": make_teacher(num_layers=1, forecasting=patches)}, MixtureConfig())


def test_impossible_mixtures_are_refused(make_mixture, experts, unchecked):
    with pytest.raises(InputError, match="a mixture needs at least one expert, got none"):
        build_mixture({}, MixtureConfig())
    with pytest.raises(InputError, match="top_k must be from 1 to 4, the number of experts, got 5"):
        make_mixture(routing={"top_k": 5})
    config = copy.deepcopy(make_mixture().config)
    config.expert_names = ["a", "a", "b", "c"]
    with pytest.raises(InputError, match="every expert needs a name of its own: 4 experts, names .'a', 'a', 'b', 'c'"):
        DistilledMoE(config)
    with pytest.raises(InputError, match="kind must be 'l2' or 'switch', got 'kl'"):
        BalanceConfig(kind="kl")
    with pytest.raises(InputError, match="z_weight must be at least 0, got -1.0"):
        BalanceConfig(z_weight=-1.0)


def test_tokens_of_different_width_have_no_average(make_mixture, experts, make_teacher, gappy):
    mixture = make_mixture(members=experts | {"wide": make_teacher(d_model=64, num_layers=1)})
    assert mixture(gappy).quantile_preds.isfinite().all()
    with pytest.raises(InputError, match=r"experts of one d_model, these have \[48, 64\]"):
        mixture.encode(gappy)


def test_the_router_works_in_float32_under_autocast_too(make_mixture, batch):
    mixture = make_mixture(router={"use_patch_embedding": True})
    expected = mixture(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = mixture(**batch)
    assert torch.equal(found.routing.score, expected.routing.score)
    assert (found.normalized_preds - expected.normalized_preds).abs().max() > 0
