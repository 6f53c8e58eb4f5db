"""Arguments that commands share, and reading them."""

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from chronomoe.errors import InputError

T = TypeVar("T")
MODEL_HELP = "Hub id, folder or s3:// URL of a checkpoint, or 'tiny', the teacher that ships with the package."
TABLE_HELP = (
    "CSV or Parquet file, long (item_id, timestamp, target; other columns are covariates) or wide (timestamp, one "
    "column per series)"
)
DATA_HELP = f"{TABLE_HELP}, datasets folder, GluonTS JSON lines, demo:<name> or hub:<owner>/<repo>/<config>."
DEVICE_HELP = "cpu, cuda, cuda:N, mps, or auto: a CUDA GPU if there is one, else the CPU."


def as_path(text: str) -> Path:
    """Read a path; shells leave the tilde of ``--out=~/forecasts.csv`` to the program."""
    return Path(text).expanduser()


def _use_cache(cache: Path | None) -> Path | None:
    if cache is not None:
        os.environ["CHRONOMOE_CACHE"] = str(cache.expanduser())
    return cache


Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
Out = Annotated[Path, typer.Option("--out", "-o", parser=as_path, metavar="PATH", help="New folder for the result.")]
OutFile = Annotated[Path, typer.Option("--out", "-o", parser=as_path, metavar="PATH", help="File to write.")]
Horizon = Annotated[int, typer.Option(help="Steps to forecast.")]
ContextLength = Annotated[int, typer.Option(help="Past steps to read, at most.")]
BatchSize = Annotated[int, typer.Option(help="Windows per training step.")]
LearningRate = Annotated[float, typer.Option(help="Peak learning rate.")]
SoftWeight = Annotated[float, typer.Option(help="Weight of the teacher's forecasts in the loss, 0 to 1.")]
Target = Annotated[
    list[str] | None,
    typer.Option(help="Column to forecast; repeat it to forecast several together.", show_default="target"),
]
Known = Annotated[
    list[str] | None,
    typer.Option(help="Covariate column whose future is known; repeat it. Of other covariates only the past is known."),
]
Freq = Annotated[
    str | None, typer.Option(help="Pandas alias of one step, such as h, 15min, D or MS; inferred by default.")
]
Cache = Annotated[
    Path | None,
    typer.Option(
        callback=_use_cache,
        envvar="CHRONOMOE_CACHE",
        help="Folder for memory-mapped copies of Parquet files that are larger than memory.",
    ),
]
Device = Annotated[str, typer.Option(help="Where to compute: " + DEVICE_HELP)]
Dtype = Annotated[
    str,
    typer.Option(
        help="Compute in float32, bfloat16, or auto: the faster of the two here, found by a short trial. bfloat16 "
        "changes the error of forecasts by less than 0.1 %."
    ),
]
Engine = Annotated[
    str,
    typer.Option(help="local, or ray: the workers of a Ray cluster, which RAY_ADDRESS may name; its own here if none."),
]
Workers = Annotated[
    int | None, typer.Option(help="Workers of --engine ray, each of one core.", show_default="one a core")
]
Precision = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="Label and train in float32, bfloat16, or auto: bfloat16 where the processor has units for it. Repeated "
        "on one machine, auto gives the same bits.",
    ),
]
Seed = Annotated[int, typer.Option(help="Seeds everything random; the same seed gives the same bits.")]


def pick(kind: type[T], options: Mapping[str, Any], **others: Any) -> T:
    """Make a configuration of the options that are called like its fields, and of other values."""
    named = {field.name: options[field.name] for field in fields(kind) if field.name in options}  # type: ignore[arg-type]
    return kind(**named | others)


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


def split(text: str, kind: Callable[[str], T], what: str) -> tuple[T, ...]:
    """Read values such as ``0,2`` separated by commas; ``what`` says what they must be, with an example."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{what}; got {text!r}") from None


def parse_blocks(text: str | None, name: str) -> tuple[int, ...] | None:
    """Read encoder blocks such as ``0,2`` of the option called ``name``."""
    what = f"{name} must be encoder blocks separated by commas, such as 0,2"
    return None if text is None else split(text, int, what)
