"""Series features that do not change when a series is shifted or scaled."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LAGS = (1, 2, 3, 4, 6, 7, 8, 12, 24, 36, 48, 72, 96, 144, 168)
"""Steps at which the autocorrelation is taken."""
NUM_BANDS = 24
"""Bands of the periodogram, of equal width in log frequency."""
NUM_RECENT = 24
"""Latest values taken as they are, after standardisation."""
NUM_SHAPE = 12
"""Moments, trend, roughness, missingness, intermittency."""
NUM_FEATURES = len(LAGS) + NUM_BANDS + NUM_RECENT + NUM_SHAPE

TINY = torch.finfo(torch.float32).tiny


class Spectra(NamedTuple):
    """Sums over a standardised series ``z`` and over the mask of what was observed of it."""

    products: Float[Tensor, "batch lag"]  # of values that far apart
    pairs: Float[Tensor, "batch lag"]  # of observed values that far apart
    power: Float[Tensor, "batch frequency"]  # at the frequencies of a series of full length, without its mean


def fourier_spectra(z: Tensor, mask: Tensor, *, lags: Tensor, length: int) -> Spectra:
    """Sum through the fast Fourier transform."""
    spectrum = torch.fft.rfft(torch.stack([z, mask]), n=2 * length)  # as long again: lags do not wrap around
    power = spectrum.real.square() + spectrum.imag.square()
    products, pairs = torch.fft.irfft(power, n=2 * length)
    return Spectra(products[:, lags], pairs[:, lags], power[0, :, 2::2])


def direct_spectra(z: Tensor, mask: Tensor, *, lags: Tensor, length: int) -> Spectra:
    """Sum term by term and by one matrix product: the same where there is no fast Fourier transform, as in a graph."""
    step = torch.arange(z.shape[1])
    earlier = step - lags[:, None]  # (lag, time)
    reached = (earlier >= 0).float()
    earlier = earlier.clamp(min=0)
    products, pairs = ((part[:, earlier] * reached * part[:, None]).sum(dim=2) for part in (z, mask))
    turns = torch.outer(step, torch.arange(1, length // 2 + 1)) % length  # whole numbers: exact at any length
    angle = turns.double() * (2 * torch.pi / length)
    waves = torch.cat([angle.cos(), angle.sin()], dim=1).float()
    cosine, sine = (z @ waves).chunk(2, dim=1)
    return Spectra(products, pairs, cosine.square() + sine.square())


def series_features(
    context: Float[Tensor, "batch time"],
    *,
    max_length: int = 512,
    spectra: Callable[..., Spectra] = fourier_spectra,
) -> Float[Tensor, "batch feature"]:
    """Describe each series by its shape alone, from its last ``max_length`` steps.

    Moments, trend, recent values, autocorrelation, periodogram, missingness and intermittency, each of the order of
    one. A series is described the same whatever its unit and level, whatever stands beside it in the batch, and however
    many NaN precede its first value. NaN and constant series give finite features. In float32, of shape
    ``(batch, NUM_FEATURES)``.
    """
    length = max(max_length, NUM_RECENT)
    values = context[:, -max_length:].float()
    if values.shape[1] < NUM_RECENT:
        values = torch.nn.functional.pad(values, (NUM_RECENT - values.shape[1], 0), value=torch.nan)
    seen = values.isfinite()
    mask = seen.float()
    z = _standardized(values, seen, mask)
    lags = torch.tensor([lag if lag < z.shape[1] else 0 for lag in LAGS], device=z.device)
    sums = spectra(z, mask, lags=lags, length=length)
    parts = [
        _shape(z, seen, mask, max_length),
        _autocorrelation(sums.products, sums.pairs, lags=lags),
        _bands(sums.power),
        torch.arcsinh(z[:, -NUM_RECENT:]),
    ]
    return torch.cat(parts, dim=1).nan_to_num(0.0, 0.0, 0.0).clamp(-10, 10)


def _standardized(values: Tensor, seen: Tensor, mask: Tensor) -> Tensor:
    """Standardise over what was observed; what was not becomes 0, and so does a constant series.

    Values are centred twice and then divided by the largest, so that neither a high level nor a large or small unit
    costs digits of float32.
    """
    filled = torch.where(seen, values, 0.0)
    share = 1 / mask.sum(dim=1, keepdim=True).clamp(min=1)
    centred = torch.where(seen, filled - (filled * share).sum(dim=1, keepdim=True), 0.0)
    centred = torch.where(seen, centred - (centred * share).sum(dim=1, keepdim=True), 0.0)
    width = centred.abs().amax(dim=1, keepdim=True)
    z = centred / width.clamp(min=TINY)
    spread = (z.square().sum(dim=1, keepdim=True) * share).sqrt()
    floor = 1e-6 * filled.abs().amax(dim=1, keepdim=True)  # rounding of a constant at its level is no shape
    return torch.where(spread * width > floor, z / spread.clamp(min=TINY), 0.0)


def _shape(z: Tensor, seen: Tensor, mask: Tensor, max_length: int) -> Tensor:
    num_steps = z.shape[1]
    count = mask.sum(dim=1)
    some = count.clamp(min=1)
    first = torch.where(count > 0, seen.int().argmax(dim=1), num_steps)
    span = (num_steps - first).to(z.dtype)
    step_index = torch.arange(num_steps, device=z.device)
    time = (step_index - num_steps + 1).to(z.dtype) / num_steps
    age = (time - (mask @ time / some)[:, None]) * mask
    trend = (age * z).sum(dim=1) / (age.square().sum(dim=1) * some).sqrt().clamp(min=1e-9)
    square = z * z
    quarter = mask * (step_index >= (num_steps - (span / 4).floor() - 1)[:, None])
    in_quarter = quarter.sum(dim=1).clamp(min=1)
    step = z.diff(dim=1)
    pair = mask[:, 1:] * mask[:, :-1]
    pairs = pair.sum(dim=1).clamp(min=1)
    triple = pair[:, 1:] * pair[:, :-1]
    lowest = torch.where(seen, z, torch.inf).amin(dim=1, keepdim=True)
    return torch.stack(
        [
            torch.arcsinh((square * z).sum(dim=1) / some),
            torch.log1p(square.square().sum(dim=1) / some) - 1.4,  # about 0 for a normal distribution
            z.abs().sum(dim=1) / some,
            trend,
            (z * quarter).sum(dim=1) / in_quarter,
            ((square * quarter).sum(dim=1) / in_quarter).sqrt() - 1,
            torch.log1p((step.square() * pair).sum(dim=1) / pairs),
            torch.log1p((step.diff(dim=1).square() * triple).sum(dim=1) / triple.sum(dim=1).clamp(min=1)),
            1 - count / span.clamp(min=1),  # missing since the first value
            span / max_length,
            ((step == 0) * pair).sum(dim=1) / pairs,  # unchanged from one step to the next
            ((z == lowest) * mask).sum(dim=1) / some,  # at its floor, as zeros of intermittent demand are
        ],
        dim=1,
    )


def _autocorrelation(products: Tensor, pairs: Tensor, *, lags: Tensor) -> Tensor:
    """Take the mean product at each lag, where enough pairs were seen."""
    count = pairs.round()
    enough = (count >= 2 * lags) & (lags > 0)
    return torch.where(enough, products / count.clamp(min=1), 0.0)


def _bands(power: Tensor) -> Tensor:
    """Sum a periodogram without its mean in bands, as the square root of their share of the whole."""
    share = power @ _band_of(power.shape[1]).to(power.device)
    return (share / share.sum(dim=1, keepdim=True).clamp(min=1e-12)).sqrt()


@functools.cache
def _band_of(num_frequencies: int) -> Tensor:
    """Return which band each frequency falls into, one-hot: ``(frequency, band)``."""
    frequency = torch.arange(1, num_frequencies + 1, dtype=torch.float64)
    band = (frequency.log() / frequency[-1].log() * NUM_BANDS).long().clamp(max=NUM_BANDS - 1)
    return torch.nn.functional.one_hot(band, NUM_BANDS).float()


def pool_tokens(
    tokens: Float[Tensor, "batch token d_model"], *, observed: Bool[Tensor, "batch token"]
) -> Float[Tensor, "batch d_model"]:
    """Average the tokens of patches that hold a value; 0 where none does."""
    weight = observed.float()[..., None]
    return (tokens * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
