"""Running the application: one process or several, and a stop that loses nothing accepted."""

import asyncio
import json
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from types import FrameType
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from prometheus_client.multiprocess import mark_process_dead
from uvicorn.supervisors import Multiprocess

from chronomoe.checkpoints.finding import exported, find_checkpoint
from chronomoe.errors import InputError
from chronomoe.pipeline import ChronoMoEPipeline
from chronomoe.serving.app import create_app
from chronomoe.serving.config import ServingConfig
from chronomoe.serving.metrics import FOLDER
from chronomoe.stages.processes import choose_device, place_model

PLAN = "CHRONOMOE_SERVE"
"""Hands what is served to worker processes."""
GRACE = 5.0
"""Seconds beyond the longest request after which a stop no longer waits."""
LOADING = 300
"""Seconds that a new worker may take until it answers."""


def serve(
    models: Mapping[str, str],
    config: ServingConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    workers: int = 1,
    threads: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> None:
    """Serve checkpoints by name until a signal: SIGTERM and SIGINT stop, SIGHUP restarts workers one by one.

    Args:
        models: name and checkpoint of each.
        config: limits and batching.
        host: address; the default is reached from this machine alone.
        port: 0 takes a free one.
        workers: processes, each with all models.
        threads: of torch for each batch; torch decides when None.
        device: see ``choose_device``.
        dtype: "float32" or "auto", see ``ChronoMoEPipeline.from_pretrained``.

    Raises:
        InputError: a checkpoint or an option is refused, or the port is taken.
    """
    choose_device(device)  # refuse one that is not there before anything is loaded
    if workers < 1:
        raise InputError(f"workers must be at least 1, got {workers}")
    for checkpoint in models.values():
        if not exported(checkpoint, None):
            find_checkpoint(checkpoint)
    plan = {
        "models": dict(models),
        "config": asdict(config),
        "threads": threads,
        "device": device,
        "dtype": dtype,
    }
    try:
        opened = socket.create_server((host, port), backlog=2048)
    except OSError as error:
        raise InputError(f"cannot listen at {host}:{port}: {error.strerror}; choose another --port") from None
    address = f"http://{host}:{opened.getsockname()[1]}"
    options = {
        "log_level": "warning",
        "ws": "none",
        "timeout_graceful_shutdown": int(config.timeout_s + GRACE),
        "timeout_worker_healthcheck": LOADING,
    }
    with opened:
        if workers == 1:
            app = make_app(plan)
            print(f"serving {', '.join(models)} at {address}", file=sys.stderr, flush=True)
            uvicorn.Server(uvicorn.Config(app, **options)).run(sockets=[opened])  # type: ignore[arg-type]
            return
        with tempfile.TemporaryDirectory() as counters:
            os.environ |= {PLAN: json.dumps(plan), FOLDER: counters}
            print(f"serving {', '.join(models)} at {address} in {workers} processes", file=sys.stderr, flush=True)
            shared = uvicorn.Config(f"{__name__}:make_app", factory=True, workers=workers, **options)  # type: ignore[arg-type]
            Multiprocess(shared, sockets=[opened]).run()


def make_app(plan: Mapping[str, Any] | None = None) -> FastAPI:
    """Load what a plan names, forecast once with each model, and return the application."""
    plan = plan or json.loads(os.environ[PLAN])
    if plan["threads"]:
        torch.set_num_threads(plan["threads"])
    pipelines = {}
    for name, checkpoint in plan["models"].items():
        pipelines[name] = pipeline = ChronoMoEPipeline.from_pretrained(checkpoint, dtype=plan["dtype"])
        place_model(pipeline.model, plan["device"])
        pipeline.predict([np.arange(64, dtype=np.float32) % 7])
    config = ServingConfig(**plan["config"])
    app = create_app(pipelines, config)
    close = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        service = app.state.service
        stop_late(service, config.drain_s)
        async with close(app) as state:
            yield state
        print(f"stopped: {service.accepted} accepted, {service.answered} answered", file=sys.stderr, flush=True)
        if FOLDER in os.environ:
            mark_process_dead(os.getpid())  # type: ignore[no-untyped-call]

    app.router.lifespan_context = lifespan
    return app


def stop_late(service: Any, seconds: float) -> None:
    """Let signals to stop first end readiness, and only ``seconds`` later close the port; a second one does it now."""
    if threading.current_thread() is not threading.main_thread():
        return
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        before = signal.getsignal(name)

        def stop(number: int, frame: FrameType | None, before: Any = before) -> None:
            if service.stopping or not callable(before):
                before(number, frame)
                return
            service.stopping = True
            loop.call_soon_threadsafe(loop.call_later, seconds, before, number, None)

        signal.signal(name, stop)
