import copy
import math

import numpy as np
import pytest
import torch

from chronomoe.data.windows import EvaluationWindows, JoinedWindows, WindowConfig, collate, model_inputs
from chronomoe.errors import InputError
from chronomoe.models.chronos2 import use_exact_group_attention
from chronomoe.training.losses import quantile_loss
from chronomoe.training.validation import domain_mean, row_losses, validation_loss
from sample_series import sample_domain

DOMAINS = [sample_domain("wave"), sample_domain("spikes", variates=2, known=("k",))]
WINDOWS = WindowConfig(context_length=48, horizon=16, min_context_length=32)


@pytest.fixture(scope="module")
def base(make_teacher):
    return use_exact_group_attention(make_teacher(num_layers=2)).eval()


@pytest.fixture(scope="module")
def gappy():
    """Windows with missing steps, more of the second domain than of the first."""
    domain = sample_domain("wave", count=1)
    domain.series[0].target[:, 75:80] = np.nan
    parts = [(domain, 2), (DOMAINS[1], 5)]
    return JoinedWindows([EvaluationWindows(each, WINDOWS, part="validation", limit=most) for each, most in parts])


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_rows_count_alike_in_the_validation_loss_and_so_do_domains(base, gappy, batch_size):
    losses = [[], []]
    for index in range(len(gappy)):
        batch = collate([gappy[index]], patch_size=16)
        with torch.no_grad():
            output = base(**model_inputs(batch))
        target, _ = base.instance_norm(batch["future_target"], output.loc_scale)
        loss = quantile_loss(output.normalized_preds, target, levels=torch.tensor(base.chronos_config.quantiles))
        rows = [row[row.isfinite()].mean().item() for row in loss if row.isfinite().any()]
        losses[gappy.owner(index)] += rows
    expected = np.mean([np.mean(rows) for rows in losses])
    assert validation_loss(base, gappy, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(np.mean(sum(losses, [])), rel=1e-3)


def test_the_loss_of_rows_by_hand():
    quantiles = torch.tensor([[[1.0, 2.0]], [[3.0, 9.0]], [[0.0, 0.0]]])
    target = torch.tensor([[2.0, 4.0], [2.0, torch.nan], [torch.nan, torch.nan]])
    found = row_losses(quantiles, target, levels=torch.tensor([0.5]))
    torch.testing.assert_close(found, torch.tensor([1.5, 1.0, torch.nan]), equal_nan=True)
    assert domain_mean(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 1, 1])) == 2.5


def test_validation_windows_without_a_target_are_refused(base):
    class Blank(EvaluationWindows):
        def __getitem__(self, index):
            window = super().__getitem__(index)
            return window._replace(target=window.target * np.float32("nan"))

    with pytest.raises(InputError, match="no validation window has a target"):
        validation_loss(base, Blank(DOMAINS[0], WINDOWS, part="validation", limit=1), batch_size=1)


def test_a_model_that_forecasts_no_numbers_has_no_validation_loss(base):
    broken = copy.deepcopy(base)
    windows = EvaluationWindows(DOMAINS[0], WINDOWS, part="validation", limit=4)
    with torch.no_grad():
        broken.output_patch_embedding.output_layer.bias[0] = torch.nan
    assert math.isnan(validation_loss(broken, windows, batch_size=4))
