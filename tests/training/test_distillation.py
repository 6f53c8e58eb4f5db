import json

import numpy as np
import pytest
import torch

from chronomoe.data.soft_targets import LiveTeacher
from chronomoe.data.windows import EvaluationWindows, WindowConfig
from chronomoe.errors import InputError
from chronomoe.models.chronos2 import use_exact_group_attention
from chronomoe.models.student import StudentConfig, create_student_model
from chronomoe.training.distillation import (
    DistilConfig,
    distil,
    mixture_loss,
    save_curve,
    select_experts,
    training_curve,
)
from chronomoe.training.losses import LossConfig, quantile_loss
from sample_series import sample_domain

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


@pytest.fixture
def exact(make_teacher):
    return use_exact_group_attention(make_teacher(num_layers=2))


@pytest.fixture
def windows():
    config = WindowConfig(context_length=48, horizon=16, min_context_length=32)
    return EvaluationWindows(sample_domain(), config, part="train")


HIDDEN = DistilConfig(steps=1, loss=LossConfig(hidden_weight=1.0))


def test_the_hidden_loss_is_refused_without_the_teacher(exact, windows, tmp_path):
    student = create_student_model(exact, StudentConfig(num_layers=1))
    message = "hidden_weight needs the teacher itself: a soft-target store holds forecasts only"
    with pytest.raises(InputError, match=message):
        distil(student, windows, LiveTeacher(exact), HIDDEN, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_hidden_loss_is_refused_for_students_of_another_width_and_mixtures(exact, make_mixture, windows, tmp_path):
    narrow = create_student_model(exact, StudentConfig(d_model=32))
    options = {"config": HIDDEN, "folder": tmp_path, "hidden_teacher": exact}
    with pytest.raises(InputError, match="needs a student of the teacher's d_model 48, got 32"):
        distil(narrow, windows, LiveTeacher(exact), **options)
    with pytest.raises(InputError, match="hidden_weight must be 0 for a mixture"):
        distil(make_mixture(), windows, LiveTeacher(exact), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps and batch_size must be at least 1, got 0 and 64"),
        ({"batch_size": 0}, "steps and batch_size must be at least 1, got 1000 and 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive, got nan"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative, got -1.0"),
        ({"warmup_share": 1.5}, "warmup_share must be from 0 to 1, got 1.5"),
        ({"checkpoint_steps": 0}, "checkpoint_steps must be at least 1, got 0"),
        ({"seed": -1}, "seed must be from 0 to 4294967295, got -1"),
        ({"seed": 2**32}, "seed must be from 0 to 4294967295, got 4294967296"),
        ({"schedule": "step"}, "schedule must be 'cosine' or 'constant', got 'step'"),
    ],
)
def test_impossible_trainings_are_refused(unchecked, options, message):
    with pytest.raises(InputError, match=message):
        DistilConfig(**options)


def test_a_training_curve_holds_steps_and_losses_and_survives_json(tmp_path):
    history = [
        {"step": 2, "loss": 3.0, "soft_loss": 2.0, "hard_loss": 4.0, "learning_rate": 0.1},
        {"step": 2, "eval_loss": 5.0},
        {"step": 4, "loss": 1.0},
        {"step": 4, "train_loss": 9.0},
    ]
    curve = training_curve(history)
    assert curve == {
        "step": [2, 4],
        "loss": [3.0, 1.0],
        "soft_loss": [2.0, 0.0],
        "hard_loss": [4.0, 0.0],
        "eval_step": [2],
        "eval_loss": [5.0],
    }
    save_curve(curve, tmp_path / "curve.json")
    assert json.loads((tmp_path / "curve.json").read_text()) == curve
