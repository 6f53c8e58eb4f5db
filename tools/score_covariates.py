"""What known future covariates are worth to a Chronos-2 checkpoint, on synthetic tasks that they drive.

Each task is a composed series of a seed that no corpus uses, plus the effect of one covariate whose future is known:
a series such as a temperature, events such as promotions, or a price; the effect is linear, late, or sets in beyond a
threshold, and as strong as the series itself or up to three times as strong. The model forecasts every target from 512
steps over 96 with the covariate, and alone. Errors are divided by each target's spread, summed over tasks.

    python tools/score_covariates.py MODEL [--tasks 256]
"""

import argparse
import json
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from chronomoe.pipeline import ChronoMoEPipeline
from chronomoe.pretraining.composing import compose
from chronomoe.pretraining.grouping import delay, spread_events, unit

CONTEXT, HORIZON = 512, 96
SEED = 20_261
DRIVERS, EFFECTS = ("series", "events", "price"), ("linear", "late", "threshold")


class Task(NamedTuple):
    """One target, ``(608,)``, and the covariate that drives it."""

    target: NDArray[np.float64]
    covariate: NDArray[np.float64]
    driver: str
    effect: str


def draw(rng: np.random.Generator, driver: str, effect: str) -> Task:
    """Draw a task."""
    steps = CONTEXT + HORIZON
    if driver == "series":
        covariate = unit(compose(rng, steps))
    elif driver == "events":
        covariate = spread_events(rng, steps, chance=rng.uniform(0.02, 0.1))
    else:
        jump = rng.random(steps) < 0.05
        covariate = rng.normal(size=steps)[np.maximum.accumulate(np.where(jump, np.arange(steps), 0))]
    pushed = {
        "linear": lambda: covariate,
        "late": lambda: delay(covariate, int(rng.integers(1, 7))),
        "threshold": lambda: np.maximum(0, covariate - np.quantile(covariate, 0.5)),
    }[effect]()
    sign = rng.choice([-1.0, 1.0])
    target = unit(compose(rng, steps)) + sign * rng.uniform(1.0, 3.0) * unit(pushed)
    return Task(target, covariate, driver, effect)


def errors(pipeline: ChronoMoEPipeline, tasks: list[Task], *, known: bool) -> NDArray[np.float64]:
    """Mean absolute error of the median of each task, relative to its target's spread."""
    inputs: list[dict[str, Any]] = []
    for task in tasks:
        entry: dict[str, Any] = {"target": task.target[:CONTEXT].astype(np.float32)}
        if known:
            past, future = np.split(task.covariate.astype(np.float32), [CONTEXT])
            entry |= {"past_covariates": {"x": past}, "future_covariates": {"x": future}}
        inputs.append(entry)
    predictions = pipeline.predict(inputs, prediction_length=HORIZON, batch_size=128)
    median = list(pipeline.quantiles).index(0.5)
    forecast = np.stack([prediction[0, median].numpy() for prediction in predictions]).astype(np.float64)
    target = np.stack([task.target for task in tasks])
    return np.asarray(np.abs(forecast - target[:, CONTEXT:]).mean(axis=1) / target.std(axis=1))


def main() -> None:
    """Print a Markdown table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, folder or 'tiny'")
    parser.add_argument("--tasks", type=int, default=288, help="tasks, shared out among all kinds alike")
    options = parser.parse_args()
    begun = time.perf_counter()
    pipeline = ChronoMoEPipeline.from_pretrained(options.model, dtype=torch.float32)
    kinds = [(driver, effect) for driver in DRIVERS for effect in EFFECTS]
    tasks = [draw(np.random.default_rng([SEED, index]), *kinds[index % len(kinds)]) for index in range(options.tasks)]
    alone, informed = (errors(pipeline, tasks, known=known) for known in (False, True))
    ratio = {"all": float(informed.sum() / alone.sum())}
    print("| covariate | effect | error with it, relative to without |\n| --- | --- | --- |")
    for driver, effect in kinds:
        chosen = [index for index, task in enumerate(tasks) if (task.driver, task.effect) == (driver, effect)]
        ratio[f"{driver}, {effect}"] = float(informed[chosen].sum() / alone[chosen].sum())
        print(f"| {driver} | {effect} | {ratio[f'{driver}, {effect}']:.3f} |")
    print(f"| all | | {ratio['all']:.3f} |\n")
    figures = {key: round(value, 4) for key, value in ratio.items()}
    seconds = round(time.perf_counter() - begun, 1)
    print(json.dumps({"model": options.model, "tasks": len(tasks), "ratio": figures, "seconds": seconds}))


if __name__ == "__main__":
    main()
