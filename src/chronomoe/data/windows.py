"""Windows: one context and what follows it, cut at a cutoff, with all rows of its group."""

import bisect
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import ConcatDataset, Dataset

from chronomoe.data.domains import Domain
from chronomoe.data.series import Series
from chronomoe.data.split import Part
from chronomoe.data.table import lengths_of
from chronomoe.errors import InputError
from chronomoe.models.configuration import configuration


class Window(NamedTuple):
    """One group of rows cut at one cutoff: first the target's variates, then the covariates.

    NaN means missing in ``context``; no loss is taken where ``target`` is NaN, as in every covariate row.
    """

    context: NDArray[np.float32]
    """Past values, oldest first, ``(row, time)``."""
    target: NDArray[np.float32]
    """What followed, ``(row, horizon)``."""
    known: NDArray[np.float32]
    """Covariates known into the future, ``(row, horizon)``; NaN where not known."""
    index: int  # type: ignore[assignment]  # hides tuple.index
    """Which window of its data set this is."""


@configuration
class WindowConfig:
    """The shape of a window."""

    context_length: int = Field(512, ge=1)
    """Most past steps."""
    horizon: int = Field(48, ge=1)
    """Future steps."""
    min_context_length: int = Field(32, ge=1)
    """Fewest past steps."""
    full_context_share: float = Field(0.8, ge=0, le=1)
    """Training windows with all the context there is; the others keep a random number of its latest steps."""

    def __post_init__(self) -> None:
        if self.min_context_length > self.context_length:
            raise InputError(
                f"min_context_length must be from 1 to context_length ({self.context_length}), "
                f"got {self.min_context_length}"
            )


def cut_window(series: Series, cutoff: int, *, context_length: int, horizon: int, index: int = 0) -> Window:
    """Cut the window whose first target step is row ``cutoff``."""
    past, future = slice(max(0, cutoff - context_length), cutoff), slice(cutoff, cutoff + horizon)
    past_only = [values for name, values in series.covariates.items() if name not in series.known]
    known = [series.covariates[name] for name in series.known]
    rows = np.concatenate([series.target[:, past], *(values[None, past] for values in (*past_only, *known))])
    target = np.full((len(rows), horizon), np.nan, dtype=np.float32)
    seen = series.target[:, future]
    target[: len(series.target), : seen.shape[1]] = seen
    future_known = np.full((len(rows), horizon), np.nan, dtype=np.float32)
    if known:
        values = np.stack(known)[:, future]
        future_known[-len(known) :, : values.shape[1]] = values
    return Window(np.ascontiguousarray(rows, dtype=np.float32), target, future_known, index)


class _Spans(NamedTuple):
    """The cutoffs of the series that are long enough: ``first`` to ``last`` of each, both included."""

    series: NDArray[np.int64]
    first: NDArray[np.int64]
    last: NDArray[np.int64]


def _spans(domain: Domain, part: Part, config: WindowConfig) -> _Spans:
    lengths, back = np.unique(lengths_of(domain.series), return_inverse=True)
    rows = [domain.cutoffs.of(int(length)).rows(part) for length in lengths]
    first = np.array([max(each.start, config.min_context_length) for each in rows])[back]
    last = np.array([each.stop - config.horizon for each in rows])[back]
    series = np.flatnonzero(first <= last)
    if not len(series):
        raise InputError(
            f"no series of domain {domain.name!r} has a {part} part that holds a context of "
            f"{config.min_context_length} and a horizon of {config.horizon} steps; "
            "shorten the horizon, move the cutoffs or pass longer series"
        )
    return _Spans(series, first[series], last[series])


def check_seed(seed: int) -> None:
    """Refuse a seed that not every generator takes."""
    if not 0 <= seed < 2**32:
        raise InputError(f"seed must be from 0 to {2**32 - 1}, got {seed}")


class TrainingWindows(Dataset[Window]):
    """Windows drawn at random: window ``i`` depends on the seed and ``i`` alone, and is cut when it is read.

    Any number of processes can therefore share the work in any order, a run can resume anywhere, and series that stay
    on disk are never in memory together. Domains take turns; within one, longer series are drawn more often.

    Raises:
        InputError: a domain has no series long enough, or the seed is negative.
    """

    def __init__(
        self, domains: Sequence[Domain], config: WindowConfig, *, size: int, seed: int, part: Part = "train"
    ) -> None:
        check_seed(seed)
        self.domains, self.config, self.size, self.seed = list(domains), config, size, seed
        self._spans = [_spans(domain, part, config) for domain in self.domains]
        counts = [spans.last - spans.first + 1 for spans in self._spans]
        totals = [np.cumsum(count / count.sum()) for count in counts]
        self._chances = [total / total[-1] for total in totals]
        self.skipped = {
            domain.name: len(domain.series) - len(spans.series)
            for domain, spans in zip(self.domains, self._spans, strict=True)
        }
        """Series too short to give a window, by domain."""

    def __len__(self) -> int:
        return self.size

    def domain_of(self, index: int) -> int:
        """Return which domain window ``index`` is cut from."""
        return index % len(self.domains)

    def __getitem__(self, index: int) -> Window:
        if not 0 <= index < len(self):
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, index])
        place = self.domain_of(index)
        spans = self._spans[place]
        span = int(np.searchsorted(self._chances[place], rng.random(), side="right"))
        cutoff = int(rng.integers(spans.first[span], spans.last[span] + 1))
        length = self.config.context_length
        if rng.random() >= self.config.full_context_share:
            length = int(rng.integers(self.config.min_context_length, length + 1))
        series = self.domains[place].series[int(spans.series[span])]
        return cut_window(series, cutoff, context_length=length, horizon=self.config.horizon, index=index)


