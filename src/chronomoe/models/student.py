"""Students: smaller Chronos-2 models that start from a teacher's weights."""

import copy
import math
from typing import Literal

import torch
from chronos.chronos2 import Chronos2Model, Chronos2Pipeline
from chronos.chronos2.config import Chronos2CoreConfig
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from chronomoe.errors import InputError, nearest
from chronomoe.models.chronos2 import ExactChronos2Model, cast_parameters, use_exact_group_attention
from chronomoe.models.configuration import configuration
from chronomoe.models.sparse.upcycling import check_dense
from chronomoe.models.unwrapping import model_of

PRESETS = {
    "half": "just under half of the layers: 50-60 % fewer parameters",
    "small": "a sixth of the layers, at least one: 60-80 % fewer parameters",
    "slim": "a sixth of the layers, half of the heads and feed-forward units: about 80-90 % fewer parameters",
}
"""Named sizes, relative to the teacher."""


@configuration
class StudentConfig:
    """How much of the teacher a student keeps; None keeps the teacher's value."""

    num_layers: int | None = Field(default=None, ge=1)
    """Encoder blocks: the first and the last are kept, the others evenly spaced; a single one is the first."""
    d_model: int | None = Field(default=None, ge=1)
    """Width of a token."""
    num_heads: int | None = Field(default=None, ge=1)
    """Attention heads of each block."""
    d_ff: int | None = Field(default=None, ge=1)
    """Units of each feed-forward block, and of the input and output embeddings."""
    init: Literal["teacher", "random"] = "teacher"
    """Copy what is kept from the teacher, or start afresh."""

    @classmethod
    def preset(cls, name: str, teacher: Chronos2Model) -> "StudentConfig":
        """Return the named size for this teacher; the names and what they mean are in ``PRESETS``."""
        config = teacher.config
        sixth = max(1, round(config.num_layers / 6))
        match name:
            case "half":
                return cls(num_layers=max(1, (config.num_layers - 1) // 2))  # the embeddings stay whole
            case "small":
                return cls(num_layers=sixth)
            case "slim":
                return cls(num_layers=sixth, num_heads=max(1, config.num_heads // 2), d_ff=max(1, config.d_ff // 2))
        raise InputError(f"Unknown student preset {name!r}. Available: {', '.join(PRESETS)}.{nearest(name, PRESETS)}")


def create_student_model(
    teacher: Chronos2Model | Chronos2Pipeline,
    config: StudentConfig | str = "small",
    *,
    generator: torch.Generator | None = None,
) -> ExactChronos2Model:
    """Make a student: a ``Chronos2Model`` with fewer layers, heads, feed-forward units or channels than its teacher.

    What is kept of a layer is what weighs most: heads and units by the product of the norms of the weights that read
    and write them, channels by the norm of everything that reads or writes them (magnitude pruning; Muralidharan et
    al., 2024, https://arxiv.org/abs/2407.14679, find activation-based importance somewhat better, at the price of
    calibration data). Quantile levels, patch size, context and horizon limits are the teacher's. The teacher is not
    changed.

    Args:
        teacher: any Chronos-2 model without MoE layers, or its pipeline.
        config: the size, or the name of one in ``PRESETS``.
        generator: draws the weights where ``init`` is "random"; torch's global one when None.

    Raises:
        InputError: the student would be larger than the teacher in some dimension, or the teacher has MoE layers.

    Examples:
        >>> teacher = load_teacher("tiny")
        >>> student = create_student_model(teacher, "slim")
        >>> student.config.num_layers, student.config.num_heads, student.config.d_ff
        (1, 2, 512)
        >>> f"{1 - student.num_parameters() / teacher.num_parameters():.0%} fewer parameters"
        '77% fewer parameters'
    """
    teacher = model_of(teacher)
    check_dense(teacher, what="cutting a student", remedy="cut it from the dense model and upcycle the student")
    if isinstance(config, str):
        config = StudentConfig.preset(config, teacher)
    old, new = teacher.config, copy.deepcopy(teacher.config)
    vars(new).pop("provenance", None)  # the teacher's own
    for name in ("num_layers", "d_model", "num_heads", "d_ff"):
        wanted = getattr(config, name)
        if wanted is not None:
            if wanted > getattr(old, name):
                raise InputError(f"{name} must be at most the teacher's {getattr(old, name)}, got {wanted}")
            setattr(new, name, wanted)
    seed = int(torch.randint(2**31, (), generator=generator)) if config.init == "random" else 0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = Chronos2Model(new)
    if config.init == "teacher":
        student.load_state_dict(_kept_weights(teacher, new))
    cast_parameters(student, teacher.dtype)
    return use_exact_group_attention(student.to(teacher.device))


def kept_layers(total: int, kept: int) -> list[int]:
    """Return the indices of ``kept`` layers of ``total``: the first, the last and evenly spaced ones between."""
    if kept == 1:
        return [0]
    return [math.floor(index * (total - 1) / (kept - 1) + 0.5) for index in range(kept)]


def _kept_weights(teacher: Chronos2Model, new: Chronos2CoreConfig) -> dict[str, Tensor]:
    weights = {name: value.detach().cpu().clone() for name, value in teacher.state_dict().items()}
    layers = kept_layers(teacher.config.num_layers, new.num_layers)
    moved: dict[str, Tensor] = {}
    for name, value in weights.items():
        if not name.startswith("encoder.block."):
            moved[name] = value
    for place, source in enumerate(layers):
        prefix = f"encoder.block.{source}."
        for name, value in weights.items():
            if name.startswith(prefix):
                moved[f"encoder.block.{place}.{name.removeprefix(prefix)}"] = value
    for place in range(new.num_layers):
        for layer in (0, 1):
            _prune_heads(moved, f"encoder.block.{place}.layer.{layer}.self_attention", new.num_heads, new.d_kv)
        _prune_units(moved, f"encoder.block.{place}.layer.2.mlp", "wi", "wo", new.d_ff)
    for embedding in ("input_patch_embedding", "output_patch_embedding"):
        _prune_units(moved, embedding, "hidden_layer", "output_layer", new.d_ff)
    _prune_channels(moved, new.d_model)
    return moved


def _strongest(importance: Float[Tensor, " unit"], keep: int) -> Int[Tensor, " kept"]:
    return importance.topk(keep).indices.sort().values


def _prune_heads(weights: dict[str, Tensor], module: str, heads: int, d_kv: int) -> None:
    total = len(weights[f"{module}.q.weight"]) // d_kv
    if heads == total:
        return
    norm = {name: weights[f"{module}.{name}.weight"].float().view(total, -1).norm(dim=1) for name in ("q", "k", "v")}
    out = weights[f"{module}.o.weight"].float().view(-1, total, d_kv).norm(dim=(0, 2))
    kept = _strongest(norm["q"] * norm["k"] + norm["v"] * out, heads)
    units = (kept[:, None] * d_kv + torch.arange(d_kv)).flatten()
    for name in ("q", "k", "v"):
        weights[f"{module}.{name}.weight"] = weights[f"{module}.{name}.weight"][units]
    weights[f"{module}.o.weight"] = weights[f"{module}.o.weight"][:, units]


def _prune_units(weights: dict[str, Tensor], module: str, reads: str, writes: str, units: int) -> None:
    read, write = weights[f"{module}.{reads}.weight"], weights[f"{module}.{writes}.weight"]
    if units == len(read):
        return
    kept = _strongest(read.float().norm(dim=1) * write.float().norm(dim=0), units)
    weights[f"{module}.{reads}.weight"] = read[kept]
    weights[f"{module}.{writes}.weight"] = write[:, kept]
    if f"{module}.{reads}.bias" in weights:
        weights[f"{module}.{reads}.bias"] = weights[f"{module}.{reads}.bias"][kept]


def _channel_axis(name: str) -> int | None:
    """Return which axis of a parameter runs over the channels of the residual stream."""
    if name.endswith("layer_norm.weight"):
        return 0
    if name.endswith((".o.weight", ".wo.weight")) or name.startswith("input_patch_embedding"):
        return None if "hidden_layer" in name else 0
    if name.endswith((".q.weight", ".k.weight", ".v.weight", ".wi.weight")) or name == "shared.weight":
        return 1
    if name in ("output_patch_embedding.hidden_layer.weight", "output_patch_embedding.residual_layer.weight"):
        return 1
    return None


def _prune_channels(weights: dict[str, Tensor], channels: int) -> None:
    total = weights["shared.weight"].shape[1]
    if channels == total:
        return
    importance = torch.zeros(total)
    for name, value in weights.items():
        axis = _channel_axis(name)
        if axis is not None and value.ndim == 2:
            power = value.float().square().sum(dim=1 - axis)
            importance += power / power.sum()
    kept = _strongest(importance, channels)
    for name, value in weights.items():
        axis = _channel_axis(name)
        if axis is not None:
            weights[name] = value.index_select(axis, kept)
