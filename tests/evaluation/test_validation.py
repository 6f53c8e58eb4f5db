import numpy as np
import pytest
import torch

from chronomoe.data.windows import EvaluationWindows, WindowConfig, collate, model_inputs
from chronomoe.evaluation.validation import differences, window_losses
from chronomoe.models.chronos2 import use_exact_group_attention
from chronomoe.training.growing import validation_loss
from sample_series import sample_domain

WINDOWS = WindowConfig(context_length=64, horizon=16, min_context_length=16)


@pytest.fixture
def model(teacher):
    return use_exact_group_attention(teacher)


def validation(**options):
    return EvaluationWindows(sample_domain(**options), WINDOWS, part="validation")


def test_the_mean_over_windows_is_the_validation_loss_of_complete_series(model):
    windows = validation()
    assert window_losses(model, windows).mean() == pytest.approx(validation_loss(model, windows, batch_size=4))


def test_each_window_of_a_group_is_judged_by_its_targets_alone(model):
    windows = validation(variates=2, known=("k",), past_only=("p",))
    losses = window_losses(model, windows, batch_size=3)
    assert losses.shape == (len(windows),)
    levels = torch.tensor(model.chronos_config.quantiles)
    batch = collate([windows[1]], patch_size=model.chronos_config.output_patch_size)
    with torch.no_grad():
        output = model(**model_inputs(batch))
    target, _ = model.instance_norm(batch["future_target"], output.loc_scale)
    gap = target[:2, None] - output.normalized_preds[:2, :, :16]
    pinball = 2 * torch.maximum(levels[:, None] * gap, (levels[:, None] - 1) * gap)
    assert losses[1] == pytest.approx(pinball.mean().item(), rel=1e-5)


def test_a_model_is_no_better_than_itself():
    losses = {"a": np.array([1.0, 2.0]), "b": np.array([3.0])}
    for row in differences("m", "m", losses, losses, draws=20, seed=0):
        assert (row["difference"], row["low"], row["high"]) == (0, 0, 0)


def test_overall_counts_domains_alike_however_many_windows_they_have():
    losses = {"large": np.full(50, 1.0), "small": np.full(2, 1.0)}
    rivals = {"large": np.full(50, 2.0), "small": np.full(2, 5.0)}
    rows = {row["domain"]: row for row in differences("m", "r", losses, rivals, draws=10, seed=0)}
    assert (rows["large"]["difference"], rows["small"]["difference"]) == (-1, -4)
    overall = rows["overall"]
    assert (overall["loss"], overall["against_loss"], overall["difference"]) == (1, 3.5, -2.5)


def test_intervals_hold_the_difference_and_narrow_with_more_windows():
    rng = np.random.default_rng(0)
    widths = []
    for count in (30, 3000):
        losses = {"a": rng.normal(1.0, 0.5, size=count)}
        (row, _) = differences("m", "r", losses, {"a": np.ones(count)}, draws=400, seed=0)
        assert row["low"] <= row["difference"] <= row["high"]
        widths.append(row["high"] - row["low"])
    assert widths[1] < widths[0] / 5


def test_windows_without_a_target_are_left_out():
    losses, rivals = {"a": np.array([1.0, np.nan, 3.0])}, {"a": np.array([2.0, np.nan, 2.0])}
    (row, _) = differences("m", "r", losses, rivals, draws=10, seed=0)
    assert (row["loss"], row["against_loss"]) == (2, 2)
