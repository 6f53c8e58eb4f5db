"""The device a run computes on, and the processes that share its work (``torchrun``, ``accelerate launch``)."""

import functools
import os
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from chronomoe.errors import InputError

DEVICES = "auto, cpu, cuda, cuda:N or mps"
PATIENCE = timedelta(days=30)
"""A process waits this long for another one: a stage may take days, and the launcher ends all when one fails."""


def choose_device(name: str = "auto") -> torch.device:
    """Return the device with this name.

    Args:
        name: ``auto`` is a CUDA GPU where torch finds one, else the CPU. Of several processes each takes the GPU of
            its own number.

    Raises:
        InputError: there is no such device on this machine, or no such name.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"device must be {DEVICES}, got {name!r}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"device 'mps' needs an Apple GPU, and torch {torch.__version__} finds none; use cpu")
    if device.type != "cuda":
        return torch.device(device.type)
    if not torch.cuda.is_available():
        raise InputError(
            f"device {name!r} needs a CUDA GPU, and torch {torch.__version__} finds none; use cpu, or install a torch "
            "built for CUDA"
        )
    if count_processes() > 1:
        if device.index is not None:
            raise InputError(f"each of several processes takes the GPU of its own number, got {name!r}; use cuda")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    index, count = device.index or 0, torch.cuda.device_count()
    if index >= count:
        raise InputError(f"device 'cuda:{index}' is not there: torch finds {count} GPUs, numbered from 0")
    return torch.device("cuda", index)


def place_model(model: Any, name: str = "auto") -> torch.device:
    """Move a model to the device with this name and return that; ``auto`` leaves an exported model on the CPU."""
    device = torch.device("cpu") if name == "auto" and not isinstance(model, nn.Module) else choose_device(name)
    model.to(device)
    return device


def count_processes() -> int:
    """Return how many processes were launched together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first_process() -> bool:
    """Whether this is the process that writes: the first, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def check_one_process(what: str) -> None:
    """Refuse several processes where their decisions could differ or each would do the same work."""
    if count_processes() > 1:
        raise InputError(
            f"{what} runs in one process, got {count_processes()}; start it without torchrun or accelerate launch"
        )


def tell(key: str, value: str = "") -> None:
    """Tell the other processes of this launch something, which they ``hear``; without others, do nothing."""
    if count_processes() > 1:
        _store().set(key, value)


def hear(key: str) -> str:
    """Wait until another process tells this, and return what it said."""
    _store().wait([key], PATIENCE)
    return str(_store().get(key).decode())


def meet(place: str) -> None:
    """Wait until all processes of this launch have arrived here."""
    if count_processes() > 1:
        tell(f"{place}/{os.environ['RANK']}")
        for rank in range(count_processes()):
            hear(f"{place}/{rank}")


@functools.cache
def _store() -> Store:
    """Return the launch's key-value store: one of its own, so that nothing in it is left from another launch."""
    try:
        store: Store = next(rendezvous("env://"))[0]
    except ValueError as error:  # torch names the variable that is missing
        raise InputError(
            f"WORLD_SIZE says that {count_processes()} processes were launched together, but {error}; "
            "start them with torchrun, or unset WORLD_SIZE"
        ) from None
    return store
