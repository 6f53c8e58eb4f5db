"""The long-horizon protocol: what is scaled, cut and averaged."""

from dataclasses import replace

import numpy as np
import pytest

from chronomoe.data.domains import Split
from chronomoe.errors import InputError
from chronomoe.evaluation.long_horizon import long_horizon
from chronomoe.pipeline import ChronoMoEPipeline
from sample_series import sample_domain

TRAIN, VALIDATION, TEST = 120, 140, 190
CONTEXT, HORIZON = 24, 6


@pytest.fixture
def domain():
    return replace(sample_domain(count=2, variates=2), cutoffs=Split(stops=(TRAIN, VALIDATION, TEST)))


@pytest.fixture
def model(make_teacher):
    return make_teacher(num_layers=1)


def score(model, domain, **options):
    return long_horizon(model, domain, **{"horizons": [HORIZON], "context_length": CONTEXT} | options)


def by_hand(model, domain, *, horizon, stride):
    """Scale, cut and forecast window by window."""
    errors = []
    for series in domain.series:
        for values in series.target.astype(np.float64):
            scaled = (values - values[:TRAIN].mean()) / values[:TRAIN].std()
            for cutoff in range(VALIDATION, TEST - horizon + 1, stride):
                context = scaled[cutoff - CONTEXT : cutoff].astype(np.float32)
                _, median = ChronoMoEPipeline(model).predict_quantiles([context], prediction_length=horizon)
                errors.append(median[0][0].numpy() - scaled[cutoff : cutoff + horizon])
    return np.array(errors)


@pytest.mark.parametrize("stride", [1, 7])
def test_errors_are_those_of_every_window_in_units_of_the_train_rows(model, domain, stride):
    (found,) = score(model, domain, stride=stride)
    errors = by_hand(model, domain, horizon=HORIZON, stride=stride)
    assert found.windows == len(errors)
    assert found.mse == pytest.approx((errors**2).mean(), rel=1e-4)
    assert found.mae == pytest.approx(np.abs(errors).mean(), rel=1e-4)


def test_level_and_unit_of_a_series_do_not_matter(model, domain):
    moved = replace(domain, series=[replace(one, target=one.target * 1000 + 5) for one in domain.series])
    (before,), (after,) = score(model, domain), score(model, moved)
    assert (after.mse, after.mae) == pytest.approx((before.mse, before.mae), rel=1e-2)


def test_rows_after_the_test_part_are_not_read(model, domain):
    for one in domain.series:
        assert one.target.shape[1] > TEST
    cut = replace(domain, series=[replace(one, target=one.target[:, :TEST]) for one in domain.series])
    assert score(model, cut) == score(model, domain)


def test_missing_targets_do_not_count(model, domain):
    gaps = [one.target.copy() for one in domain.series]
    for target in gaps:
        target[:, TEST - 1] = np.nan
    holed = replace(domain, series=[replace(one, target=t) for one, t in zip(domain.series, gaps, strict=True)])
    (whole,), (found,) = score(model, domain), score(model, holed)
    assert found.windows == whole.windows
    assert np.isfinite(found.mse)


def test_horizons_are_scored_one_by_one(model, domain):
    assert [one.horizon for one in score(model, domain, horizons=[3, HORIZON])] == [3, HORIZON]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizons": [TEST - VALIDATION + 1]}, "test rows of 'wave' are fewer than the horizon 51"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"horizons": [0]}, "horizon must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_scored_is_refused(model, domain, options, message):
    with pytest.raises(InputError, match=message):
        score(model, domain, **options)
