"""The application as replicas of Ray Serve: the same answers, from all of them, and without one that is killed."""

import importlib.util
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

pytest.importorskip("fastapi_offline", reason="needs the extra serve")
pytest.importorskip("ray.serve", reason="needs the extra ray-serve", exc_type=ImportError)
import ray
from ray import serve

from chronomoe import ChronoMoEPipeline
from http_server import Client, one_series, quantiles_of


@pytest.fixture(scope="module")
def asking():
    """Start the example with two replicas on a cluster of two cores and return a client of it."""
    spec = importlib.util.spec_from_file_location("ray_serve", Path(__file__).parents[2] / "examples" / "ray_serve.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(example.forecasts("tiny", replicas=2))
    yield Client(port)
    serve.shutdown()
    ray.shutdown()


def replicas():
    found = psutil.Process().children(recursive=True)
    return [one for one in found if one.name().startswith("ray::ServeRepl")]


def test_replicas_answer_as_the_pipeline_does_and_share_the_requests(asking, make_context):
    series = make_context(24, 90).numpy()
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda row: asking.forecast(one_series(row.tolist(), horizon=12)), series))
    expected, _ = ChronoMoEPipeline.from_pretrained("tiny").predict_quantiles(list(series), 12, [0.1, 0.5, 0.9])
    for reply, one in zip(replies, expected, strict=True):
        found = np.stack([np.array(values) for values in quantiles_of(reply).values()], axis=-1)
        assert np.abs(found - one[0].numpy()).max() < 1e-4 * one.std()
    pages = {asking.get("/metrics").body.decode() for _ in range(40)}
    counts = {float(line.split()[-1]) for page in pages for line in page.splitlines() if "requests_total{" in line}
    assert len(counts) > 1 or counts == {12.0}, "each replica counts its own"
    assert asking.forecast({}).status == 400
    assert asking.get("/").body.startswith(b"<!doctype html>")


def test_the_rest_answers_when_a_replica_is_killed(asking, make_context):
    first, _ = replicas()
    first.kill()
    psutil.wait_procs([first])
    request = one_series(make_context(1, 60)[0].tolist())
    statuses = [asking.forecast(request).status for _ in range(30)]
    assert statuses[10:] == [200] * 20
