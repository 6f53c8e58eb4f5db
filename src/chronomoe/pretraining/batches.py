"""Pretraining batches, cut from a corpus on the fly: all windows of one length, so that nothing is padded."""

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import numpy as np
from jaxtyping import Float
from pydantic import Field
from torch.utils.data import Dataset

from chronomoe.data.windows import Batch, Window, collate, model_inputs
from chronomoe.errors import InputError
from chronomoe.models.configuration import configuration
from chronomoe.pretraining.corpus import Corpus
from chronomoe.pretraining.grouping import ANY, SIMPLE, couple, covariate_window, multivariate_window, unit

LENGTH_STEP = 32
"""Shorter contexts are multiples of about this, and of the patch size."""
MOST_ROWS = 4
"""A batch of short windows has at most this many times the rows of one of full windows."""
Share = Annotated[float, Field(ge=0, le=1)]
PHASE_SHARES = ("group_share", "simple_share", "positive_share")
"""Shares that a phase can have of its own."""


@configuration
class MixConfig:
    """How series become pretraining windows; shares are probabilities."""

    context_length: int = 512
    """Longest context."""
    min_context_length: int = 64
    """Shortest context."""
    horizon: int = Field(96, ge=1)
    """Most future steps; each batch draws how many of its patches are forecast."""
    full_context_share: Share = 0.5
    """Batches with the longest context; the others draw a length."""
    ragged_share: Share = 0.25
    """Batches whose contexts begin within a patch."""
    composed_share: Share = 0.5
    """Rows from composed series, where the corpus has them."""
    real_share: Share = 0.05
    """Rows from real series, where the corpus has them."""
    mixup_share: Share = 0.3
    """Rows that are convex mixtures of two or three series (TSMixup, https://arxiv.org/abs/2403.07815)."""
    stride_share: Share = 0.15
    """Rows that take every second to fourth step where the series is long enough."""
    reverse_share: Share = 0.05
    """Rows that run backwards in time."""
    flip_share: Share = 0.1
    """Rows that are turned upside down."""
    missing_share: Share = 0.1
    """Windows that lose stretches or single steps of their context."""
    group_share: Share = 0.2
    """Batches of groups."""
    covariate_share: Share = 0.6
    """Batches of groups that are a target and covariates; the others are several targets."""
    simple_share: Share = 0.5
    """Windows with covariates, of which there are one or two, all known, whose effects are strong and mostly linear."""
    positive_share: Share = 0.8
    """Effects of covariates that are positive."""
    max_group_size: int = Field(4, ge=2)
    """Rows of the largest group."""

    def __post_init__(self) -> None:
        if not LENGTH_STEP // 2 <= self.min_context_length <= self.context_length:
            raise InputError(
                f"min_context_length must be from {LENGTH_STEP // 2} to context_length ({self.context_length}), "
                f"got {self.min_context_length}"
            )
        if self.composed_share + self.real_share > 1:
            raise InputError(
                f"composed_share and real_share must not exceed 1 together, got {self.composed_share + self.real_share}"
            )


@configuration
class Phase:
    """A stretch of the training."""

    steps: int = Field(ge=1)
    """Optimiser steps."""
    context_length: int = Field(ge=1)
    """Longest context."""
    batch_size: int = Field(ge=1)
    """Windows of a batch, on each process, when they have the longest context and forecast all patches."""
    group_share: Share | None = None
    """Batches of groups in this phase; the mix's when None."""
    simple_share: Share | None = None
    """Windows with few covariates of strong effects in this phase; the mix's when None."""
    positive_share: Share | None = None
    """Effects of covariates that are positive in this phase; the mix's when None."""


class BatchShape(NamedTuple):
    """What all windows of a batch share."""

    context_length: int
    horizon: int
    rows: int
    """About as many tokens as a batch of full windows has."""
    kind: str
    """``single``, ``coupled`` or ``covariates``."""
    simple_share: float
    """Windows with few covariates of strong effects."""
    positive_share: float
    """Effects of covariates that are positive."""


