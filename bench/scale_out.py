"""What do two workers of one core do that one does not?

Parts of random series are forecast by the workers of a Ray cluster on this machine, by one and then by two. Time runs
from the first part's begin to the last one's end, so the starts of the cluster and of the first worker do not count. By
``BENCH_CLOCK=cpu`` it is the processor time of the busiest worker, as if each had a core to itself.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import ray
import torch
from answer import CLOCK, answer, full_size, mixture_of
from predict import write_series

from chronomoe import ChronoMoEPipeline
from chronomoe.predict.files import Forecaster
from chronomoe.stages.cluster import spread

HUNDRED_MILLION = 100_000_000


class Timed:
    """Forecasts files and says by whom, when, and in how much processor time."""

    def __init__(self, forecaster: Forecaster, out: Path, *, warm_up: Path) -> None:
        self.forecaster, self.out, self.warm_up = forecaster, out, warm_up

    def prepare(self) -> None:
        """Load the model and forecast once."""
        self.forecaster.write(self.warm_up, self.out / f"{os.getpid()}.parquet")

    def __call__(self, file: Path, /) -> dict[str, float]:
        """Forecast a file."""
        begin, used = time.time(), time.process_time()
        self.forecaster.write(file, self.out / file.name)
        return {"worker": os.getpid(), "begin": begin, "end": time.time(), "cpu": time.process_time() - used}


def measured(task: Timed, files: list[Path], *, workers: int, series: int) -> dict[str, object]:
    """Forecast all files and return the seconds that counts as, and what each worker did."""
    called = time.time()
    done = [found for _, found in spread(task, files, workers=workers)]
    each: dict[float, list[dict[str, float]]] = {}
    for found in done:
        each.setdefault(found["worker"], []).append(found)
    first, last = min(found["begin"] for found in done), max(found["end"] for found in done)
    used = [sum(found["cpu"] for found in own) for own in each.values()]
    return {
        "seconds": round(last - first if CLOCK == "wall" else max(used), 3),
        "seconds_to_the_first_part": round(first - called, 2),
        "cpu_seconds": [round(seconds, 2) for seconds in used],
        "series": [series * len(own) for own in each.values()],
        "cpu_milliseconds_a_series": round(1000 * sum(used) / (series * len(files)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", type=int, default=16)
    parser.add_argument("--series", type=int, default=500, help="of a part")
    parser.add_argument("--steps", type=int, default=512)
    parser.add_argument("--horizon", type=int, default=96)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, default=12, help="of the teacher of the experts; 12 is the full size")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        mixture = mixture_of(full_size(num_layers=options.layers), preset="slim", num_experts=4)
        ChronoMoEPipeline(mixture).save_pretrained(folder / "moe")
        files = [folder / f"part-{number:05d}.parquet" for number in range(options.parts)]
        for file in files:
            write_series(file, count=options.series, steps=options.steps, freq="D")
        forecaster = Forecaster(str(folder / "moe"), horizon=options.horizon, dtype=options.dtype)
        task = Timed(forecaster, folder / "out", warm_up=files[0])
        sides = {workers: measured(task, files, workers=workers, series=options.series) for workers in (1, 2)}
    ray.shutdown()
    reach = {"two workers of one core against one": round(sides[1]["seconds"] / sides[2]["seconds"], 2)}
    hours = HUNDRED_MILLION * sides[1]["seconds"] / (options.series * options.parts) / 3600
    answer(
        "two workers of one core against one",
        reach=reach,
        parts=options.parts,
        series_of_a_part=options.series,
        steps=options.steps,
        horizon=options.horizon,
        dtype=options.dtype,
        workers={str(count): side for count, side in sides.items()},
        core_hours_of_100m_series=round(hours, 1),
    )


if __name__ == "__main__":
    main()
