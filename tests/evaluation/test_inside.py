import pytest
import torch

from chronomoe.data.windows import WindowConfig
from chronomoe.evaluation.inside import FORECAST, REGISTER, THIRDS, _count, look_inside
from chronomoe.evaluation.tasks import make_task
from chronomoe.models.chronos2 import use_exact_group_attention
from chronomoe.models.sparse.config import MoEConfig
from chronomoe.models.sparse.upcycling import upcycle
from moe_models import train_by_chance
from sample_series import sample_domain

WINDOWS = WindowConfig(context_length=96, horizon=16, min_context_length=16)
NUM_EXPERTS = 4


@pytest.fixture
def tasks():
    domains = [sample_domain("wave"), sample_domain("spikes", count=2, known=("k",))]
    return {domain.name: make_task(domain, WINDOWS) for domain in domains}


@pytest.fixture
def model(make_teacher):
    config = MoEConfig(num_experts=NUM_EXPERTS, top_k=2, layers=(0, 3))
    return train_by_chance(upcycle(use_exact_group_attention(make_teacher()), config))


def test_shares_of_choices_sum_to_one_everywhere(model, tasks):
    for layer in look_inside(model, tasks)["layers"]:
        for shares in (layer["load"], *layer["domains"].values(), *layer["positions"].values()):
            assert len(shares) == NUM_EXPERTS
            assert sum(shares) == pytest.approx(1)
        assert set(layer["domains"]) == {"wave", "spikes"}


def test_the_load_is_the_mean_over_domains(model, tasks):
    for layer in look_inside(model, tasks)["layers"]:
        mean = torch.tensor(list(layer["domains"].values())).mean(dim=0)
        torch.testing.assert_close(torch.tensor(layer["load"]), mean)


def test_the_last_block_computed_forecast_tokens_alone(model, tasks):
    first, last = look_inside(model, tasks)["layers"]
    assert (first["block"], last["block"]) == (0, 3)
    assert set(first["positions"]) == {*THIRDS, REGISTER, FORECAST}
    assert set(last["positions"]) == {FORECAST}


def test_batches_do_not_matter(model, tasks):
    one, other = (look_inside(model, tasks, batch_size=size) for size in (1, 64))
    for left, right in zip(one["layers"], other["layers"], strict=True):
        assert left["load"] == pytest.approx(right["load"])


def test_the_least_share_tells_a_dead_expert(model, tasks):
    with torch.no_grad():
        layer = model.moe_layers[0]
        layer.balance_bias.bias[1] = -1e6
        layer.config = MoEConfig(num_experts=NUM_EXPERTS, top_k=2, bias_rate=1e-3)
    found = look_inside(model, tasks)
    assert found["layers"][0]["load"][1] == 0
    assert found["least_share"] == 0


def test_a_new_router_has_the_entropy_of_an_even_choice(make_teacher, tasks):
    upcycled = upcycle(use_exact_group_attention(make_teacher()), MoEConfig(num_experts=NUM_EXPERTS, top_k=2))
    for layer in look_inside(upcycled, tasks)["layers"]:
        assert layer["entropy"] == pytest.approx(1, abs=1e-4)


def test_choices_are_counted_by_position_and_padding_is_not():
    past, register, ahead = 6, 1, 2
    expert = torch.zeros(1, past + register + ahead, 1, dtype=torch.long)
    expert[0, 0] = -1  # padding
    expert[0, -1] = 1
    counts = _count(expert, num_experts=2, ahead=ahead, register=True)
    assert counts.tolist() == [[1, 0], [2, 0], [2, 0], [1, 0], [1, 1]]
