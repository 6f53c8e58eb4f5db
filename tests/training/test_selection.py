import numpy as np
import pytest
import torch

from chronomoe.errors import InputError
from chronomoe.training.losses import quantile_loss
from chronomoe.training.selection import mixture_loss, select_experts

LEVELS = torch.tensor([0.1, 0.5, 0.9])
DOMAIN = np.array([0, 0, 0, 1, 1, 1, 2, 2])


def forecasts(*gaps):
    """Return forecasts of some candidates, each off by its own gap in each domain, and the target."""
    target = torch.randn(len(DOMAIN), 5, generator=torch.Generator().manual_seed(0))
    gap = torch.tensor(gaps, dtype=torch.float32)[:, DOMAIN].T
    quantiles = target[:, None, None] + gap[:, :, None, None] + torch.zeros(len(DOMAIN), len(gaps), 3, 5)
    return quantiles, target


def select(quantiles, target, **options):
    return select_experts(quantiles, target, LEVELS, DOMAIN, **options)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_obviously_best_candidates_are_selected(top_k):
    candidates = forecasts((5, 5, 5), (0, 4, 4), (6, 6, 6), (4, 0, 4), (4, 4, 0), (7, 7, 7))
    assert sorted(select(*candidates, count=3, top_k=top_k)) == [1, 3, 4]


def test_candidates_are_taken_in_the_order_in_which_they_help():
    candidates = forecasts((3, 0, 9), (1, 1, 1), (0.5, 5, 5))
    assert select(*candidates, count=3, top_k=1) == [1, 0, 2]


def test_candidates_that_err_in_opposite_ways_are_selected_for_a_pair():
    candidates = forecasts((2, 2, 2), (3, 3, 3), (-2, -2, -2))
    assert select(*candidates, count=2, top_k=2) == [0, 2]
    assert select(*candidates, count=2, top_k=1)[0] in (0, 2)


@pytest.mark.parametrize("top_k", [1, 2])
def test_where_no_candidate_helps_the_better_one_is_selected(top_k):
    candidates = forecasts((50, 50, 50), (0, 0, 0), (1, 1, 1))
    assert select(*candidates, count=2, top_k=top_k) == [1, 2]


def test_steps_without_target_do_not_count_in_the_selection():
    quantiles, target = forecasts((0, 0, 0), (1, 1, 1))
    quantiles[:, 0, :, 2:] += 100
    target[:, 2:] = torch.nan
    assert select(quantiles, target, count=1, top_k=1) == [0]


@pytest.mark.parametrize("count", [0, 3])
def test_an_impossible_number_of_experts_is_refused(count):
    with pytest.raises(InputError, match=f"the number of experts to keep must be from 1 to 2, got {count}"):
        select(*forecasts((0, 0, 0), (1, 1, 1)), count=count, top_k=1)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_mixture_loss_is_that_of_the_best_team_of_each_domain(top_k):
    quantiles, target = forecasts((1, -2, 3), (-1, 3, 1), (4, 4, -2))

    def loss_of(team):
        mean = quantiles[:, list(team)].mean(dim=1)
        return quantile_loss(mean, target, levels=LEVELS).mean(dim=1).double().numpy()

    teams = [team for team in [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)] if len(team) <= top_k]
    best = [min(loss_of(team)[place == DOMAIN].mean() for team in teams) for place in range(3)]
    assert mixture_loss(loss_of, (0, 1, 2), DOMAIN, top_k=top_k) == pytest.approx(np.mean(best))
