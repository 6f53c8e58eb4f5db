"""What a pipeline is given, and which series of it share a batch, which is padded to its longest."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from chronos.chronos2.dataset import PreparedInput, TensorOrArray

Inputs: TypeAlias = (
    TensorOrArray
    | Sequence[TensorOrArray]
    | Sequence[Mapping[str, TensorOrArray | Mapping[str, TensorOrArray | None]]]
    | Sequence[PreparedInput]
)
"""What upstream's ``predict`` and ``fit`` take."""
PADDING = 256
"""Tokens that a batch may waste on padding to its next series: about what a batch of its own costs."""


def runs_of_similar(shapes: Sequence[tuple[int, int]], *, batch_size: int, patch_size: int) -> list[list[int]]:
    """Return the places of series in runs, each to be cut into batches of ``batch_size`` rows.

    Groups of as many rows stand together, shorter series first, and a new run begins where the batch so far would be
    padded by more than ``PADDING`` tokens.

    Args:
        shapes: rows and steps of each series, of these only those that are looked at.
        batch_size: rows from which a batch is full.
        patch_size: steps of a token.
    """
    patches = [-(-steps // patch_size) for _, steps in shapes]
    runs: list[list[int]] = []
    rows, tokens = 0, 0
    for place in sorted(range(len(shapes)), key=lambda place: shapes[place]):
        rows = 0 if rows >= batch_size else rows
        if not runs or rows * abs(patches[place] - tokens) > PADDING:
            runs.append([])
            rows = 0
        runs[-1].append(place)
        rows, tokens = rows + shapes[place][0], patches[place]
    return runs


def without_future(inputs: Any) -> Any:
    """Leave out the future values of known covariates, which upstream's dataset would hold against its horizon of 0."""
    if len(inputs) == 0 or not isinstance(inputs[0], Mapping) or "future_covariates" not in inputs[0]:
        return inputs
    if "context" in inputs[0]:
        return inputs
    return [{**entry, "future_covariates": dict.fromkeys(entry["future_covariates"])} for entry in inputs]
