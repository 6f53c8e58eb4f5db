"""Arguments that commands share, and reading them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from chronomoe.errors import InputError

MODEL_HELP = "Hub id, folder or s3:// URL of a checkpoint, or 'tiny', the teacher that ships with the package."
DATA_HELP = (
    "CSV or Parquet file (long: item_id, timestamp, target; or wide), datasets folder, JSON lines, or demo:<name>."
)
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder or file that the result is written to.")]


def read_domain(data: str, target: list[str] | None, known: list[str] | None, seasonality: int | None = None) -> Any:
    """Load the series that a data argument names."""
    from chronomoe.data.domains import load_domain

    return load_domain(data, target=target or "target", known_covariates=tuple(known or ()), seasonality=seasonality)


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
    return levels
