"""What does batching across requests gain, how long do requests take under load, and what does a restart lose?

Clients run in a process of their own and ask over real connections, one series of ``--steps`` steps a request; 100 %
load is the rate of ``--clients`` that ask one request after the other. One by one is a server that forecasts one series
at a time on all threads. With ``BENCH_CLOCK=cpu`` the gain is that of the server's processor time a request, which
other work disturbs less.
"""

import argparse
import http.client
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
from answer import CLOCK, answer, full_size, mixture_of

LOADS = (70, 50, 30)
"""Percent of the rate of clients that ask one request after the other."""
NOT_ACCEPTED = (ConnectionRefusedError, ConnectionResetError, BrokenPipeError, http.client.RemoteDisconnected)
"""What a client meets whose request the server never took."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a checkpoint; by default a K = 1 mixture of 4 slim students of full size")
    parser.add_argument("--layers", type=int, default=12, help="of the teacher, when the model is made here")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    parser.add_argument("--steps", type=int, default=512)
    parser.add_argument("--horizon", type=int, default=96)
    parser.add_argument("--series", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--bulk", type=int, default=256, help="series of each large request, of one client")
    parser.add_argument("--restarts", type=int, default=20)
    parser.add_argument(
        "--serve", nargs="*", default=[], help="further options of chronomoe serve, without dashes: a=b"
    )
    parser.add_argument("--client", nargs=4, metavar=("PORT", "CLIENTS", "SECONDS", "RATE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        port, clients, seconds, rate = options.client
        print(json.dumps(load(int(port), body(options), int(clients), float(seconds), float(rate))))
        return
    with tempfile.TemporaryDirectory() as room:
        measure(options, options.model or make_model(Path(room) / "moe", layers=options.layers))


def measure(options: argparse.Namespace, model: str) -> None:
    more = [f"--{pair}" for pair in options.serve]
    server = Server(model, more)
    alone = server.ask(options, clients=1)
    together = server.ask(options, clients=options.clients)
    rates = {load: load / 100 * together["requests_per_second"] for load in LOADS}
    steady = {load: server.ask(options, clients=4 * options.clients, rate=rate) for load, rate in rates.items()}
    with server.asked(options, series=options.bulk):
        beside = server.ask(options, clients=options.clients, rate=0.1 * together["requests_per_second"])
    del beside["processor_ms_a_request"]  # the large requests are in it
    server.stop()
    one_by_one = Server(model, [*more, "--max-batch=1", "--parallel=1"])
    apart = one_by_one.ask(options, clients=options.clients)
    one_by_one.stop()
    lost, restarts = restart(options, model, more) if options.restarts else (0, {})
    gain = together["requests_per_second"] / apart["requests_per_second"]
    if CLOCK == "cpu":
        gain = apart["processor_ms_a_request"] / together["processor_ms_a_request"]
    lone = alone["p50_ms"]
    answer(
        "requests over HTTP: batching across them, latency under load, and restarts",
        reach={
            f"gain of batching at {options.clients} clients": round(gain, 2),
            **{
                f"p99 at {load} % load over the lone latency": round(steady[load]["p99_ms"] / lone, 2) for load in LOADS
            },
            f"p99 beside requests of {options.bulk} series over the lone latency": round(beside["p99_ms"] / lone, 2),
        }
        | ({f"accepted requests lost in {options.restarts} restarts": lost} if options.restarts else {}),
        alone=alone,
        together=together,
        one_by_one=apart,
        **{
            f"at_{load}_percent": seen
            | {"rate": round(rates[load], 1), "p50_over_lone": round(seen["p50_ms"] / lone, 2)}
            for load, seen in steady.items()
        },
        beside_bulk=beside,
        restarts=restarts,
        model={"made": not options.model, "steps": options.steps, "horizon": options.horizon},
    )


def make_model(folder: Path, *, layers: int) -> str:
    from chronomoe import ChronoMoEPipeline

    mixture = mixture_of(full_size(num_layers=layers), preset="slim", num_experts=4, top_k=1)
    ChronoMoEPipeline(mixture).save_pretrained(folder)
    return str(folder)


class Server:
    """``chronomoe serve`` in a process of its own."""

    def __init__(self, model: str, options: list[str], port: int = 0) -> None:
        command = [sys.executable, "-m", "chronomoe", "serve", f"moe={model}", f"--port={port}", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(r"http://127.0.0.1:(\d+)", line):
                self.port = int(found[1])
                return
        raise SystemExit("the server did not start")

    def ask(self, options: argparse.Namespace, *, clients: int, rate: float = 0.0) -> dict[str, float]:
        """Let clients ask, from another process, and return what they saw; the first turn warms up."""
        for seconds in (min(3.0, options.seconds), options.seconds):
            before = self.processor_seconds()
            command = self.client(options, clients=clients, seconds=seconds, rate=rate)
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        found: dict[str, float] = json.loads(done.stdout)
        spent = self.processor_seconds() - before
        return found | {"processor_ms_a_request": round(1000 * spent / found["requests"], 2)}

    @contextmanager
    def asked(self, options: argparse.Namespace, *, series: int) -> Iterator[None]:
        """Let one client ask for many series at a time meanwhile."""
        long = self.client(options, clients=1, seconds=60 + 2 * options.seconds, rate=0.0, series=series)
        with subprocess.Popen(long, stdout=subprocess.DEVNULL) as bulk:
            yield
            bulk.kill()

    def client(
        self, options: argparse.Namespace, *, clients: int, seconds: float, rate: float, series: int = 1
    ) -> list[str]:
        """Return the command of clients."""
        sizes = [f"--steps={options.steps}", f"--horizon={options.horizon}", f"--series={series}"]
        return [sys.executable, __file__, *sizes, "--client", *map(str, (self.port, clients, seconds, rate))]

    def processor_seconds(self) -> float:
        """Return the processor time of the server so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def stop(self) -> tuple[int, int]:
        """Stop by a signal and return how many requests were accepted and answered."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.stderr is not None
        found = re.search(r"stopped: (\d+) accepted, (\d+) answered", self.process.stderr.read())
        self.process.wait()
        assert found is not None
        return int(found[1]), int(found[2])


def body(options: argparse.Namespace) -> bytes:
    values = np.sin(np.arange(options.steps) / 4) * 10 + np.random.default_rng(0).normal(size=options.steps)
    series = {
        "type": "univariate_time_series",
        "series": values.round(4).tolist(),
        "frequency": "H",
        "start_timestamp": "2025-01-01T00:00:00Z",
    }
    inputs = [series | {"name": str(index)} for index in range(options.series)]
    asked = {"horizon": options.horizon, "quantiles": [0.1, 0.5, 0.9]}
    return json.dumps({"model": "moe", "inputs": inputs, "options": asked}).encode()


class Asking(threading.local):
    """A connection a thread, kept open."""

    connection: http.client.HTTPConnection | None = None

    def __call__(self, port: int, content: bytes) -> None:  # noqa: D102
        if self.connection is None:
            self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        try:
            headers = {"Content-Type": "application/json"}
            self.connection.request("POST", "/v1/timeseries/forecast", content, headers)
            reply = self.connection.getresponse()
            text = reply.read()
        except BaseException:
            self.connection.close()
            self.connection = None
            raise
        if reply.status != 200 or not json.loads(text)["outputs"]:
            raise SystemExit(f"status {reply.status}: {text[:200]!r}")


def load(port: int, content: bytes, clients: int, seconds: float, rate: float) -> dict[str, float]:
    """Ask from many threads: one request after the other, or at ``rate`` a second on average whoever has answered."""
    ask, times = Asking(), []
    begin = time.perf_counter()

    def one(due: float) -> None:
        ask(port, content)
        times.append(time.perf_counter() - due)

    def again() -> None:
        while time.perf_counter() - begin < seconds:
            one(time.perf_counter())

    with ThreadPoolExecutor(clients) as pool:
        if rate:
            chance, due = random.Random(0), begin
            while due - begin < seconds:
                time.sleep(max(0.0, due - time.perf_counter()))
                pool.submit(one, due)
                due += chance.expovariate(rate)
        else:
            for future in [pool.submit(again) for _ in range(clients)]:
                future.result()
    took = time.perf_counter() - begin
    percentiles = statistics.quantiles(times, n=100) if len(times) > 1 else [times[0]] * 99
    return {
        "requests": len(times),
        "requests_per_second": round(len(times) / took, 2),
        "p50_ms": round(1000 * percentiles[49], 2),
        "p99_ms": round(1000 * percentiles[98], 2),
    }


def restart(options: argparse.Namespace, model: str, more: list[str]) -> tuple[int, dict[str, int]]:
    """Stop and start a server under load; lost is what it accepted and no client has the whole answer of."""
    ask, content, going, answered, refused = Asking(), body(options), True, [0], [0]
    server = Server(model, more)
    port, accepted = server.port, 0

    def client() -> None:
        while going:
            try:
                ask(port, content)
                answered[0] += 1
            except NOT_ACCEPTED:
                refused[0] += 1
                time.sleep(0.05)

    with ThreadPoolExecutor(8) as pool:
        for _ in range(8):
            pool.submit(client)
        for turn in range(options.restarts):
            wanted = answered[0] + 20
            while answered[0] < wanted:
                time.sleep(0.02)
            accepted += server.stop()[0]
            if turn + 1 < options.restarts:
                server = Server(model, more, port)
        going = False
    return accepted - answered[0], {"accepted": accepted, "answered": answered[0], "refused": refused[0]}


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    main()
