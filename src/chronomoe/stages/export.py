"""Exporting a checkpoint as one ONNX graph."""

from collections.abc import Sequence
from pathlib import Path

from chronomoe.data.domains import Domain
from chronomoe.data.windows import WindowConfig, collate
from chronomoe.errors import InputError, extra
from chronomoe.pipeline import load_model
from chronomoe.stages.soft_targets import check_windows, validation_windows
from chronomoe.stages.workspace import check_new

CALIBRATION_WINDOWS = 32
"""Of each domain: ranges of activations settle within a few."""


def export_checkpoint(
    name: str | Path,
    out: Path,
    *,
    domains: Sequence[Domain] = (),
    windows: WindowConfig | None = None,
    backend: str = "onnx",
) -> Path:
    """Export a checkpoint in float32, or in int8 where there are domains to calibrate on.

    Args:
        name: a student or a mixture.
        out: a new folder.
        domains: series whose validation windows calibrate int8.
        windows: how these are cut.
        backend: see ``export_model``.

    Raises:
        InputError: the extra is not installed, ``out`` is not empty, the model has no form in one graph, or a domain
            has no window.
    """
    with extra("onnx"):
        from chronomoe.export.folder import export_model
    check_new(out)
    model = load_model(name)
    if not domains:
        return export_model(model, out, backend=backend)
    windows = windows or WindowConfig()
    check_windows(windows, model)
    batches = [
        collate(
            [part[index] for index in range(0, len(part), max(1, len(part) // CALIBRATION_WINDOWS))],
            patch_size=model.chronos_config.output_patch_size,
        )
        for part in validation_windows(domains, windows).values()
    ]
    if not batches:
        raise InputError("no series is long enough to calibrate on; pass longer ones, or a shorter --context-length")
    return export_model(model, out, calibration=batches, backend=backend)
