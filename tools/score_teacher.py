"""Zero-shot scores of a Chronos-2 checkpoint on a folder of public series, relative to a seasonal naive forecast.

Every series is z-scored by its train rows and forecast on its own from the last 512 steps; the horizon is 96. ETTh1 and
ETTh2: MSE and MAE of the median over test windows every 24 h. Every file: WQL (over the model's quantile levels) and
MAE of the median, divided by those of a seasonal naive forecast of the same windows (which says the same at every
level), and coverage of the interval from 0.1 to 0.9; windows a horizon apart, at most 400 of them, evenly spread.

    python tools/score_teacher.py MODEL --data FOLDER [--json FILE]
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from chronomoe.evaluation.baselines import last_season
from chronomoe.evaluation.metrics import WindowScores, aggregate, geometric_mean, relative, score_windows
from chronomoe.pipeline import ChronoMoEPipeline

CONTEXT, HORIZON, WINDOWS = 512, 96, 400
ETT_ROWS = {"ETTh1": (8640, 11520, 14400), "ETTh2": (8640, 11520, 14400)} | dict.fromkeys(
    ("ETTm1", "ETTm2"), (34560, 46080, 57600)
)
PERIODS = {"1 days": 7, "0 days 01:00:00": 24, "0 days 00:15:00": 96, "0 days 00:10:00": 144, "0 days 00:05:00": 288}
"""Main period in steps of each frequency that the folder holds."""


class Windows(NamedTuple):
    """Contexts ``(window, 512)`` and targets ``(window, 96)``, NaN where missing."""

    context: NDArray[np.float32]
    target: NDArray[np.float32]


class File(NamedTuple):
    """One file: ``(step, series)`` z-scored by the train rows, the test rows, the main period."""

    values: NDArray[np.float32]
    test: tuple[int, int]
    period: int


def read(path: Path) -> File:
    """Read a wide Parquet file with the column ``timestamp``."""
    frame = pd.read_parquet(path).set_index("timestamp")
    rows = len(frame)
    train, start, stop = ETT_ROWS.get(path.stem, (int(0.7 * rows), rows - int(0.2 * rows), rows))
    values = frame.to_numpy(dtype=np.float64)
    values = (values - np.nanmean(values[:train], axis=0)) / np.nanstd(values[:train], axis=0)
    step = str(frame.index[1] - frame.index[0]).removesuffix(" 00:00:00")
    return File(values.astype(np.float32), (start, stop), PERIODS[step])


def cut(file: File, *, stride: int, limit: int | None) -> Windows:
    """Cut test windows of every series, less those in which nothing was observed before or after the cutoff."""
    start, stop = file.test
    places = [
        (column, cutoff)
        for column in range(file.values.shape[1])
        for cutoff in range(start, stop - HORIZON + 1, stride)
    ]
    if limit is not None and len(places) > limit:
        places = [places[index] for index in np.linspace(0, len(places) - 1, limit).round().astype(int)]
    context = np.stack([file.values[cutoff - CONTEXT : cutoff, column] for column, cutoff in places])
    target = np.stack([file.values[cutoff : cutoff + HORIZON, column] for column, cutoff in places])
    seen = np.isfinite(context).any(axis=1) & np.isfinite(target).any(axis=1)
    return Windows(context[seen], target[seen])


def seasonal_naive(context: NDArray[np.float32], *, period: int) -> NDArray[np.float64]:
    """Repeat the last season of every window."""
    seasons = np.stack([last_season(row.astype(np.float64), period) for row in context])
    return seasons[:, np.arange(HORIZON) % period]


def forecast(pipeline: ChronoMoEPipeline, windows: Windows) -> NDArray[np.float32]:
    """Forecast every window on its own, ``(window, quantile, horizon)``."""
    inputs = torch.from_numpy(windows.context)[:, None]
    predictions = pipeline.predict(inputs, prediction_length=HORIZON, batch_size=128)
    return torch.cat(predictions).numpy().astype(np.float32)


def scores(quantiles: NDArray[np.floating], target: NDArray[np.float32], levels: list[float]) -> WindowScores:
    """Score every window; no metric here is scaled by a seasonal error."""
    rows = len(target)
    return score_windows(quantiles, target, levels=levels, seasonal_error=np.ones(rows), series=np.arange(rows))


def score(pipeline: ChronoMoEPipeline, folder: Path) -> dict[str, dict[str, float]]:
    """Score a model on every file of a folder."""
    levels = list(pipeline.quantiles)
    results = {}
    for path in sorted(folder.glob("*.parquet")):
        file = read(path)
        windows = cut(file, stride=HORIZON, limit=WINDOWS)
        guess = np.repeat(seasonal_naive(windows.context, period=file.period)[:, None], len(levels), axis=1)
        model = {path.stem: scores(forecast(pipeline, windows), windows.target, levels)}
        naive = {path.stem: scores(guess, windows.target, levels)}
        results[path.stem] = {
            "windows": len(windows.target),
            "WQL": relative(model, naive, "WQL"),
            "MAE": relative(model, naive, "MAE"),
            "coverage": aggregate(model[path.stem])["coverage80"],
        }
        if path.stem in ("ETTh1", "ETTh2"):
            dense = cut(file, stride=24, limit=None)
            found = aggregate(scores(forecast(pipeline, dense), dense.target, levels))
            results[path.stem] |= {"z_MSE": found["MSE"], "z_MAE": found["MAE"]}
    return results


def summary(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """Put the figures of all files together."""
    every = list(results.values())
    coverage = [row["coverage"] for row in every]
    dense = [name for name in ("ETTh1", "ETTh2") if name in results]
    figures = {f"{name} {key[2:]}": results[name][key] for name in dense for key in ("z_MSE", "z_MAE")}
    for metric in ("WQL", "MAE"):
        figures[metric] = geometric_mean(row[metric] for row in every)
        figures[f"better than naive in {metric}"] = sum(row[metric] < 1 for row in every)
    return figures | {
        "coverage": statistics.mean(coverage),
        "least coverage": min(coverage),
        "most coverage": max(coverage),
    }


def main() -> None:
    """Print a Markdown table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, folder or 'tiny'")
    parser.add_argument("--data", type=Path, required=True, help="folder of wide Parquet files")
    parser.add_argument("--json", type=Path, help="also write the JSON line here")
    options = parser.parse_args()
    if not any(options.data.glob("*.parquet")):
        parser.error(f"--data must be a folder of Parquet files, {options.data} holds none")
    begun = time.perf_counter()
    pipeline = ChronoMoEPipeline.from_pretrained(options.model, dtype=torch.float32)
    results = score(pipeline, options.data)
    print("| file | windows | WQL | MAE | coverage |\n| --- | --- | --- | --- | --- |")
    for name, row in results.items():
        print(f"| {name} | {row['windows']} | {row['WQL']:.3f} | {row['MAE']:.3f} | {row['coverage']:.2f} |")
    overall = summary(results)
    print(f"| geometric mean | | {overall['WQL']:.3f} | {overall['MAE']:.3f} | {overall['coverage']:.2f} |\n")
    line = json.dumps(
        {
            "model": options.model,
            "summary": {key: round(value, 4) for key, value in overall.items()},
            "files": {name: {key: round(value, 4) for key, value in row.items()} for name, row in results.items()},
            "seconds": round(time.perf_counter() - begun, 1),
            "threads": torch.get_num_threads(),
        }
    )
    print(line)
    if options.json:
        options.json.write_text(line + "\n")


if __name__ == "__main__":
    main()
