"""Loading the model of a checkpoint after it is checked, and merging adapters into theirs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from chronomoe.checkpoints.bands import FILE, read_bands
from chronomoe.checkpoints.checking import check_checkpoint, parse_dtype
from chronomoe.checkpoints.finding import ACCEPTED, HUB_OPTIONS, architecture, find_checkpoint, read_config
from chronomoe.errors import InputError, extra
from chronomoe.models.sparse.insertion import MoEEnhancedChronos2


def load_checkpoint(
    checkpoint: str | Path, *args: Any, force_s3_download: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """Load a model, adapters merged: see ``ChronoMoEPipeline.from_pretrained``, whose arguments these are.

    Raises:
        InputError: there is no such checkpoint, it is damaged, or it is of another architecture.
    """
    old_name, dtype = kwargs.pop("torch_dtype", None), kwargs.pop("dtype", None)
    kwargs["dtype"] = parse_dtype(dtype or old_name or torch.float32)
    if kwargs.pop("trust_remote_code", False):
        raise InputError("no code from a checkpoint is run; leave out trust_remote_code")
    kwargs.pop("use_safetensors", None)
    hub_options = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
    name = find_checkpoint(checkpoint, subfolder=kwargs.get("subfolder", ""), force_s3_download=force_s3_download)
    try:
        base = _adapted_checkpoint(name, hub_options)
        if base is not None:
            options = {key: value for key, value in kwargs.items() if key not in ("revision", "subfolder")}
            return _add_adapters(load_checkpoint(base, *args, **options), name, hub_options)
        values = read_config(name, hub_options)
        kind = architecture(name, values)
        check_checkpoint(name, kind, values, hub_options, variant=kwargs.get("variant"))
        model: PreTrainedModel = kind.from_pretrained(name, *args, use_safetensors=True, **kwargs)
        model.bands = read_bands(name, model, hub_options)
    except (OSError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"cannot load {name!r}; accepted are {ACCEPTED}: {reason}") from error
    return model


def merge(adapted: Any) -> PreTrainedModel:
    """Add the adapters of a ``peft.PeftModel`` to the weights that they change, in place; return the plain model."""
    model: PreTrainedModel = adapted.merge_and_unload()
    if isinstance(model, MoEEnhancedChronos2):
        model.accept_base()
    return model.eval()


def beside(folder: Path) -> Path:
    """Return where adapters' base is saved if no other checkpoint holds it."""
    return folder.with_name(f"{folder.name}-base")


def _adapted_checkpoint(name: str, hub_options: Mapping[str, Any]) -> str | None:
    """Return the checkpoint that adapters are for, moved with them or not; None where ``name`` holds none."""
    file = find_adapter_config_file(name, **hub_options)
    if file is None:
        return None
    try:
        base = json.loads(Path(file).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        raise InputError(f"cannot load {name!r}: its adapter_config.json is not a JSON object") from None
    moved = beside(Path(name).resolve())
    if moved.is_dir() and not (base and Path(base).exists()):
        return str(moved)
    if not isinstance(base, str) or not base:
        raise InputError(f"the adapters in {name!r} name no base; set base_model_name_or_path in adapter_config.json")
    return base


def _add_adapters(model: PreTrainedModel, name: str, hub_options: Mapping[str, Any]) -> PreTrainedModel:
    with extra("lora"):
        from peft import PeftModel
    if model.bands is not None:
        raise InputError(
            f"the adapters in {name!r} change {model.config._name_or_path!r}, whose bands were recalibrated without "
            f"them; delete its {FILE}, and recalibrate the adapters' folder"
        )
    try:
        adapted = PeftModel.from_pretrained(model, name, torch_device=str(model.device), **hub_options)
    except (RuntimeError, ValueError) as error:  # sizes that differ, modules that are not there
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"the adapters in {name!r} are not for {model.config._name_or_path!r}: {reason}") from error
    return merge(adapted)
