"""A forecast is that of its series alone, whatever the size and order of the batch and whoever else is in it."""

import numpy as np
import pytest

from chronomoe import ChronoMoEPipeline, MoEConfig, MoEEnhancedChronos2, MoEInsertionConfig, upcycle
from moe_models import train_by_chance

HORIZON = 32
LARGEST = 1e-4
"""Float32 rounding, relative to the series; `bench/batch_invariance.py` measures it on real ones."""
KINDS = ["dense", "mixture", "mixture of all", "dynamic K", "upcycled", "expanded"]
LAYERS = MoEConfig(num_experts=4, top_k=2)


@pytest.fixture
def pipeline(request, make_teacher, make_mixture):
    make = {
        "dense": lambda: make_teacher(num_layers=2),
        "mixture": lambda: make_mixture(routing={"top_k": 1}),
        "mixture of all": lambda: make_mixture(routing={"top_k": 4}),
        "dynamic K": lambda: make_mixture(routing={"top_k": 4, "threshold": 0.9}),
        "upcycled": lambda: train_by_chance(upcycle(make_teacher(num_layers=2), LAYERS)),
        "expanded": lambda: train_by_chance(
            MoEEnhancedChronos2(make_teacher(num_layers=2), MoEInsertionConfig(after=(0, 1)))
        ),
    }
    return ChronoMoEPipeline(make[request.param]())


@pytest.fixture
def inputs(make_context):
    """Series of many lengths, scales and numbers of variates; with gaps, constants and one that has no value."""
    rows = make_context(14, 120).numpy()
    lengths = [120, 17, 64, 5, 120, 33, 90, 48, 1, 100, 76, 120, 20, 61]
    found = [{"target": row[-length:].copy()} for row, length in zip(rows, lengths, strict=True)]
    found[2]["target"][20:40] = np.nan
    found[5]["target"][:] = 3.25
    found[7]["target"][:] = np.nan
    found[9]["target"] *= 1e5
    return found


@pytest.fixture
def covariates(make_context):
    """Series with past and known covariates."""
    rows = make_context(9, 90 + HORIZON, seed=3).numpy()
    return [
        {
            "target": target[:90],
            "past_covariates": {"known": known[:90], "past": past[:90]},
            "future_covariates": {"known": known[90:]},
        }
        for target, known, past in rows.reshape(3, 3, -1)
    ]


def forecast(pipeline, inputs, order, batch_size):
    found = pipeline.predict([inputs[place] for place in order], prediction_length=HORIZON, batch_size=batch_size)
    return dict(zip(order, found, strict=True))


def largest_change(pipeline, inputs):
    alone = {place: pipeline.predict([one], prediction_length=HORIZON)[0] for place, one in enumerate(inputs)}
    assert all(len(one.unique()) > 1 for place, one in alone.items() if place not in (5, 7, 8))  # the others may move
    together = range(len(inputs))
    largest = 0.0
    for order in (list(together), list(together)[::-1], list(together)[1::2]):
        for batch_size in (1, 3, 256):
            for place, found in forecast(pipeline, inputs, order, batch_size).items():
                seen = inputs[place]["target"][np.isfinite(inputs[place]["target"])]
                scale = alone[place].abs() + max(seen.std() if len(seen) else 1.0, 1e-6)
                largest = max(largest, ((found - alone[place]).abs() / scale).max().item())
    return largest


@pytest.mark.parametrize("pipeline", KINDS, indirect=True)
def test_neither_size_nor_order_nor_company_of_a_batch_moves_a_forecast(pipeline, inputs):
    assert largest_change(pipeline, inputs) <= LARGEST


@pytest.mark.parametrize("pipeline", KINDS, indirect=True)
def test_nor_do_they_where_series_have_covariates(pipeline, covariates):
    assert largest_change(pipeline, covariates) <= LARGEST


@pytest.mark.parametrize("pipeline", ["mixture", "dynamic K"], indirect=True)
def test_a_series_is_routed_as_if_it_were_alone(pipeline, inputs):
    together = pipeline.routing([one["target"] for one in inputs])
    for one, found in zip(inputs, together, strict=True):
        (alone,) = pipeline.routing([one["target"]])
        assert found == pytest.approx(alone, abs=1e-5)
    if pipeline.model.moe.routing.threshold:
        assert len({len(found) for found in together}) > 1  # K is dynamic
