"""How far does a forecast move with the batch it is made in: its size, its order, what else is there?

Four kinds of checkpoint of one teacher, and a mixture with dynamic K, forecast demo series of many lengths, gappy ones
and some with covariates. Each forecast is compared with that of the series alone, as a share of the series' spread.
"""

import argparse
import json
from typing import Any

import numpy as np
import torch

from chronomoe import (
    ChronoMoEPipeline,
    MixtureConfig,
    MoEConfig,
    MoEEnhancedChronos2,
    MoEInsertionConfig,
    RoutingConfig,
    StudentConfig,
    build_mixture,
    create_student_model,
    load_teacher,
    upcycle,
)
from chronomoe.data.domains import load_domain

HORIZON = 48
DOMAINS = ("electricity", "pedestrians", "traffic", "weather", "web")
SIZES = (1, 7, 256)


def stirred(model: Any) -> Any:
    """Draw routers and experts anew, so that routers take sides and experts differ as after training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.moe_layers.values():
            layer.router.copy_(torch.randn(layer.router.shape, generator=generator))
            for weight in (layer.wi, layer.wo):
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.02)
    return model


def models() -> dict[str, Any]:
    """Make one model of each kind from the teacher that ships."""
    teacher = load_teacher("tiny")
    students = [create_student_model(teacher, StudentConfig(num_layers=layers)) for layers in (1, 2, 3)]
    layers = MoEConfig(num_experts=8, top_k=2)

    def mixture(routing: RoutingConfig) -> Any:
        made = build_mixture(students, MixtureConfig(routing=routing)).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in made.router.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5)
        return made

    return {
        "dense": students[1],
        "mixture": mixture(RoutingConfig(top_k=2, threshold=None)),
        "mixture, dynamic K": mixture(RoutingConfig(top_k=3, threshold=0.7)),
        "upcycled": stirred(upcycle(students[1], layers)),
        "expanded": stirred(MoEEnhancedChronos2(students[1], MoEInsertionConfig(after=(0, 1)))),
    }


def inputs(count: int) -> list[dict[str, Any]]:
    """Cut series of many lengths from all demo domains: some with gaps, some with covariates known ahead."""
    rng = np.random.default_rng(0)
    found = []
    for place in range(count):
        series = load_domain(f"demo:{DOMAINS[place % len(DOMAINS)]}").series
        values = series[int(rng.integers(len(series)))].target[0].astype(np.float32)
        stop = int(rng.integers(len(values) // 2, len(values) - HORIZON))
        past = values[max(0, stop - int(rng.integers(40, 800))) : stop].copy()
        entry: dict[str, Any] = {"target": past}
        if place % 3 == 1:
            past[rng.random(len(past)) < 0.2] = np.nan
        if place % 4 == 2:
            step = np.arange(len(past) + HORIZON)
            season = np.sin(step / 12).astype(np.float32)
            entry["past_covariates"] = {"season": season[: len(past)]}
            entry["future_covariates"] = {"season": season[len(past) :]}
        found.append(entry)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--series", type=int, default=120)
    options = parser.parse_args()
    series = inputs(options.series)
    spread = [max(float(np.nanstd(entry["target"])), 1e-6) for entry in series]
    plain = [place for place, entry in enumerate(series) if "past_covariates" not in entry]
    others = [place for place, entry in enumerate(series) if "past_covariates" in entry]
    found = {}
    for name, model in models().items():
        pipeline = ChronoMoEPipeline(model)
        largest = 0.0
        for part in (plain, others):  # a list of inputs either has covariates or has none
            alone = {place: pipeline.predict([series[place]], prediction_length=HORIZON)[0] for place in part}
            for order in (part, part[::-1], list(np.random.default_rng(1).permutation(part))):
                for size in SIZES:
                    chosen = [series[place] for place in order]
                    for place, forecast in zip(
                        order, pipeline.predict(chosen, prediction_length=HORIZON, batch_size=size), strict=True
                    ):
                        gap = (forecast - alone[place]).abs() / (spread[place] + alone[place].abs())
                        largest = max(largest, gap.max().item())
        found[name] = float(f"{largest:.1e}")
    print(
        json.dumps(
            {
                "question": "largest change of a forecast with its batch, relative to the series",
                "largest": found,
                "series": len(series),
                "batch_sizes": SIZES,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
