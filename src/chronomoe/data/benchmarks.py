"""The data sets of the long-horizon benchmarks (ETT, weather, traffic, electricity) in their usual CSV layout."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from chronomoe.data.checks import as_timestamps
from chronomoe.data.files import check_file, read_table
from chronomoe.data.frames import DATE, frame_to_series
from chronomoe.data.series import TARGET, TIMESTAMP
from chronomoe.data.split import Split
from chronomoe.data.table import SeriesTable
from chronomoe.errors import InputError


class Benchmark(NamedTuple):
    """What is known about a data set of the long-horizon benchmarks."""

    freq: str
    split: Split
    description: str


_ETT_HOURS = Split(stops=(8640, 11520, 14400))  # 12, 4 and 4 months of 30 days
_ETT_QUARTERS = Split(stops=(34560, 46080, 57600))
BENCHMARKS = {
    "ETTh1": Benchmark("h", _ETT_HOURS, "oil temperature and load of an electricity transformer, hourly"),
    "ETTh2": Benchmark("h", _ETT_HOURS, "oil temperature and load of another electricity transformer, hourly"),
    "ETTm1": Benchmark("15min", _ETT_QUARTERS, "oil temperature and load of an electricity transformer, 15 minutes"),
    "ETTm2": Benchmark("15min", _ETT_QUARTERS, "oil temperature and load of another transformer, 15 minutes"),
    "weather": Benchmark("10min", Split(), "21 weather indicators in Jena, 2020, every 10 minutes"),
    "traffic": Benchmark("h", Split(), "occupancy of 862 road sections in San Francisco, hourly"),
    "electricity": Benchmark("h", Split(), "load of 321 clients, hourly"),
}
"""The data sets of the long-horizon benchmarks: step, split and what they are."""


def read_benchmark(
    name: str,
    folder: str | os.PathLike[str],
    *,
    target: str | Sequence[str] = TARGET,
    known_covariates: Sequence[str] = (),
    freq: str | None = None,
) -> SeriesTable:
    """Read ``<name>.csv``, or else ``<name>.parquet``, from a folder or one below it: a time column, then the series.

    The benchmarks count rows, and ``weather.csv`` lacks some times, so each row counts as one step after the one before
    whatever its time says. Values stay as they are, the -9999 in ``weather.csv`` too. Options as ``frame_to_series``.

    Raises:
        InputError: no such file, or it breaks a rule of ``frame_to_series``.
    """
    check_file(Path(folder))
    named = [path for suffix in (".csv", ".csv.gz", ".parquet") for path in Path(folder).rglob(name + suffix)]
    if not named:
        raise InputError(
            f"no {name}.csv or {name}.parquet in {str(folder)!r} or a folder below it; "
            "pass as folder= the one that holds the benchmark's files"
        )
    path = min(named, key=lambda path: (path.suffix == ".parquet", path.suffix == ".gz", len(path.parts), path))
    frame = read_table(path)
    time = next((column for column in (DATE, TIMESTAMP) if column in frame), None)
    if time is None or frame.empty:
        raise InputError(
            f"{str(path)!r} must have rows, a column {DATE!r} and one for each series, got {len(frame)} rows and the "
            f"columns {[str(column) for column in frame.columns[:5]]}"
        )
    step = freq or BENCHMARKS[name].freq
    times = pd.date_range(as_timestamps(frame[time].iloc[:1])[0], periods=len(frame), freq=step)
    return frame_to_series(
        frame.drop(columns=time).assign(**{TIMESTAMP: times}),
        target=target,
        known_covariates=known_covariates,
        freq=step,
    )
