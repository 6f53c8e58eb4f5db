"""A GPU that is none: tensors that call themselves CUDA's, compute on the CPU, and refuse to meet tensors of the CPU.

Whatever computes with them has all its tensors on one device.
"""

import sys
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("meta")  # a device of which a torch built for CPUs has all but the arithmetic
MAY_MEET = ("_to_copy", "copy_", "index", "index_put_", "_index_put_impl_", "_unsafe_index")
"""Operations that take tensors of both devices, as CUDA's own do."""


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says it lies on a GPU."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=GPU
        )

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"OnGpu({self.held})"

    def __deepcopy__(self, memo):
        copied = OnGpu(self.held.clone())
        return torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """Run an operation on what tensors hold, and wrap what it makes for the GPU."""
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
    name = func.overloadpacket.__name__
    others = [tensor for tensor in tensors if not isinstance(tensor, OnGpu) and tensor.ndim]
    if ours and others and name not in MAY_MEET:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, got {GPU} and cpu")
    target = kwargs.get("device")
    goes = torch.device(target).type == GPU.type if target is not None else bool(ours)
    if name in ("copy_", "index_put_", "_index_put_impl_", "index"):
        goes = isinstance(args[0], OnGpu)
    kwargs = {
        key: torch.device("cpu") if key == "device" and value is not None else value for key, value in kwargs.items()
    }
    kwargs.pop("pin_memory", None)
    held = tree_map(lambda value: value.held if isinstance(value, OnGpu) else value, (args, kwargs))
    if name == "_local_scalar_dense" or name == "equal":
        return func(*held[0], **held[1])
    made = func(*held[0], **held[1])
    if name.endswith("_") and ours and not isinstance(made, torch.Tensor):
        return made
    known = {id(tensor.held): tensor for tensor in ours}
    return tree_map(
        lambda value: known.get(id(value), OnGpu(value)) if goes and isinstance(value, torch.Tensor) else value, made
    )


class _Factories(TorchDispatchMode):
    """Catches what is made on the GPU from nothing, or brought there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if (
            device is not None
            and torch.device(device).type == GPU.type
            or any(issubclass(kind, OnGpu) for kind in types)
        ):
            return run(func, args, kwargs)
        return func(*args, **kwargs)


def _tensor(make, data, *, device=None, **options):
    """Do what ``torch.tensor`` does, where a mode sees it."""
    made = make(data, **options)
    return made if device is None else made.to(device)


@contextmanager
def pretend_gpu():
    """Let ``.to(GPU)`` and factories on it work."""
    with pytest.MonkeyPatch.context() as patch, _Factories():
        patch.setattr("torch.tensor", partial(_tensor, torch.tensor))
        patch.setattr("torch.is_autocast_enabled", lambda kind=None: False)
        patch.setattr("torch.autocast", lambda *args, **options: nullcontext())
        patch.setattr("torch.inference_mode", torch.no_grad)
        patch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *_, **__: None)
        yield GPU