WATCHED, CHOSEN_BY = 0, 1
"""Halves of the validation windows: what training looks at (early stopping, shares of steps, layers kept, experts
selected), and what finished models are chosen by, which is fair only where no model has seen them."""


class EvaluationWindows(Dataset[Window]):
    """Windows at regular cutoffs of one part of one domain; at most ``limit``, evenly spread.

    Cutoffs are ``stride`` steps apart, by default a horizon.

    ``half`` keeps every other one, from the first or from the second; a single window is in both halves.
    """

    def __init__(
        self,
        domain: Domain,
        config: WindowConfig,
        *,
        part: Part,
        limit: int | None = None,
        half: int | None = None,
        stride: int | None = None,
    ) -> None:
        self.domain, self.config = domain, config
        places = [
            (int(index), cutoff)
            for index, first, last in zip(*_spans(domain, part, config), strict=True)
            for cutoff in range(int(first), int(last) + 1, stride or config.horizon)
        ]
        if half is not None and len(places) > 1:
            places = places[half::2]
        if limit is not None and len(places) > limit:
            places = [places[index] for index in np.linspace(0, len(places) - 1, limit).round().astype(int)]
        self.places = places
        """Series and cutoff of each window."""
        self.skipped = len(domain.series) - len({series for series, _ in places})
        """Series too short to give a window, or left out by ``limit``."""

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Window:
        if not 0 <= index < len(self):
            raise IndexError(index)
        series, cutoff = self.places[index]
        return cut_window(
            self.domain.series[series],
            cutoff,
            context_length=self.config.context_length,
            horizon=self.config.horizon,
            index=index,
        )


class JoinedWindows(ConcatDataset[Window]):
    """Windows of several data sets, one after the other, numbered on."""

    def owner(self, index: int) -> int:
        """Return which data set window ``index`` is from."""
        return bisect.bisect_right(self.cumulative_sizes, index)

    def __getitem__(self, index: int) -> Window:
        window: Window = super().__getitem__(index)
        return window._replace(index=index)


def digest(window: Window) -> int:
    """Return a number that changes with anything a forecast depends on: values, covariates, group composition."""
    shapes = repr((window.context.shape, window.known.shape)).encode()
    return zlib.crc32(window.known.tobytes(), zlib.crc32(window.context.tobytes(), zlib.crc32(shapes)))


Batch = dict[str, Any]
"""Inputs of a model and bookkeeping: tensors, and the number of output patches."""


def collate(windows: Sequence[Window], *, patch_size: int) -> Batch:
    """Stack windows into the inputs of ``Chronos2Model.forward``, with ``window`` and ``digest`` of each group.

    Contexts are padded on the left with NaN to the longest of the batch and every window is a group of its own.
    """
    horizon = max(window.target.shape[1] for window in windows)
    sizes = torch.tensor([len(window.context) for window in windows])
    batch: Batch = {
        "context": _stack([window.context for window in windows], padding_side="left"),
        "future_target": _stack([window.target for window in windows]),
        "group_ids": torch.repeat_interleave(torch.arange(len(windows)), sizes),
        "num_output_patches": -(-horizon // patch_size),
        "window": torch.tensor([window.index for window in windows]),
        "digest": torch.tensor([digest(window) for window in windows]),
    }
    if any(not np.isnan(window.known).all() for window in windows):
        batch["future_covariates"] = _stack([window.known for window in windows])
    return batch


def _stack(groups: Sequence[NDArray[np.float32]], padding_side: str = "right") -> Tensor:
    rows = [row for group in groups for row in torch.from_numpy(group)]
    return pad_sequence(rows, batch_first=True, padding_value=torch.nan, padding_side=padding_side)


MODEL_INPUTS = ("context", "group_ids", "future_covariates", "num_output_patches")
"""Keys of a batch that a model forecasts from."""


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return a batch with its tensors on a device."""
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


def model_inputs(batch: Batch) -> Batch:
    """Return what a model forecasts from, without targets and bookkeeping."""
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}
