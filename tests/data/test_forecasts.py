"""Series into a pipeline: scaled together where they are alike, with the bits of each on its own."""

import numpy as np
import pytest
import torch

from chronomoe.data import forecasts
from chronomoe.data.frames import frame_to_series
from sample_series import sample_domain, series_to_frame

HORIZON = 5


@pytest.fixture
def table():
    """Make series of three lengths, two variates and two covariates, some of a high level or an extreme unit."""
    frame = series_to_frame(sample_domain(count=7, length=40, variates=2, past_only=("p",), known=("k",)).series)
    target = [name for name in frame.columns if name not in ("item_id", "timestamp", "p", "k")]
    frame[target] = frame[target].astype(float)
    item = frame.item_id.astype("category").cat.codes
    frame = frame[frame.groupby("item_id").cumcount() >= 10 * (item % 3)]
    item = item[frame.index]
    frame[target[0]] = np.where(item == 1, frame[target[0]] * 1e-3 + 1e9, frame[target[0]])
    frame[target[1]] = np.where(item == 4, frame[target[1]] * 1e30, frame[target[1]])
    return frame_to_series(frame, target=target, known_covariates=["k"])


@pytest.mark.parametrize("together", [1, 300, 1 << 20])
@pytest.mark.parametrize("context_length", [8, 100])
def test_series_that_are_scaled_together_have_the_bits_of_each_alone(table, monkeypatch, together, context_length):
    monkeypatch.setattr(forecasts, "_TOGETHER", together)
    ahead = {"k": np.random.default_rng(0).normal(size=(len(table), HORIZON))}
    options = {"horizon": HORIZON, "context_length": context_length}
    inputs, unit = forecasts._prepare(table, ahead, **options)
    assert len({one["context"].shape[1] for one in inputs}) == (1 if context_length == 8 else 3)
    assert (unit.level != 0).any()
    assert (unit.size != 1).any()
    for place in range(len(table)):
        [alone], own = forecasts._prepare(table[place : place + 1], {"k": ahead["k"][place : place + 1]}, **options)
        for name in ("context", "future_covariates"):
            torch.testing.assert_close(inputs[place].pop(name), alone.pop(name), rtol=0, atol=0, equal_nan=True)
        assert inputs[place] == alone == {"n_targets": 2, "n_covariates": 2, "n_future_covariates": 1}
        assert all(np.array_equal(mine[0], all_of[place]) for mine, all_of in zip(own, unit, strict=True))
