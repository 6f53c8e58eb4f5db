"""Synthetic corpora: series drawn with synforecast, stored once, and mixed into pretraining windows on the fly."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from synforecast import pretraining_pool
from torch.utils.data import Dataset

from chronomoe.data.windows import Window
from chronomoe.errors import InputError

SLOW_GENERATORS = ("KernelSynthGenerator", "GaussianProcessGenerator")
"""Generators that factorise a covariance matrix for each series, three orders of magnitude slower than the others."""
LENGTH_STEP = 16
"""Contexts of pretraining windows are multiples of this."""


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Which series are drawn."""

    seasonalities: tuple[int, ...] = (4, 7, 12, 24, 24, 48, 52, 96, 144, 168, 288)
    """Main periods in steps; each gets a pool of generators of its own."""
    series_per_generator: int = 100
    """Series of each generator in each pool."""
    slow_series_per_generator: int = 25
    """The same for the generators that take a tenth of a second or more for one series."""
    length: int = 1280
    """Steps of each series."""
    seed: int = 0
    """Seed of the generators."""

    def __post_init__(self) -> None:
        if min(self.seasonalities, default=0) < 2:
            raise InputError(f"seasonalities must be at least 2 steps, got {self.seasonalities}")
        if self.length < 64:
            raise InputError(f"corpus length must be at least 64 steps, got {self.length}")


