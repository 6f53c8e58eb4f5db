"""Writing LoRA adapters, as small as ``peft`` makes them, so that what they were trained on is found again."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from chronomoe.checkpoints.loading import beside, load_checkpoint
from chronomoe.checkpoints.writing import whole_folder, write_checkpoint
from chronomoe.errors import InputError

PASSING = {"_name_or_path", "architectures", "dtype", "transformers_version", "chronomoe_format"}
"""What a configuration says of its file rather than of the model."""


def save_adapters(adapted: Any, base: PreTrainedModel, folder: Path) -> None:
    """Save adapters with the name of the checkpoint that holds their base.

    Where none does, because the base was never saved or has changed since, it is saved beside ``folder``.

    Args:
        adapted: a ``peft.PeftModel``.
        base: the model without the adapters.
        folder: a new or empty folder, or one that holds a checkpoint, which is replaced.
    """
    folder = folder.expanduser().resolve()
    name = _checkpoint_of(base)
    if name is None:
        name = str(beside(folder))
        write_checkpoint(base, beside(folder))
    for config in adapted.peft_config.values():
        config.base_model_name_or_path = name
    with whole_folder(folder) as scratch:
        adapted.save_pretrained(scratch)
        base.config.save_pretrained(scratch)  # for BaseChronosPipeline, which asks it for the pipeline


def _checkpoint_of(model: PreTrainedModel) -> str | None:
    """Return the checkpoint that a model was loaded from; None where it holds another model by now."""
    name = model.config._name_or_path
    try:
        stored = load_checkpoint(name) if name else None
    except InputError:
        return None
    if stored is None or not _is_same(stored, model):
        return None
    return str(Path(name).resolve()) if Path(name).exists() else str(name)


def _is_same(stored: PreTrainedModel, model: PreTrainedModel) -> bool:
    told, asked = (
        {key: value for key, value in one.config.to_dict().items() if key not in PASSING} for one in (stored, model)
    )
    first, second = stored.state_dict(), model.state_dict()
    return (
        isinstance(model, type(stored))
        and told == asked
        and first.keys() == second.keys()
        and all(torch.equal(first[key].to(value), value) for key, value in second.items())
    )
