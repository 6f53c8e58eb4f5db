import math

import pytest
import torch

from chronomoe.errors import InputError
from chronomoe.models.chronos2 import use_exact_group_attention
from chronomoe.training.losses import (
    LossConfig,
    distillation_loss,
    hidden_loss,
    horizon_weights,
    masked_mean,
    quantile_loss,
    soft_loss,
)

LEVELS = torch.tensor([0.1, 0.5, 0.9])


@pytest.fixture
def quantiles():
    """A student's and a teacher's quantiles, 4 rows, 3 levels, 6 steps."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 3, 6, generator=generator).sort(dim=2).values


@pytest.fixture
def target():
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def distil(student, teacher, target, **config):
    return distillation_loss(student, teacher=teacher, target=target, levels=LEVELS, config=LossConfig(**config))


def slow_quantile_loss(quantiles, target):
    rows, levels, steps = quantiles.shape
    loss = torch.zeros(rows, steps)
    for row in range(rows):
        for step in range(steps):
            for level in range(levels):
                gap = float(target[row, step] - quantiles[row, level, step])
                weight = float(LEVELS[level]) if gap > 0 else float(LEVELS[level]) - 1
                loss[row, step] += 2 * weight * gap / levels
    return loss


def test_the_quantile_loss_equals_the_slow_loop(quantiles, target):
    torch.testing.assert_close(
        quantile_loss(quantiles[0], target, levels=LEVELS), slow_quantile_loss(quantiles[0], target)
    )


def test_the_hard_loss_is_chronos2s_own_over_the_number_of_levels(make_teacher, context, make_context):
    model = use_exact_group_attention(make_teacher())
    future = make_context(6, 32, seed=3)
    output = model(context, future_target=future, num_output_patches=2)
    target, _ = model.instance_norm(future, output.loc_scale)
    levels = torch.tensor(model.chronos_config.quantiles)
    parts = distillation_loss(
        output.normalized_preds, teacher=None, target=target, levels=levels, config=LossConfig(soft_weight=0.7)
    )
    torch.testing.assert_close(parts.hard, output.loss / len(levels))
    assert parts.total == parts.hard
    assert parts.soft == 0


@pytest.mark.parametrize("kind", ["mae", "mse", "huber"])
@pytest.mark.parametrize("weights", ["equal", "linear", "exponential"])
def test_masked_steps_and_rows_without_target_count_in_neither_part(quantiles, target, kind, weights):
    masked = target.clone()
    masked[0, 2:4] = torch.nan
    masked[2] = torch.nan  # a covariate's row
    options = {"soft_kind": kind, "horizon_weights": weights}
    expected = distil(*quantiles, masked, **options)
    student, teacher = quantiles.clone()
    for values in (student, teacher):
        values[0, :, 2:4] = values[0, :, 2:4] * 3 + 7
        values[2] = -values[2] + 11
    assert all(torch.equal(*pair) for pair in zip(distil(student, teacher, masked, **options), expected, strict=True))
    without = distil(student[[0, 1, 3]], teacher[[0, 1, 3]], masked[[0, 1, 3]], **options)
    torch.testing.assert_close(without, expected)


def test_gradients_are_finite_and_zero_where_masked(quantiles, target):
    student = quantiles[0].clone().requires_grad_()
    target[1, 3], target[3] = torch.nan, torch.nan
    distil(student, quantiles[1], target).total.backward()
    assert student.grad.isfinite().all()
    assert student.grad[1, :, 3].abs().max() == student.grad[3].abs().max() == 0
    assert student.grad[0].abs().max() > 0


def test_a_batch_without_any_target_has_no_loss(quantiles):
    assert distil(*quantiles, torch.full((4, 6), torch.nan)).total == 0


def test_the_default_soft_loss_is_the_mean_absolute_quantile_gap(quantiles, target):
    student, teacher = quantiles
    torch.testing.assert_close(distil(student, teacher, target).soft, (student - teacher).abs().mean())


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mae", (0 + 0.25 + 2 + 0.75) / 4),
        ("mse", (0 + 0.0625 + 4 + 0.5625) / 4),
        ("huber", (0 + 0.25**2 / 2 + 0.5 * (2 - 0.25) + 0.5 * (0.75 - 0.25)) / 4),
    ],
)
def test_soft_losses_by_hand(kind, expected):
    student, teacher = torch.tensor([[0.25, 1.0, 2.0, 1.0]]), torch.tensor([[0.25, 0.75, 0.0, 0.25]])
    loss = soft_loss(student[..., None], teacher[..., None], kind=kind, huber_delta=0.5)
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("soft_weight", [0.0, 0.25, 1.0])
def test_the_total_weighs_soft_and_hard(quantiles, target, soft_weight):
    parts = distil(*quantiles, target, soft_weight=soft_weight)
    torch.testing.assert_close(parts.total, soft_weight * parts.soft + (1 - soft_weight) * parts.hard)
    assert parts.soft != parts.hard


def test_steps_beyond_the_target_are_not_read(quantiles, target):
    expected = distil(*quantiles[..., :4], target[:, :4])
    assert distil(*quantiles, target[:, :4]) == expected


@pytest.mark.parametrize("kind", ["equal", "linear", "exponential"])
@pytest.mark.parametrize("horizon", [1, 2, 48])
def test_horizon_weights_have_a_mean_of_one(kind, horizon):
    weights = horizon_weights(kind, horizon)
    assert weights.mean().item() == pytest.approx(1)
    ratio = {"equal": 1, "linear": 2, "exponential": math.e}[kind] if horizon > 1 else 1
    assert (weights[0] / weights[-1]).item() == pytest.approx(ratio)


def test_a_masked_mean_weighs_only_what_is_observed():
    loss, observed = torch.tensor([[1.0, 2.0], [4.0, 8.0]]), torch.tensor([[True, False], [True, True]])
    assert masked_mean(loss, observed, torch.tensor([0.5, 1.5])).item() == pytest.approx((0.5 + 2 + 12) / 2.5)


def test_the_hidden_loss_is_one_minus_the_cosine_to_the_layers_named():
    teacher = tuple(torch.eye(3)[None, [index]] for index in range(3))
    same = (5 * teacher[0], 0.1 * teacher[2])
    assert hidden_loss(same, teacher, [0, 2]).item() == pytest.approx(0)
    assert hidden_loss(same, teacher, [0, 1]).item() == pytest.approx(0.5)
    assert hidden_loss((-teacher[1],), teacher, [1]).item() == pytest.approx(2)


def test_tokens_without_any_value_do_not_count_in_the_hidden_loss():
    teacher = torch.eye(3)[None]  # 3 tokens
    student = torch.stack([teacher[0, 0], -teacher[0, 1], teacher[0, 2]])[None]
    observed = torch.tensor([[True, False, True]])
    assert hidden_loss((student,), (teacher,), [0], observed=observed).item() == pytest.approx(0)
    assert hidden_loss((student,), (teacher,), [0]).item() == pytest.approx(2 / 3)


def test_the_hidden_loss_does_not_move_the_teacher():
    student, teacher = (torch.randn(2, 3, 4, requires_grad=True) for _ in range(2))
    hidden_loss((student,), (teacher,), [0]).backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"soft_weight": 1.1}, "soft_weight must be at most 1, got 1.1"),
        ({"soft_kind": "kl"}, "soft_kind must be 'mae', 'mse' or 'huber', got 'kl'"),
        ({"horizon_weights": "steep"}, "horizon_weights must be 'equal', 'linear' or 'exponential', got 'steep'"),
        ({"hidden_weight": -1.0}, "hidden_weight must be at least 0, got -1.0"),
        ({"hidden_weight": float("nan")}, "hidden_weight must be a finite number, got nan"),
        ({"huber_delta": 0.0}, "huber_delta must be above 0, got 0.0"),
    ],
)
def test_impossible_losses_are_refused(unchecked, options, message):
    with pytest.raises(InputError, match=message):
        LossConfig(**options)