class PretrainingBatches(Dataset[Batch]):
    """Ready batches: batch ``i`` depends on the seed and on ``i`` alone, so any process or worker can make it.

    The parts of a corpus that have series share out what the empty ones leave.

    Args:
        corpus: where series come from.
        config: how they become windows.
        phases: in their order.
        patch_size: the model's.
        processes: batches of each optimiser step.
        seed: of everything drawn here.
        first: leave out this many batches, done before.

    Raises:
        InputError: no part of the corpus has both series and a share.
    """

    def __init__(
        self,
        corpus: Corpus,
        config: MixConfig,
        *,
        phases: Sequence[Phase],
        patch_size: int,
        seed: int,
        processes: int = 1,
        first: int = 0,
    ) -> None:
        self.corpus, self.config, self.phases, self.patch_size = corpus, config, tuple(phases), patch_size
        self.seed, self.processes, self.first = seed, processes, first
        self._sources = [part for part in (corpus.drawn, corpus.composed, corpus.real) if len(part)]
        shares = [1 - config.composed_share - config.real_share, config.composed_share, config.real_share]
        chances = np.array([share for share, part in zip(shares, corpus, strict=False) if len(part)])
        if not chances.sum() > 0:
            raise InputError(
                "a mix needs series of a share above 0, got "
                + ", ".join(
                    f"{len(part)} {name}" for name, part in zip(("drawn", "composed", "real"), corpus, strict=False)
                )
                + f" in shares of {', '.join(f'{share:g}' for share in shares)}; draw more, or change the shares"
            )
        self._chances = chances / chances.sum()

    def __len__(self) -> int:
        return sum(phase.steps for phase in self.phases) * self.processes - self.first

    def __getitem__(self, index: int) -> Batch:
        batch = collate(self.windows(index), patch_size=self.patch_size)
        return {**model_inputs(batch), "future_target": batch["future_target"]}

    def windows(self, index: int) -> list[Window]:
        """Cut the windows of one batch."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shape = self.shape(index)
        windows: list[Window] = []
        rows = 0
        while rows < shape.rows:
            window = self._window(np.random.default_rng([self.seed, 1, index + self.first, len(windows)]), shape)
            rows += len(window.context)
            if rows > shape.rows and windows:
                break
            windows.append(window._replace(index=len(windows)))
        return windows

    def shape(self, index: int) -> BatchShape:
        """Draw the shape of one batch."""
        config, patch = self.config, self.patch_size
        rng = np.random.default_rng([self.seed, 0, index + self.first])
        phase = self._phase((index + self.first) // self.processes)
        length = phase.context_length
        if rng.random() >= config.full_context_share:
            step = patch * max(1, min(LENGTH_STEP, length) // patch)
            longest = length // step
            shortest = min(longest, -(-config.min_context_length // step))
            length = int(rng.integers(shortest, longest + 1)) * step
        most = config.horizon // patch
        ahead = int(rng.integers(1, most + 1))
        kind = "single"
        share = {name: getattr(config if getattr(phase, name) is None else phase, name) for name in PHASE_SHARES}
        if rng.random() < share["group_share"]:
            kind = "covariates" if rng.random() < config.covariate_share else "coupled"
        tokens = length // patch + 1 + ahead
        if patch > 1 and rng.random() < config.ragged_share:
            length = max(min(length, config.min_context_length), length - int(rng.integers(1, patch)))
        rows = round(phase.batch_size * (phase.context_length // patch + 1 + most) / tokens)
        rows = min(rows, MOST_ROWS * phase.batch_size)
        return BatchShape(length, ahead * patch, rows, kind, share["simple_share"], share["positive_share"])

    def _phase(self, step: int) -> Phase:
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        return self.phases[-1]

    def _window(self, rng: np.random.Generator, shape: BatchShape) -> Window:
        length, config = shape.context_length, self.config
        steps = length + shape.horizon
        if shape.kind == "single":
            window = multivariate_window(self._row(rng, steps)[None], length=length)
        elif shape.kind == "covariates":
            simple = rng.random() < shape.simple_share
            window = covariate_window(
                rng,
                lambda: self._row(rng, steps),
                num_covariates=int(rng.integers(1, min(3, config.max_group_size) if simple else config.max_group_size)),
                length=length,
                driving=SIMPLE if simple else ANY,
                positive_share=shape.positive_share,
            )
        else:
            window = multivariate_window(self._rows(rng, steps), length=length)
        if rng.random() < config.missing_share:
            _lose(rng, window.context)
        return window

    def _rows(self, rng: np.random.Generator, steps: int) -> Float[np.ndarray, "row time"]:
        """Draw coupled rows: from stored groups, or coupled here."""
        size = int(rng.integers(2, self.config.max_group_size + 1))
        groups = self.corpus.groups
        if len(groups) and size <= groups.shape[1] and rng.random() < 0.5:
            start = int(rng.integers(0, groups.shape[2] - steps + 1))
            chosen = rng.permutation(groups.shape[1])[:size]
            return np.asarray(groups[int(rng.integers(len(groups)))][chosen, start : start + steps], dtype=np.float64)
        return couple(rng, np.stack([self._row(rng, steps) for _ in range(size)]))

    def _row(self, rng: np.random.Generator, steps: int) -> Float[np.ndarray, " time"]:
        config = self.config
        count = int(rng.integers(2, 4)) if rng.random() < config.mixup_share else 1
        if count == 1:
            row = self._piece(rng, steps)
        else:
            weight = rng.dirichlet(np.full(count, 1.5))
            row = weight @ unit(np.stack([self._piece(rng, steps) for _ in range(count)]))
        if rng.random() < config.reverse_share:
            row = row[::-1]
        return -row if rng.random() < config.flip_share else row

    def _piece(self, rng: np.random.Generator, steps: int) -> Float[np.ndarray, " time"]:
        source = self._sources[int(rng.choice(len(self._sources), p=self._chances))]
        row = source[int(rng.integers(len(source)))]
        longest = len(row) // steps
        stride = (
            int(rng.integers(2, min(4, longest) + 1)) if rng.random() < self.config.stride_share and longest > 1 else 1
        )
        start = int(rng.integers(0, len(row) - stride * steps + 1))
        return np.asarray(row[start : start + stride * steps : stride])


def _lose(rng: np.random.Generator, context: Float[np.ndarray, "row time"]) -> None:
    """Make stretches, or single steps, of each row NaN, in place."""
    length = context.shape[1]
    for row in context:
        if rng.random() < 0.3:
            row[rng.random(length) < rng.uniform(0.01, 0.4)] = np.nan
            continue
        for _ in range(int(rng.integers(1, 4))):
            gap = int(rng.integers(1, max(2, length // 6)))
            first = int(rng.integers(0, length - gap))
            row[first : first + gap] = np.nan
