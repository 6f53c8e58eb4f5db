"""Small series and domains of two obviously different kinds."""

import numpy as np
import pandas as pd

from chronomoe.data.domains import Domain
from chronomoe.data.series import Series


def sample_series(kind="wave", length=200, *, seed=0, variates=1, past_only=(), known=(), item_id=None):
    """Waves of period 12, or mostly zeros with spikes; the covariates named are of the same kind."""
    rng = np.random.default_rng(seed)
    count = variates + len(past_only) + len(known)
    noise = rng.normal(size=(count, length))
    if kind == "wave":
        rows = np.sin(2 * np.pi * (np.arange(length) + rng.integers(12)) / 12) + 0.1 * noise
    elif kind == "spikes":
        rows = np.where(noise > 1.3, noise * 5, 0.0)
    elif kind == "count":
        rows = np.arange(length) + 1000 * np.arange(count)[:, None]
    rows = rows.astype(np.float32)
    return Series(
        item_id=item_id or f"{kind}-{seed}",
        start=pd.Timestamp("2020-01-01"),
        freq="h",
        target=rows[:variates],
        target_names=("target",) if variates == 1 else tuple(f"target_{index}" for index in range(variates)),
        covariates=dict(zip((*past_only, *known), rows[variates:], strict=True)),
        known=tuple(known),
    )


def sample_domain(kind="wave", *, count=3, name=None, length=200, **options):
    """Return a domain of several series of one kind."""
    series = [sample_series(kind, length, seed=seed, **options) for seed in range(count)]
    return Domain(name=name or kind, series=series, seasonality=12)


def series_to_frame(series):
    """Return one long frame of series that have the same columns."""
    parts = []
    for item in series:
        values = {**dict(zip(item.target_names, item.target, strict=True)), **item.covariates}
        parts.append(pd.DataFrame({"item_id": item.item_id, "timestamp": item.timestamps(), **values}))
    return pd.concat(parts, ignore_index=True)
