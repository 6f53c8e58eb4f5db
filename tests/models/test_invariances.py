"""What must hold of a forecast whatever the weights: units and levels do not matter, constants and order do."""

import pytest
import torch

from chronomoe import ChronoMoEPipeline

HORIZON = 32
PASSES = [HORIZON, 3 * HORIZON]
"""One pass of the model, and three."""
SPREAD = 1e-4
"""Float32 rounding of a forecast, in spreads of the series: weights amplify that of the input."""
pytestmark = pytest.mark.filterwarnings("ignore:We recommend keeping prediction length")


@pytest.fixture(params=["plain", "mixture"])
def pipeline(request, make_teacher, make_mixture, experts):
    """Forecast with one model, and with a mixture of two experts for each series."""
    if request.param == "plain":
        return ChronoMoEPipeline(make_teacher(num_layers=2, forecasting={"max_output_patches": 2}))
    for expert in experts.values():
        expert.chronos_config.max_output_patches = 2
    return ChronoMoEPipeline(make_mixture(members=experts))


@pytest.fixture
def series(make_context):
    """Rows of about unit spread around 0, with a gap."""
    rows = make_context(9, 100).double()
    rows = (rows - rows.mean(dim=1, keepdim=True)) / rows.std(dim=1, keepdim=True)
    rows[2, 40:60] = torch.nan
    return rows


def forecast(pipeline, rows, horizon, **options):
    return torch.cat(pipeline.predict(rows.float()[:, None], prediction_length=horizon, **options))


def tolerance(expected):
    """Rounding grows with the forecast itself: the last transform is a sinh."""
    return SPREAD * (1 + expected.abs())


@pytest.mark.parametrize("horizon", PASSES)
@pytest.mark.parametrize("unit", [1e6, 1e-6, 3.7])
def test_a_series_in_another_unit_gets_the_same_forecast_in_it(pipeline, series, horizon, unit):
    expected = forecast(pipeline, series, horizon)
    found = forecast(pipeline, series * unit, horizon)
    assert expected.std() > 0.1  # the comparison means something
    assert ((found / unit - expected).abs() <= tolerance(expected)).all()


@pytest.mark.parametrize("horizon", PASSES)
@pytest.mark.parametrize("spreads", [100.0, -100.0])
def test_a_series_at_another_level_gets_the_same_forecast_from_there(pipeline, series, horizon, spreads):
    """The shifted series has lost bits: the forecast of what is left of it is the one to compare with."""
    shifted = (series + spreads).float()
    expected = forecast(pipeline, shifted.double() - spreads, horizon)
    found = forecast(pipeline, shifted, horizon)
    assert ((found - spreads - expected).abs() <= 10 * tolerance(expected)).all()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_forecast_does_not_depend_on_what_else_is_in_the_batch(pipeline, series, batch_size):
    expected = forecast(pipeline, series, HORIZON)
    found = forecast(pipeline, series, HORIZON, batch_size=batch_size)
    assert ((found - expected).abs() <= tolerance(expected)).all()


@pytest.mark.parametrize("horizon", PASSES)
def test_quantiles_do_not_cross(pipeline, series, horizon):
    assert (forecast(pipeline, series, horizon).diff(dim=1) >= 0).all()


@pytest.mark.parametrize("horizon", PASSES)
def test_constants_are_forecast_as_constants(pipeline, horizon):
    for level in (0.0, 1e-6, 0.1, 1.0, -3.7, 12345.678, 1e6):
        rows = torch.full((2, 100), level)
        rows[1, :30] = rows[1, 50] = torch.nan
        found = forecast(pipeline, rows, horizon)
        assert torch.equal(found, torch.full_like(found, level))
