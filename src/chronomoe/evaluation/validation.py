"""Validation losses of two models on the same windows, and whether their difference is more than chance."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch.utils.data import DataLoader, Dataset

from chronomoe.data.windows import Window, collate, model_inputs
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.training.losses import quantile_loss

Losses = Mapping[str, Float[np.ndarray, " window"]]
"""Of each domain's windows."""


@torch.no_grad()
def window_losses(
    model: ExactChronos2Model | DistilledMoE, windows: Dataset[Window], *, batch_size: int = 128
) -> Float[np.ndarray, " window"]:
    """Mean hard loss of each window over its observed steps, in the normalised space; NaN where there is none."""
    model.eval()
    levels = torch.tensor(model.chronos_config.quantiles)
    gather = functools.partial(collate, patch_size=model.chronos_config.output_patch_size)
    losses = []
    for batch in DataLoader(windows, batch_size=batch_size, collate_fn=gather):
        output = model(**model_inputs(batch))
        target, _ = model.instance_norm(batch["future_target"], output.loc_scale)
        loss = quantile_loss(output.normalized_preds[..., : target.shape[1]].float(), target, levels=levels)
        _, window = batch["group_ids"].unique_consecutive(return_inverse=True)
        observed = loss.isfinite()
        total = torch.zeros(int(window.max()) + 1).index_add(0, window, loss.nansum(dim=1))
        count = torch.zeros(int(window.max()) + 1).index_add(0, window, observed.sum(dim=1).float())
        losses.append((total / count).numpy())  # 0 / 0 where nothing was observed
    return np.concatenate(losses)


def differences(
    model: str, against: str, losses: Losses, rivals: Losses, *, draws: int, seed: int, confidence: float = 0.95
) -> list[dict[str, Any]]:
    """Differences of mean losses by domain and over all, domains counting alike, with paired bootstrap intervals.

    Windows are drawn one by one with replacement within each domain; see ``metrics.bootstrap_relative`` for what that
    leaves out.
    """
    rng = np.random.default_rng(seed)
    outside = (1 - confidence) / 2
    rows, drawn_gaps = [], []
    for domain, own in losses.items():
        seen = np.isfinite(own) & np.isfinite(rivals[domain])
        own, other = own[seen].astype(np.float64), rivals[domain][seen].astype(np.float64)
        drawn = (own - other)[rng.integers(len(own), size=(draws, len(own)))].mean(axis=1)
        drawn_gaps.append(drawn)
        rows.append(_row(model, against, domain, own.mean(), other.mean(), drawn, outside))
    own_mean, rival_mean = (np.mean([row[name] for row in rows]) for name in ("loss", "against_loss"))
    return [*rows, _row(model, against, "overall", own_mean, rival_mean, np.mean(drawn_gaps, axis=0), outside)]


def _row(
    model: str,
    against: str,
    domain: str,
    loss: float | np.floating[Any],
    other: float | np.floating[Any],
    drawn: Float[np.ndarray, " draw"],
    outside: float,
) -> dict[str, Any]:
    low, high = np.quantile(drawn, [outside, 1 - outside])
    return {
        "model": model,
        "against": against,
        "domain": domain,
        "loss": float(loss),
        "against_loss": float(other),
        "difference": float(loss - other),
        "low": float(low),
        "high": float(high),
    }
