"""The command that serves checkpoints over HTTP."""

from pathlib import Path
from typing import Annotated

import typer

from chronomoe.cli import options as opt
from chronomoe.errors import InputError, extra


def serve(
    models: Annotated[
        list[str], typer.Argument(help=f"{opt.MODEL_HELP} Several may be served; name=folder names one.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 8080,
    workers: Annotated[int, typer.Option(help="Processes, each with all models.", min=1)] = 1,
    parallel: Annotated[
        int | None,
        typer.Option(help="Batches of a process at once; unless given, 2 where it has two processors.", min=1),
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Rows of a batch.")] = 64,
    max_batch_ms: Annotated[float, typer.Option(help="Time of a batch: holds fewer rows where they are slow.")] = 100.0,
    max_wait_ms: Annotated[float, typer.Option(help="Longest wait for others to share a batch.")] = 5.0,
    queue: Annotated[int, typer.Option(help="Rows that may wait; beyond it, status 429.")] = 1024,
    timeout_s: Annotated[float, typer.Option(help="Seconds for a whole request.")] = 30.0,
    max_body_mb: Annotated[float, typer.Option(help="Size of a body.")] = 16.0,
    max_series: Annotated[int, typer.Option(help="Series of a request.")] = 256,
    max_steps: Annotated[int, typer.Option(help="Past steps of a series.")] = 65536,
    max_horizon: Annotated[int, typer.Option(help="Steps to forecast.")] = 1024,
    drain_s: Annotated[float, typer.Option(help="Seconds from a signal to stop to the close of the port.")] = 1.0,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "float32",
) -> None:
    """Serve models over HTTP: the time-series protocol of KServe, metrics, and a page.

    Requests that come together are forecast together. Open the address in a
    browser for the page, /docs for the protocol, /metrics for Prometheus.
    SIGTERM and Ctrl+C finish what was accepted. Needs the extra "serve".

    Example: chronomoe serve runs/demo/moe --port 8080

    Common errors: a port that is taken, and two models of one name (write name=folder).
    """
    with extra("serve"):
        from chronomoe.serving.config import ServingConfig
        from chronomoe.serving.server import serve as run
    import torch

    from chronomoe.stages.processes import choose_device

    pairs = [(name or Path(path).name, path) for name, _, path in (model.rpartition("=") for model in models)]
    if len(dict(pairs)) < len(pairs) or not all(name for name, _ in pairs):
        raise InputError(f"every model needs a name of its own, got {models}; write name=folder")
    if dtype not in ("auto", "float32"):
        raise InputError(f"dtype must be auto or float32, got {dtype!r}")
    threads = max(1, torch.get_num_threads() // workers)
    if parallel is None:
        parallel = min(threads, 2) if choose_device(device).type == "cpu" else 1
    config = opt.pick(ServingConfig, locals())
    run(
        dict(pairs),
        config,
        host=host,
        port=port,
        workers=workers,
        threads=max(1, threads // parallel),
        device=device,
        dtype=dtype,
    )
