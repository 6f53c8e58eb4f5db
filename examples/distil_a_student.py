"""Distil the shipped teacher into one student for road traffic and forecast with it."""

import sys
from pathlib import Path

from chronomoe import ChronoMoEPipeline
from chronomoe.data.domains import load_domain
from chronomoe.data.windows import WindowConfig
from chronomoe.stages.students import distil_domain
from chronomoe.training.arguments import DistilConfig


def main(out: Path, steps: int = 300) -> None:
    traffic = load_domain("demo:traffic")
    windows = WindowConfig(context_length=256, horizon=48)
    distil_domain("tiny", traffic, out, windows=windows, student="small", training=DistilConfig(steps=steps))
    past = traffic.series[0].target[0].copy()
    quantiles, median = ChronoMoEPipeline.from_pretrained(out).predict_quantiles([past], prediction_length=48)
    print(f"{traffic.series[0].item_id}: median of the next hour {median[0][0, :4].tolist()}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "students/traffic"))
