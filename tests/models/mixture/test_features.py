import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chronomoe.models.mixture.features import LAGS, NUM_BANDS, NUM_FEATURES, NUM_RECENT, NUM_SHAPE, series_features

LENGTH = 128


def features(context):
    return series_features(context, max_length=LENGTH)


def part(values, name):
    """Cut one part out of the features."""
    sizes = {"shape": NUM_SHAPE, "autocorrelation": len(LAGS), "periodogram": NUM_BANDS, "recent": NUM_RECENT}
    return dict(zip(sizes, values.split(list(sizes.values()), dim=1), strict=True))[name]


def test_rows_of_different_shape_have_different_features(context):
    described = features(context)
    assert torch.cdist(described, described).add(10 * torch.eye(len(context))).min() > 0.5


@pytest.mark.parametrize("scale", [1e-6, 0.1, 1e6])
def test_features_ignore_scale(gappy, scale):
    torch.testing.assert_close(features(gappy * scale), features(gappy), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [-3.0, 100.0])
def test_features_ignore_shift_by_many_standard_deviations(gappy, shift):
    spread = gappy.nan_to_num().std(dim=1, keepdim=True)
    torch.testing.assert_close(features(gappy + shift * spread), features(gappy), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("padding", [1, 28, 200])
def test_features_ignore_nan_before_the_first_value(gappy, padding):
    padded = torch.cat([torch.full((len(gappy), padding), torch.nan), gappy], dim=1)
    torch.testing.assert_close(features(padded), features(gappy), rtol=0, atol=1e-5)


@pytest.mark.parametrize("level", [1e4, 1e5])
def test_a_small_variation_shows_at_a_high_level(context, level):
    """What float32 leaves of the variation is described as if there were no level."""
    raised = context / context.std(dim=1, keepdim=True) + level
    left = (raised.double() - level).float()
    torch.testing.assert_close(features(raised), features(left), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("unit", [1e-30, 1e-20, 1e20, 1e30, 1e36])
def test_features_ignore_units_at_the_limits_of_float32(context, unit):
    torch.testing.assert_close(features(context * unit), features(context), rtol=1e-4, atol=1e-4)


def test_features_need_no_float64(gappy):
    """Accelerators such as MPS have none."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **kwargs or {})
            seen.extend(part.dtype for part in tree_leaves(output) if isinstance(part, torch.Tensor))
            return output

    features(gappy)  # what does not depend on the series is made on the processor, once
    with Watch():
        features(gappy)
    assert torch.float32 in seen
    assert not {torch.float64, torch.complex128} & set(seen)


def test_features_of_a_row_ignore_the_rest_of_the_batch(gappy):
    alone = torch.cat([features(row[None]) for row in gappy])
    torch.testing.assert_close(features(gappy), alone, rtol=0, atol=1e-6)


def test_features_read_the_last_steps_of_a_longer_context(make_context):
    context = make_context(length=300)
    assert torch.equal(features(context), features(context[:, -LENGTH:]))
    assert not torch.equal(features(context), features(context[:, :LENGTH]))


@pytest.mark.parametrize(
    "row",
    [
        [math.nan] * 40,
        [0.0] * 40,
        [0.1] * 40,
        [1e30] * 40,
        [1e-30] * 39 + [2e-30],
        [math.nan] * 39 + [5.0],
        [math.nan] * 38 + [5.0, 6.0],
        [1.0, math.nan] * 20,
        [math.inf, 1.0, -math.inf, 2.0],
        [0.0] * 39 + [1e20],
    ],
)
def test_odd_rows_have_finite_features_of_the_order_of_one(row):
    described = features(torch.tensor([row]))
    assert described.shape == (1, NUM_FEATURES)
    assert described.dtype == torch.float32
    assert described.isfinite().all()
    assert described.abs().max() <= 10


@pytest.mark.parametrize("max_length", [4, 16, 512])
def test_any_length_gives_the_same_number_of_features(gappy, max_length):
    assert series_features(gappy, max_length=max_length).shape == (len(gappy), NUM_FEATURES)


def test_a_constant_has_no_shape_at_any_level():
    levels = torch.tensor([[0.0], [0.1], [-7e5]]).expand(-1, 50)
    described = features(levels)
    assert torch.equal(described[0], described[1])
    assert torch.equal(described[0], described[2])
    assert part(described, "recent").abs().max() == 0
    assert part(described, "autocorrelation").abs().max() == 0


def test_rounding_is_no_shape():
    level = torch.full((1, 50), 7e5)
    rounded = torch.where(torch.arange(50) % 3 == 0, level.nextafter(torch.tensor(torch.inf)), level)
    assert not torch.equal(rounded, level)
    assert torch.equal(features(rounded), features(level))


def test_autocorrelation_equals_the_slow_sum(gappy):
    measured = part(features(gappy), "autocorrelation")
    for row, values in enumerate(gappy.double()):
        z = (values - values.nanmean()) / (values - values.nanmean()).square().nanmean().sqrt()
        for column, lag in enumerate(LAGS):
            pairs = [
                float(z[step] * z[step - lag])
                for step in range(lag, len(z))
                if z[step].isfinite() and z[step - lag].isfinite()
            ]
            expected = sum(pairs) / len(pairs) if len(pairs) >= 2 * lag else 0.0
            assert measured[row, column] == pytest.approx(expected, abs=1e-5)


def test_a_season_shows_in_its_lag_and_its_band():
    season = torch.sin(2 * torch.pi * torch.arange(LENGTH) / 12)[None]
    described = features(season)
    autocorrelation = dict(zip(LAGS, part(described, "autocorrelation")[0].tolist(), strict=True))
    assert autocorrelation[12] > 0.95
    assert autocorrelation[6] < -0.95
    band = int(math.log(LENGTH / 12) / math.log(LENGTH / 2) * NUM_BANDS)
    assert abs(int(part(described, "periodogram")[0].argmax()) - band) <= 1


def test_the_power_of_all_bands_sums_to_one(context):
    power = part(features(context), "periodogram").square().sum(dim=1)
    torch.testing.assert_close(power, torch.ones(len(context)))


def test_shape_by_hand():
    zeros, rising = [0.0, 0.0, 0.0, 4.0] * 8, [float(step) for step in range(32)]
    described = part(features(torch.tensor([zeros, rising])), "shape")
    skewness, kurtosis = 2 / math.sqrt(3), 7 / 3  # of a Bernoulli variable with probability 1/4
    assert described[0, 0] == pytest.approx(math.asinh(skewness), abs=1e-5)
    assert described[0, 1] == pytest.approx(math.log1p(kurtosis) - 1.4, abs=1e-5)
    assert described[0, 11] == pytest.approx(0.75)  # at its floor
    assert described[0, 10] == pytest.approx(16 / 31)  # unchanged
    assert described[1, 3] == pytest.approx(1, abs=1e-5)  # trend
    assert described[1, 7] == pytest.approx(0, abs=1e-5)  # bend
    assert described[1, 9] == pytest.approx(32 / LENGTH)  # span


def test_missingness_counts_from_the_first_value():
    row = torch.tensor([[math.nan] * 20 + [1.0, 2.0, math.nan, 4.0, math.nan, 6.0, 7.0, 9.0]])
    shape = part(features(row), "shape")[0]
    assert shape[8] == pytest.approx(2 / 8)
    assert shape[9] == pytest.approx(8 / LENGTH)


def test_recent_values_are_the_last_ones_standardised(context):
    z = (context - context.mean(dim=1, keepdim=True)) / context.std(dim=1, correction=0, keepdim=True)
    expected = torch.arcsinh(z[:, -NUM_RECENT:])
    torch.testing.assert_close(part(features(context), "recent"), expected, rtol=1e-4, atol=1e-4)
