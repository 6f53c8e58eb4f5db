"""Arguments that commands share, and reading them."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from chronomoe.errors import InputError

MODEL_HELP = "Hub id, folder or s3:// URL of a checkpoint, or 'tiny', the teacher that ships with the package."
TABLE_HELP = (
    "CSV or Parquet file, long (item_id, timestamp, target, other columns are covariates) or wide (timestamp, one "
    "column for each series)"
)
DATA_HELP = f"{TABLE_HELP}, datasets folder, GluonTS JSON lines, demo:<name> or hub:<owner>/<repo>/<config>."


def as_path(text: str) -> Path:
    """Read a path; shells leave the tilde of ``--out=~/forecasts.csv`` to the program."""
    return Path(text).expanduser()


Out = Annotated[
    Path, typer.Option("--out", "-o", parser=as_path, metavar="PATH", help="New folder that the result is written to.")
]
Horizon = Annotated[int, typer.Option(help="Steps to forecast.")]
ContextLength = Annotated[int, typer.Option(help="At most this many past steps are read.")]
BatchSize = Annotated[int, typer.Option(help="Windows in a training step.")]
LearningRate = Annotated[float, typer.Option(help="Peak learning rate.")]
SoftWeight = Annotated[float, typer.Option(help="Weight of the teacher's forecasts in the loss, 0 to 1.")]
Target = Annotated[
    list[str] | None,
    typer.Option(help="Column to forecast; repeat it to forecast several together.", show_default="target"),
]
Known = Annotated[
    list[str] | None,
    typer.Option(help="Covariate column that is known into the future; repeat it. Others are known in the past only."),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Compute in float32, bfloat16, or auto: the faster of both here, found by a short trial. bfloat16 changes "
        "the error of forecasts by less than 0.1 %."
    ),
]
Freq = Annotated[
    str | None, typer.Option(help="Pandas alias of one step, such as h, 15min, D or MS; inferred by default.")
]


def _use_cache(cache: Path | None) -> Path | None:
    if cache is not None:
        os.environ["CHRONOMOE_CACHE"] = str(cache.expanduser())
    return cache


Cache = Annotated[
    Path | None,
    typer.Option(
        callback=_use_cache,
        envvar="CHRONOMOE_CACHE",
        help="Folder in which Parquet files larger than memory become memory-mapped ones, to train from.",
    ),
]
DEVICE_HELP = "cpu, cuda, cuda:N, mps, or auto: a CUDA GPU if there is one, else the CPU."
Device = Annotated[str, typer.Option(help="Where to compute: " + DEVICE_HELP)]
Seed = Annotated[int, typer.Option(help="Of everything that is random: the same seed gives the same bits.")]


def read_domain(
    data: str,
    target: list[str] | None,
    known: list[str] | None,
    seasonality: int | None = None,
    freq: str | None = None,
) -> Any:
    """Load the series that a data argument names."""
    from chronomoe.data.domains import load_domain

    return load_domain(
        data, target=target or "target", known_covariates=tuple(known or ()), seasonality=seasonality, freq=freq
    )


def read_windows(context_length: int, horizon: int) -> Any:
    """Return the windows of a context and a horizon; contexts shorter than usual are as short as need be."""
    from chronomoe.data.windows import WindowConfig

    shortest = min(WindowConfig.min_context_length, max(1, context_length))
    return WindowConfig(context_length=context_length, horizon=horizon, min_context_length=shortest)


def parse_blocks(text: str, name: str) -> tuple[int, ...]:
    """Read encoder blocks such as ``0,2`` of the option called ``name``."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{name} must be encoder blocks separated by commas, such as 0,2; got {text!r}") from None


def parse_levels(text: str) -> list[float]:
    """Read quantile levels such as ``0.1,0.5``."""
    try:
        levels = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"quantile levels must be numbers separated by commas, such as 0.1,0.5,0.9; got {text!r}"
        ) from None
    if not all(0 < level < 1 for level in levels):
        raise InputError(f"quantile levels must lie between 0 and 1, got {text}")
    if len(set(levels)) < len(levels):
        raise InputError(f"every quantile level is given once, got {text}")
    return levels
