"""Forecast the test part of the demo domains as production would, and ask whether the model is still good.

    python examples/watch_a_mixture.py runs/demo/moe

Once as it is, once as if half-way the router had begun to send every series to another domain's expert.
"""

import sys

import numpy as np
import pandas as pd

from chronomoe import ChronoMoEPipeline
from chronomoe.data.domains import demo_domains, load_domain
from chronomoe.data.windows import WindowConfig
from chronomoe.evaluation.monitoring import Found, monitor
from chronomoe.evaluation.tasks import forecast, make_task


def watch(pipeline: ChronoMoEPipeline, later: ChronoMoEPipeline, name: str, *, limit: int) -> Found:
    """Forecast windows of a demo domain, those of the later half with ``later``, and judge the later half."""
    windows = WindowConfig(context_length=432, horizon=48)
    domain = load_domain(f"demo:{name}")
    task = make_task(domain, windows, limit=limit)
    wanted = [pipeline.quantiles.index(level) for level in (0.1, 0.5, 0.9)]
    cutoffs = np.array([cutoff for _, cutoff in task.places])[task.window]
    late = (cutoffs > np.median(cutoffs))[:, None, None]
    quantiles = np.where(late, forecast(later, task), forecast(pipeline, task))[:, wanted]
    frames = []
    for row, window in enumerate(task.window):
        place, cutoff = task.places[window]
        times = task.domain.series[place].timestamps()[cutoff : cutoff + windows.horizon]
        columns = dict(zip(["0.1", "0.5", "0.9"], quantiles[row], strict=True))
        frames.append(pd.DataFrame({"item_id": domain.series[place].item_id, "timestamp": times} | columns))
    values = [
        pd.DataFrame({"item_id": one.item_id, "timestamp": one.timestamps(), "target": one.target[0]})
        for one in domain.series
    ]
    return monitor(pd.concat(frames, ignore_index=True), pd.concat(values, ignore_index=True))[0]


def main(model: str, *, domains: list[str] | None = None, limit: int = 400) -> None:
    pipeline = ChronoMoEPipeline.from_pretrained(model)
    mixture = pipeline.model
    for name in domains or demo_domains():
        other = mixture.experts[mixture.config.expert_names.index(name) - 1]
        for case, later in (("as it is", pipeline), ("another expert", ChronoMoEPipeline(other))):
            found = watch(pipeline, later, name, limit=limit)
            low, high = found.ratio_interval
            covered = found.after["coverage80"]
            print(f"{name}, {case}: loss {found.ratio:.2f} ({low:.2f} to {high:.2f}), {covered:.1%}: {found.verdict}")


if __name__ == "__main__":
    main(sys.argv[1])