def build_corpus(
    folder: Path, config: CorpusConfig, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> NDArray[np.float32]:
    """Draw the corpus into ``folder`` once and return it memory-mapped, ``(series, step)``, each series z-scored.

    A folder made with the same configuration is reused; an unfinished one is drawn again.

    Raises:
        InputError: ``folder`` holds a corpus of another configuration.
    """
    manifest = folder / "corpus.json"
    wanted = json.loads(json.dumps(asdict(config)))
    if manifest.exists():
        found = json.loads(manifest.read_text())
        if found != wanted:
            raise InputError(f"{folder} holds another corpus ({found}); choose another folder or delete it")
        return _mapped(folder)
    scratch = folder.with_name(folder.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    np.save(scratch / "series.npy", draw_corpus(config, progress=progress))
    (scratch / "corpus.json").write_text(json.dumps(wanted))
    scratch.rename(folder)
    return _mapped(folder)


def _mapped(folder: Path) -> NDArray[np.float32]:
    series: NDArray[np.float32] = np.load(folder / "series.npy", mmap_mode="r")
    return series


def draw_corpus(
    config: CorpusConfig, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> NDArray[np.float32]:
    """Draw all series of a corpus: the same seed draws the same ones."""
    blocks = []
    for index, seasonality in enumerate(config.seasonalities):
        progress(index, len(config.seasonalities))
        pool = pretraining_pool(
            min_length=config.length,
            max_length=config.length,
            freq="h",
            seed=config.seed + 10_000 * index,
            seasonal_period=seasonality,
            include_seasonal=True,
            n_meta_variants=2,
        )
        for generator in pool:
            slow = type(generator).__name__ in SLOW_GENERATORS
            count = config.slow_series_per_generator if slow else config.series_per_generator
            if count == 0:
                continue
            drawn = generator.generate(count)
            values = drawn[generator.target_col].to_numpy(dtype=np.float64).reshape(-1, config.length)
            blocks.append(_standardized(values))
    progress(len(config.seasonalities), len(config.seasonalities))
    series: NDArray[np.float32] = np.concatenate(blocks)
    return series[np.random.default_rng(config.seed).permutation(len(series))]


def _standardized(values: NDArray[np.float64]) -> NDArray[np.float32]:
    values = values[np.isfinite(values).all(axis=1)]
    spread = values.std(axis=1, keepdims=True)
    kept = spread[:, 0] > 1e-9
    centred = (values - values.mean(axis=1, keepdims=True))[kept] / spread[kept]
    clipped: NDArray[np.float32] = np.clip(centred, -30, 30).astype(np.float32)
    return clipped


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """How series become pretraining windows; shares are probabilities."""

    context_length: int = 512
    """Longest context."""
    min_context_length: int = 64
    """Shortest context."""
    horizon: int = 96
    """Future steps of each window."""
    full_context_share: float = 0.5
    """Batches with the longest context; the others draw a length, the same within a batch so that nothing is padded."""
    mixup_share: float = 0.4
    """Windows that are convex mixtures of two or three series (TSMixup, https://arxiv.org/abs/2403.07815)."""
    stride_share: float = 0.2
    """Windows that take every second step where the series is long enough."""
    reverse_share: float = 0.1
    """Windows that run backwards in time."""
    missing_share: float = 0.1
    """Windows that lose stretches of their context."""
    group_share: float = 0.08
    """Batches of multivariate groups and known covariates."""
    max_group_size: int = 4
    """Rows of the largest group."""

    def __post_init__(self) -> None:
        if not LENGTH_STEP <= self.min_context_length <= self.context_length:
            raise InputError(
                f"min_context_length must be from {LENGTH_STEP} to context_length ({self.context_length}), "
                f"got {self.min_context_length}"
            )
        if self.max_group_size < 2:
            raise InputError(f"max_group_size must be at least 2 rows, got {self.max_group_size}")


class PretrainingWindows(Dataset[Window]):
    """Windows cut on the fly: window ``i`` depends on the seed and on ``i`` alone, so any process can cut it."""

    def __init__(
        self,
        series: NDArray[np.float32],
        config: MixConfig,
        *,
        size: int,
        batch_size: int,
        seed: int,
        first: int = 0,
    ) -> None:
        self.series, self.config = series, config
        self.size, self.batch_size, self.seed, self.first = size, batch_size, seed, first

    def __len__(self) -> int:
        return self.size - self.first

    def __getitem__(self, index: int) -> Window:
        if not 0 <= index < len(self):
            raise IndexError(index)
        index += self.first
        batch = np.random.default_rng([self.seed, 0, index // self.batch_size])
        rng = np.random.default_rng([self.seed, 1, index])
        config = self.config
        length = config.context_length
        if batch.random() >= config.full_context_share:
            shortest, longest = config.min_context_length // LENGTH_STEP, config.context_length // LENGTH_STEP
            length = int(batch.integers(shortest, longest + 1)) * LENGTH_STEP
        if batch.random() < config.group_share:
            return self._group(rng, length)._replace(index=index)
        row = self._row(rng, length)[None]
        unknown = np.full((1, config.horizon), np.nan, dtype=np.float32)
        return Window(row[:, :length], row[:, length:], unknown, index)

    def _row(self, rng: np.random.Generator, length: int) -> NDArray[np.float32]:
        config = self.config
        steps = length + config.horizon
        count = int(rng.integers(2, 4)) if rng.random() < config.mixup_share else 1
        weight = rng.dirichlet(np.full(count, 1.5)).astype(np.float32)
        row = np.zeros(steps, dtype=np.float32)
        stride = 2 if rng.random() < config.stride_share and 2 * steps <= self.series.shape[1] else 1
        for share in weight:
            source = self.series[rng.integers(len(self.series))]
            start = rng.integers(0, len(source) - stride * steps + 1)
            piece = source[start : start + stride * steps : stride]
            if count > 1:
                piece = (piece - piece[:length].mean()) / (piece[:length].std() + 1e-3)
            row += share * piece
        if rng.random() < config.reverse_share:
            row = row[::-1].copy()
        if rng.random() < config.missing_share:
            for _ in range(int(rng.integers(1, 4))):
                gap = int(rng.integers(1, max(2, length // 6)))
                first = int(rng.integers(0, length - gap))
                row[first : first + gap] = np.nan
        return row

    def _group(self, rng: np.random.Generator, length: int) -> Window:
        """Rows that share drivers; some are covariates whose future is known and which drive the target."""
        config = self.config
        size = int(rng.integers(2, config.max_group_size + 1))
        source = np.nan_to_num(np.stack([self._row(rng, length) for _ in range(size)]))
        mixing = rng.normal(size=(size, size)).astype(np.float32) * (rng.random((size, size)) < rng.random())
        np.fill_diagonal(mixing, 1.0)
        num_known = int(rng.integers(1, size)) if rng.random() < 0.5 else 0
        mixing[size - num_known :] = np.eye(size, dtype=np.float32)[size - num_known :]
        rows = mixing @ source
        lag = int(rng.integers(0, 4))
        if num_known and lag:
            rows[: size - num_known, lag:] += source[size - 1, :-lag] * rng.normal()
        known = np.full((size, config.horizon), np.nan, dtype=np.float32)
        target = rows[:, length:].copy()
        if num_known:
            known[-num_known:] = target[-num_known:]
            target[-num_known:] = np.nan
        return Window(rows[:, :length], target, known, 0)
