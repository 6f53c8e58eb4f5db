"""Bands beside the weights of a checkpoint: written with it, and checked before use."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from chronomoe.checkpoints.checking import stored_file
from chronomoe.errors import InputError
from chronomoe.models.bands import WIDEST, Bands

FILE = "bands.safetensors"
FORMAT = "1"
LONGEST = 1 << 20


def write_bands(model: Any, folder: Path) -> None:
    """Write the bands of a model, if it has any, with the levels and experts that they are for."""
    bands = getattr(model, "bands", None)
    if bands is not None:
        facts = {"format": FORMAT, "levels": json.dumps(_levels(model)), "experts": json.dumps(_experts(model))}
        save_file({key: value.contiguous() for key, value in bands._asdict().items()}, folder / FILE, metadata=facts)


def read_bands(name: str, model: Any, hub_options: Mapping[str, Any]) -> Bands | None:
    """Read the bands of a checkpoint; None where it has none.

    Raises:
        InputError: the file is damaged, of a newer format, for other levels or experts, or holds numbers that no
            calibration gives.
    """
    path = stored_file(name, FILE, hub_options)
    if path is None:
        return None
    try:
        with safe_open(path, framework="pt") as opened:
            facts = opened.metadata() or {}
            if facts.get("format") != FORMAT:
                raise _refused(name, f"their format is {facts.get('format')!r}, this version reads {FORMAT!r}")
            for what, own in (("levels", _levels(model)), ("experts", _experts(model))):
                if facts.get(what) != json.dumps(own):
                    raise _refused(name, f"they are for the {what} {facts.get(what)}, the model has {json.dumps(own)}")
            shapes = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
            experts = max(1, len(_experts(model)))
            if shapes.keys() != set(Bands._fields) or shapes["windows"] != [experts]:
                raise _refused(name, f"they must hold {', '.join(Bands._fields)} of {experts} experts, got {shapes}")
            _check_shape(name, shapes["factor"], experts=experts, levels=len(_levels(model)))
            found = Bands(*(opened.get_tensor(key) for key in Bands._fields))
    except (SafetensorError, OSError) as error:
        raise _refused(name, " ".join(str(error).split())) from None
    good = found.factor.dtype == torch.float32 and not found.windows.is_floating_point()
    if not good or not ((found.factor >= 0) & (found.factor <= WIDEST)).all() or (found.windows < 0).any():
        raise _refused(name, f"factors must be float32 from 0 to {WIDEST:g}, and windows numbers from 0")
    return found


def _check_shape(name: str, shape: Sequence[int], *, experts: int, levels: int) -> None:
    if len(shape) != 3 or list(shape[:2]) != [experts, levels] or not 1 <= shape[2] <= LONGEST:
        raise _refused(
            name, f"factor must be of {experts} experts, {levels} levels and 1 to {LONGEST} steps, got {shape}"
        )


def _refused(name: str, reason: str) -> InputError:
    return InputError(f"the bands of {name!r} are refused: {reason}; recalibrate the checkpoint, or delete its {FILE}")


def _levels(model: Any) -> list[float]:
    return sorted(round(level, 6) for level in model.chronos_config.quantiles)


def _experts(model: Any) -> list[str]:
    """Name the experts of a mixture; a model that is none, or has only one, needs no name."""
    names = getattr(model.config, "expert_names", None) or []
    return list(names) if len(names) > 1 else []
