"""Series features that do not change when a series is shifted or scaled."""

import torch
from jaxtyping import Float
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


def series_features(context: Float[Tensor, "batch time"], *, max_length: int = 512) -> Float[Tensor, "batch feature"]:
    """Describe each series by its shape alone, from its last ``max_length`` steps.

    Moments, trend, recent values, autocorrelation, periodogram, missingness and intermittency, each of the order of
    one. A series is described the same whatever its unit and level, whatever stands beside it in the batch, and however
    many NaN precede its first value. NaN and constant series give finite features. In float32, of shape
    ``(batch, NUM_FEATURES)``.
    """
    values = context[:, -max_length:].double()
    length = max(max_length, NUM_RECENT)
    if values.shape[1] < length:
        values = torch.nn.functional.pad(values, (length - values.shape[1], 0), value=torch.nan)
    seen = values.isfinite()
    count = seen.sum(dim=1, keepdim=True).clamp(min=1)
    z = _standardized(values, seen)
    started = seen.int().cummax(dim=1).values.bool()  # from the first value on
    span = started.sum(dim=1, keepdim=True)
    parts = [
        _shape(z, seen, count, started, span, max_length),
        _autocorrelation(z, seen),
        _periodogram(z),
        torch.arcsinh(z[:, -NUM_RECENT:]),
    ]
    return torch.cat(parts, dim=1).nan_to_num(0.0, 0.0, 0.0).clamp(-10, 10).float()


def _standardized(values: Tensor, seen: Tensor) -> Tensor:
    """Standardise over what was observed; what was not becomes 0, and so does a constant series."""
    filled = torch.where(seen, values, 0.0)
    count = seen.sum(dim=1, keepdim=True).clamp(min=1)
    level = filled.sum(dim=1, keepdim=True) / count
    centred = torch.where(seen, values - level, 0.0)
    spread = (centred.square().sum(dim=1, keepdim=True) / count).sqrt()
    floor = 1e-6 * filled.abs().amax(dim=1, keepdim=True)  # rounding of a constant at its level is no shape
    return torch.where(spread > floor, centred / spread.clamp(min=1e-300), 0.0)


def _shape(z: Tensor, seen: Tensor, count: Tensor, started: Tensor, span: Tensor, max_length: int) -> Tensor:
    def mean(values: Tensor, where: Tensor) -> Tensor:
        return (values * where).sum(dim=1, keepdim=True) / where.sum(dim=1, keepdim=True).clamp(min=1)

    time = torch.linspace(-1, 0, z.shape[1], dtype=z.dtype, device=z.device)
    age = (time - mean(time.expand_as(z), seen)) * seen
    trend = (age * z).sum(dim=1, keepdim=True) / (age.square().sum(dim=1, keepdim=True) * count).sqrt().clamp(min=1e-9)
    quarter = seen & (torch.arange(z.shape[1], device=z.device) >= z.shape[1] - span // 4 - 1)
    latest, power = mean(z, quarter), mean(z.square(), quarter)
    step = z.diff(dim=1)
    pair = seen[:, 1:] & seen[:, :-1]
    bend, triple = step.diff(dim=1), pair[:, 1:] & pair[:, :-1]
    lowest = torch.where(seen, z, torch.inf).amin(dim=1, keepdim=True)
    return torch.cat(
        [
            torch.arcsinh(mean(z**3, seen)),
            torch.log1p(mean(z**4, seen)) - 1.4,  # about 0 for a normal distribution
            mean(z.abs(), seen),
            trend,
            latest,
            power.clamp(min=0).sqrt() - 1,
            torch.log1p(mean(step.square(), pair)),
            torch.log1p(mean(bend.square(), triple)),
            1 - seen.sum(dim=1, keepdim=True) / span.clamp(min=1),  # missing since the first value
            span / max_length,
            mean((step == 0).to(z.dtype), pair),  # unchanged from one step to the next
            mean((z == lowest).to(z.dtype), seen),  # at its floor, as zeros of intermittent demand are
        ],
        dim=1,
    )


def _autocorrelation(z: Tensor, seen: Tensor) -> Tensor:
    columns = []
    for lag in LAGS:
        if lag >= z.shape[1]:
            columns.append(torch.zeros_like(z[:, :1]))
            continue
        both = seen[:, lag:] & seen[:, :-lag]
        product = (z[:, lag:] * z[:, :-lag] * both).sum(dim=1, keepdim=True)
        enough = both.sum(dim=1, keepdim=True) >= 2 * lag
        columns.append(torch.where(enough, product / both.sum(dim=1, keepdim=True).clamp(min=1), 0.0))
    return torch.cat(columns, dim=1)


def _periodogram(z: Tensor) -> Tensor:
    power = torch.fft.rfft(z).abs().square()[:, 1:]
    frequency = torch.arange(1, power.shape[1] + 1, dtype=z.dtype, device=z.device)
    band = (frequency.log() / torch.log(frequency[-1]) * NUM_BANDS).long().clamp(max=NUM_BANDS - 1)
    share = torch.zeros(len(z), NUM_BANDS, dtype=z.dtype, device=z.device).index_add_(1, band, power)
    return (share / share.sum(dim=1, keepdim=True).clamp(min=1e-12)).sqrt()
