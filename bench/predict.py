"""What does `predict` take beyond its model, in time and in memory?

Time: a Parquet file of series goes in, one of forecasts comes out; the calls of the model are timed inside. Memory: two
processes forecast a small and a large file; the peak of each is what the system counted, less that of a process which
forecasts one series.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from answer import answer, clock, full_size, mixture_of

from chronomoe import ChronoMoEPipeline, StudentConfig, create_student_model, load_teacher
from chronomoe.predict.files import Forecaster

HORIZON = 24
PART = 1000
"""Series written at once."""


def write_series(path: Path, *, count: int, steps: int, freq: str) -> None:
    """Write a long file of random series, in parts."""
    start = np.datetime64("2024-01-01" if freq != "W" else "2000-01-02", "D")
    days = np.arange(steps) * (7 if freq == "W" else 1)
    if freq == "B":
        days = np.busday_offset(start, np.arange(steps), roll="forward") - start
        days = days.astype(int)
    times = (start + days).astype("datetime64[ns]")
    rng, writer = np.random.default_rng(0), None
    for first in range(0, count, PART):
        some = min(PART, count - first)
        ids = pa.array([f"series-{number}" for number in range(first, first + some)])
        table = pa.table(
            {
                "item_id": ids.take(pa.array(np.repeat(np.arange(some), steps))),
                "timestamp": pa.array(np.tile(times, some)),
                "target": pa.array(rng.normal(size=(some, steps)).cumsum(axis=1).ravel()),
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()


def own_peak() -> int:
    """Return the peak memory of this process in bytes.

    Where Linux says it: ``getrusage`` counts that of the process which started this one, too.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def peak(model: Path, file: Path, out: Path) -> int:
    """Return the peak memory in bytes of a process that forecasts a file."""
    command = [sys.executable, __file__, "--forecast", str(model), str(file), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1])["bytes"])


def timed(model: Path, file: Path, out: Path, *, dtype: str) -> tuple[float, float]:
    """Return the seconds of a forecast of a file, and those of them in the model."""
    inside, plain = [0.0], ChronoMoEPipeline._predict_step

    def step(self, *args, **kwargs):
        begin = clock()
        found = plain(self, *args, **kwargs)
        inside[0] += clock() - begin
        return found

    ChronoMoEPipeline._predict_step = step
    try:
        begin = clock()
        Forecaster(str(model), horizon=HORIZON, dtype=dtype).write(file, out)
        return clock() - begin, inside[0]
    finally:
        ChronoMoEPipeline._predict_step = plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--series", type=int, default=10_000, help="for time")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--freqs", nargs="+", default=["D", "B", "W"])
    parser.add_argument("--layers", type=int, default=12, help="of the teacher of the experts; 12 is the full size")
    parser.add_argument("--memory-series", type=int, nargs=2, default=[4000, 40_000])
    parser.add_argument("--memory-steps", type=int, default=50)
    parser.add_argument("--forecast", type=Path, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.forecast:
        Forecaster(str(options.forecast[0]), horizon=HORIZON).write(options.forecast[1], options.forecast[2])
        print(json.dumps({"bytes": own_peak()}))
        return
    reach, seconds = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        mixture = mixture_of(full_size(num_layers=options.layers), preset="slim", num_experts=4)
        ChronoMoEPipeline(mixture).save_pretrained(folder / "moe")
        write_series(folder / "one.parquet", count=300, steps=options.steps, freq="D")
        timed(folder / "moe", folder / "one.parquet", folder / "one-out.parquet", dtype="auto")  # imports, caches
        for freq in options.freqs:
            write_series(folder / f"{freq}.parquet", count=options.series, steps=options.steps, freq=freq)
            whole, model = timed(folder / "moe", folder / f"{freq}.parquet", folder / "out.parquet", dtype="auto")
            seconds[freq] = {"all": round(whole, 2), "model": round(model, 2)}
            reach[
                f"predict of {options.series:,} series of {options.steps} steps ({freq}): time beyond the model's"
            ] = round((whole - model) / model, 2)
        small_one = create_student_model(
            load_teacher("tiny"), StudentConfig(num_layers=1, d_model=64, num_heads=4, d_ff=256)
        )
        ChronoMoEPipeline(small_one).save_pretrained(folder / "student")  # memory is that of the file, not of its model
        peaks = {}
        for count in (1, *options.memory_series):
            write_series(folder / "m.parquet", count=count, steps=options.memory_steps, freq="D")
            peaks[count] = peak(folder / "student", folder / "m.parquet", folder / f"{count}-out.parquet")
    base, (small, large) = peaks[1], options.memory_series
    reach[f"predict's peak memory at {large:,} series against {small:,}, beyond one's"] = round(
        (peaks[large] - base) / max(1, peaks[small] - base), 2
    )
    megabytes = {str(count): round(size / 1e6) for count, size in peaks.items()}
    answer("predict beyond its model", reach=reach, seconds=seconds, peak_megabytes=megabytes)


if __name__ == "__main__":
    main()
