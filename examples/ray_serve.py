"""Serve a mixture on many machines: the application of ``chronomoe serve``, replicated by Ray Serve.

pip install 'chronomoe[ray-serve]'; python examples/ray_serve.py runs/demo/moe
"""

import sys

from fastapi import FastAPI
from ray import serve

from chronomoe import ChronoMoEPipeline
from chronomoe.serving.app import create_app


def forecasts(model: str, replicas: int = 2) -> serve.Application:
    def build() -> FastAPI:  # in every replica
        return create_app({"moe": ChronoMoEPipeline.from_pretrained(model)})

    # A replica batches its own requests: it must be handed several at once.
    options = {"num_replicas": replicas, "max_ongoing_requests": 256, "ray_actor_options": {"num_cpus": 1}}
    return serve.deployment(serve.ingress(build)(), name="forecasts", **options).bind()


if __name__ == "__main__":
    serve.run(forecasts(sys.argv[1]), blocking=True)
