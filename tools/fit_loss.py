"""What more steps of a pretraining run would buy: a power law of its training loss, fitted where nothing else changes.

Fit over one phase of a constant learning rate: the loss of other contexts or another mix is not comparable, and a
falling rate lowers it for reasons of its own. The error of the exponent comes from the scatter about the line.

    python tools/fit_loss.py RUN --first STEP --last STEP
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import linregress
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

LEAST_REPORTS = 3


class Fit(NamedTuple):
    """``loss = factor * step ** exponent``, and how surely."""

    factor: float
    exponent: float
    error: float
    """Standard error of the exponent."""
    scatter: float
    """Spread of the reports about the line, relative to the loss."""
    reports: int


def read(run: Path, *, first: int, last: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Read steps and training losses of a run; where a continued run reported a step twice, the later report."""
    log = EventAccumulator(str(run / "logs")).Reload()
    known = "train/loss" in log.Tags()["scalars"]
    points = {point.step: point.value for point in log.Scalars("train/loss")} if known else {}
    steps = sorted(step for step in points if first <= step <= last)
    return np.array(steps, dtype=np.float64), np.array([points[step] for step in steps])


def fit(steps: NDArray[np.float64], losses: NDArray[np.float64]) -> Fit:
    """Fit a straight line in logarithms by least squares."""
    line = linregress(np.log(steps), np.log(losses))
    scatter = np.std(np.log(losses) - line.intercept - line.slope * np.log(steps), ddof=2)
    return Fit(float(np.exp(line.intercept)), float(line.slope), float(line.stderr), float(scatter), len(steps))


def main() -> None:
    """Print what doublings of the steps would buy, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of chronomoe pretrain")
    parser.add_argument("--first", type=int, required=True, help="first step of the stretch that is fitted")
    parser.add_argument("--last", type=int, required=True, help="its last step")
    options = parser.parse_args()
    if not (options.run / "logs").is_dir():
        parser.error(f"RUN must be a folder of chronomoe pretrain, {options.run} has no logs")
    steps, losses = read(options.run, first=options.first, last=options.last)
    if len(steps) < LEAST_REPORTS:
        parser.error(f"{options.run}/logs holds {len(steps)} reports from step {options.first} to {options.last}")
    line = fit(steps, losses)
    print(f"loss = {line.factor:.2f} * steps ** {line.exponent:.3f} (+- {line.error:.3f}), {line.reports} reports\n")
    print("| steps | training loss expected |\n| --- | --- |")
    for times in (1, 2, 4, 8, 16):
        print(f"| {times * int(steps[-1]):,} | {line.factor * (times * steps[-1]) ** line.exponent:.2f} |")
    figures = {key: round(value, 5) for key, value in line._asdict().items()}
    print("\n" + json.dumps({"run": str(options.run)} | figures))


if __name__ == "__main__":
    main()
