"""Compare a checkpoint with a model of another project, Fracast-0 (pip install fracast), on demo domains."""

from collections.abc import Sequence

import numpy as np

from chronomoe.data.domains import load_domain
from chronomoe.data.windows import WindowConfig
from chronomoe.evaluation.external import Forecaster, compare_forecasters, own_forecaster
from chronomoe.evaluation.tasks import Task, make_task
from chronomoe.pipeline import load_teacher

DECILES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
"""Fracast-0's levels; Chronos-2's are more, and the mean loss over other levels is another number."""
LEAST = 8
"""Observed values without which Fracast-0 refuses a series."""


def fracast() -> Forecaster:
    from fracast import FracastModel

    model = FracastModel.from_pretrained(weights="fp32")  # the weights come with the package

    def call(task: Task, levels: Sequence[float]) -> np.ndarray:
        quantiles = []
        for past in task.contexts:
            known = np.isfinite(past).sum() >= LEAST
            quantiles.append(model.forecast(past if known else np.zeros_like(past), horizon=task.horizon))
        return np.sort(np.stack(quantiles).transpose(0, 2, 1), axis=1)

    return call


def main(domains: Sequence[str] = ("traffic", "web"), *, limit: int = 50) -> None:
    shape = WindowConfig(context_length=432, horizon=48)
    tasks = {name: make_task(load_domain(f"demo:{name}"), shape, limit=limit) for name in domains}
    forecasters = {"tiny": own_forecaster(load_teacher("tiny")), "Fracast-0": fracast()}
    found, seconds = compare_forecasters(forecasters, tasks, levels=DECILES)
    for record in found.records():
        if record["domain"] == "overall" and record["metric"] == "WQL":
            name = record["model"]
            print(f"{name}: WQL {record['value']:.3f} of seasonal naive's, {1000 * seconds[name]:.1f} ms a window")


if __name__ == "__main__":
    main()
