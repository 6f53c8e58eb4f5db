"""Mixtures of the same experts, of which each forecasts a row once."""

import pytest
import torch

from chronomoe.evaluation.baselines import equal_average, rerouted
from chronomoe.evaluation.remembering import sharing_forecasts
from chronomoe.models.mixture.router import RoutingConfig


@pytest.fixture
def models(make_mixture):
    """A mixture with three routings, and a model that is none."""
    mixture = make_mixture(routing={"top_k": 2, "threshold": 0.7})
    one = rerouted(mixture, RoutingConfig(top_k=1, threshold=None))
    return {"mixture": mixture, "K=1": one, "average": equal_average(mixture), "expert": mixture.experts[0]}


@pytest.fixture
def counted(models, monkeypatch):
    """Count the rows that each expert forecasts."""
    experts = list(models["mixture"].experts)
    rows = dict.fromkeys(range(len(experts)), 0)
    plain = type(experts[0]).forward

    def forward(self, context, **inputs):
        place = next(place for place, one in enumerate(experts) if one is self)
        rows[place] += len(context)
        return plain(self, context, **inputs)

    monkeypatch.setattr(type(experts[0]), "forward", forward)
    return rows


def test_each_expert_forecasts_a_row_once_with_the_same_numbers(models, counted, make_context):
    context = make_context(12)
    expected = {name: model(context, num_output_patches=2).quantile_preds for name, model in models.items()}
    counted.update(dict.fromkeys(counted, 0))
    shared = sharing_forecasts(models)
    assert shared["expert"] is models["expert"]
    found = {name: shared[name](context, num_output_patches=2).quantile_preds for name in ("mixture", "K=1", "average")}
    assert set(counted.values()) == {len(context)}
    assert torch.equal(found["mixture"], expected["mixture"]), "the first to ask is computed as ever"
    for name, forecast in found.items():
        torch.testing.assert_close(forecast, expected[name], rtol=1e-5, atol=1e-5)
    shared["average"](context, num_output_patches=3)
    assert set(counted.values()) == {2 * len(context)}, "another horizon is another forecast"
    assert torch.equal(models["mixture"](context, num_output_patches=2).quantile_preds, expected["mixture"])
    assert counted[0] > 0


def test_known_covariates_and_groups_are_part_of_a_row(models, counted, make_context):
    context, ahead = make_context(4), torch.rand(4, 16)
    shared = sharing_forecasts(models)["average"]
    plain = shared(context, num_output_patches=1).normalized_preds
    known = shared(context, future_covariates=ahead, num_output_patches=1).normalized_preds
    assert not torch.equal(plain, known)
    counted.update(dict.fromkeys(counted, 0))
    groups = torch.tensor([0, 0, 1, 1])
    for _ in range(2):
        together = shared(context, group_ids=groups, num_output_patches=1).normalized_preds
    assert not torch.equal(plain, together)
    assert set(counted.values()) == {2 * len(context)}, "rows that attend to others are forecast anew"
