"""Corpora for pretraining: synthetic series drawn once and stored, and public real ones if asked for."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from pydantic import Field

from chronomoe.errors import InputError, extra
from chronomoe.models.configuration import configuration
from chronomoe.pretraining.composing import compose
from chronomoe.pretraining.real_series import real_pieces

SLOW_GENERATORS = ("KernelSynthGenerator", "GaussianProcessGenerator")
"""Generators that factorise a covariance matrix for each series, three orders of magnitude slower than the others."""
PERIODS = (4, 7, 12, 24, 24, 48, 52, 96, 144, 168, 288)
"""Usual numbers of steps in a season."""
GROUP_ROWS = 4
"""Rows of each stored group."""
MOST_SPREADS = 30.0
"""Standardised values are clipped here."""

Progress = Callable[[int, int], None]
"""Told how many of how many parts of a corpus are done."""


def no_progress(done: int, total: int) -> None:
    """Report nothing."""


@configuration
class CorpusConfig:
    """Which series are drawn."""

    seasonalities: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        (4, 7, 12, 24, 24, 48, 52, 96, 144, 168, 288), min_length=1
    )
    """Main periods in steps; each gets a pool of synforecast's generators of its own."""
    series_per_generator: int = Field(100, ge=0)
    """Series of each generator in each pool."""
    slow_series_per_generator: int = Field(25, ge=0)
    """The same for the generators that take a tenth of a second or more for one series."""
    composed_series: int = Field(0, ge=0)
    """Series composed of calendar profiles, levels, noise and measurement."""
    groups: int = Field(0, ge=0)
    """Groups of four rows that synforecast's Multivariatizer couples or its vector autoregression draws."""
    real: tuple[str, ...] = ()
    """Public real series inside installed packages, by name; ``chronomoe.pretraining.real_series`` lists them."""
    length: int = Field(1280, ge=64)
    """Steps of each series."""
    seed: int = 0
    """Seed of the generators."""


class Corpus(NamedTuple):
    """Series of one length, each z-scored; a part can be empty, but the first."""

    drawn: Float[np.ndarray, "series step"]
    """By synforecast's generators."""
    composed: Float[np.ndarray, "series step"]
    """By :func:`chronomoe.pretraining.composing.compose`."""
    real: Float[np.ndarray, "series step"]
    """Pieces of public real series; NaN where missing."""
    groups: Float[np.ndarray, "group row step"]
    """Rows of a group say something about each other."""


def build_corpus(folder: Path, config: CorpusConfig, *, progress: Progress = no_progress) -> Corpus:
    """Draw the corpus into ``folder`` once and return it memory-mapped.

    A folder made with the same configuration is reused; an unfinished one is drawn again.

    Raises:
        InputError: ``folder`` holds a corpus of another configuration, or a package with real series is missing.
    """
    manifest = folder / "corpus.json"
    wanted: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    if manifest.exists():
        found = json.loads(manifest.read_text())
        if found != wanted:
            raise InputError(f"{folder} holds another corpus ({found}); choose another folder or delete it")
        return _mapped(folder)
    scratch = folder.with_name(folder.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for name, values in draw_corpus(config, progress=progress)._asdict().items():
        np.save(scratch / f"{name}.npy", values)
    (scratch / "corpus.json").write_text(json.dumps(wanted))
    scratch.rename(folder)
    return _mapped(folder)


def _mapped(folder: Path) -> Corpus:
    return Corpus(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in Corpus._fields))


def draw_corpus(config: CorpusConfig, *, progress: Progress = no_progress) -> Corpus:
    """Draw all series of a corpus: the same seed draws the same ones."""
    real = real_pieces(config.real, length=config.length)  # first, as it can be refused
    pools = len(config.seasonalities)
    blocks, groups = [np.empty((0, config.length), dtype=np.float32)], []
    for index, seasonality in enumerate(config.seasonalities):
        progress(index, pools + 1)
        pool = _pool(config, index, seasonality)
        for generator in pool:
            slow = type(generator).__name__ in SLOW_GENERATORS
            count = config.slow_series_per_generator if slow else config.series_per_generator
            if count:
                blocks.append(standardized(_values(generator, generator.generate(count), config.length)))
        share = (config.groups * (index + 1)) // pools - (config.groups * index) // pools
        groups.append(_draw_groups(config, pool, share, seed=config.seed + 10_000 * index))
    progress(pools, pools + 1)
    composed = np.empty((config.composed_series, config.length), dtype=np.float32)
    for index in range(config.composed_series):
        composed[index] = compose(np.random.default_rng([config.seed, 2, index]), config.length)
    progress(pools + 1, pools + 1)
    drawn = np.concatenate(blocks)
    order = np.random.default_rng(config.seed).permutation(len(drawn))
    return Corpus(drawn[order], standardized(composed), real, np.concatenate(groups))


def _pool(config: CorpusConfig, index: int, seasonality: int) -> list[Any]:
    with extra("pretrain"):
        from synforecast import pretraining_pool
    pool: list[Any] = pretraining_pool(
        min_length=config.length,
        max_length=config.length,
        freq="h",
        seed=config.seed + 10_000 * index,
        seasonal_period=seasonality,
        include_seasonal=True,
        n_meta_variants=2,
    )
    return pool


def _draw_groups(config: CorpusConfig, pool: list[Any], count: int, *, seed: int) -> NDArray[np.float32]:
    """Draw groups: three quarters couple series of one generator of the pool, the others are autoregressions."""
    with extra("pretrain"):
        from synforecast import Multivariatizer
        from synforecast.generators import VARGenerator
    fast = [generator for generator in pool if type(generator).__name__ not in SLOW_GENERATORS]
    rng = np.random.default_rng([seed, 3])
    groups = np.empty((count, GROUP_ROWS, config.length), dtype=np.float32)
    filled = 0
    while filled < count:
        source: Any
        if rng.random() < 0.25:
            lengths = {"min_length": config.length, "max_length": config.length}
            source = VARGenerator(**lengths, freq="h", seed=int(rng.integers(2**31)), lag_order=int(rng.integers(1, 4)))
            frame, named = source.generate(GROUP_ROWS), source
        else:
            named = fast[int(rng.integers(len(fast)))]
            source = Multivariatizer(base=named, seed=int(rng.integers(2**31)))
            frame = source.generate(GROUP_ROWS)
        rows = standardized(_values(named, frame, config.length))
        if len(rows) == GROUP_ROWS:
            groups[filled] = rows
            filled += 1
    return groups


def _values(generator: Any, frame: Any, length: int) -> NDArray[np.float64]:
    values: NDArray[np.float64] = frame[generator.target_col].to_numpy(dtype=np.float64).reshape(-1, length)
    return values


def standardized(values: NDArray[Any]) -> NDArray[np.float32]:
    """Z-score rows and clip them; rows that are constant or not finite are left out."""
    values = np.asarray(values[np.isfinite(values).all(axis=1)], dtype=np.float64)
    spread = values.std(axis=1, keepdims=True)
    kept = spread[:, 0] > 1e-9
    centred = (values - values.mean(axis=1, keepdims=True))[kept] / spread[kept]
    clipped: NDArray[np.float32] = np.clip(centred, -MOST_SPREADS, MOST_SPREADS).astype(np.float32)
    return clipped
