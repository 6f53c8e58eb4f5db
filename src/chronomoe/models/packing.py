"""Products with weights that are laid out for them once, by oneDNN.

torch takes float32 products on CPUs from MKL, which leaves the wide units of other makers' processors half idle and
reads the weights anew for every product of a few rows. It uses these two operations itself, in what it compiles.
"""

import math
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear


def pack(weight: Tensor) -> Tensor:
    """Lay a weight ``(out, in)`` out for :func:`product`; return it as it is where oneDNN has no form of its type."""
    if weight.device.type != "cpu" or not _packs(weight.dtype):
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
    return packed


def product(states: Float[Tensor, "*rows width"], weight: Tensor) -> Float[Tensor, "*rows out"]:
    """Multiply by a weight ``(out, in)``, packed or not."""
    if not weight.is_mkldnn:
        return linear(states, weight)
    found: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, None, "none", [], "")
    return found


def packed_flops(states: tuple[int, ...], weight: tuple[int, ...], *_: object, **__: object) -> int:
    """Count the operations of a packed product for ``torch.utils.flop_counter``, which does not know it."""
    return 2 * math.prod(states) * weight[0]


PACKED: dict[Any, Any] = (
    {torch.ops.mkldnn._linear_pointwise: packed_flops} if hasattr(torch.ops.mkldnn, "_linear_pointwise") else {}
)
"""``custom_mapping`` of a ``FlopCounterMode``."""


@cache
def _packs(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or "AVX" not in torch.backends.cpu.get_cpu_capability():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
