"""Checking a checkpoint before its claimed size takes any memory.

A configuration is plain data: its types and ranges are checked first, then its sizes against the header of the weights,
which is read without them. Weights are safetensors, which hold no code; a ``pytorch_model.bin`` is refused.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from chronomoe.errors import InputError
from chronomoe.models.configuration import refusal
from chronomoe.models.mixture.mixture import DistilledMoE

FORMAT = 1
"""Of our own checkpoints, ``chronomoe_format`` in ``config.json``; those before it have none."""
Count = Annotated[int, Field(ge=1, le=1 << 24)]
DtypeName = Literal["float32", "bfloat16", "float16", "float64"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
T = TypeVar("T")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
class ForecastingFields:
    """``chronos_config`` of a Chronos-2 model."""

    context_length: Count
    output_patch_size: Count
    input_patch_size: Count
    input_patch_stride: Count
    quantiles: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1, max_length=1000)]
    use_reg_token: bool = False
    use_arcsinh: bool = False
    max_output_patches: Count = 1
    time_encoding_scale: Count = 1  # where it is left out, the model takes context_length

    def __post_init__(self) -> None:
        """Check the order of the levels, which forecasts keep."""
        if any(high <= low for low, high in pairwise(self.quantiles)):
            raise InputError(f"quantiles must ascend, got {self.quantiles}")


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class ProvenanceFields:
    """``provenance`` of a model, or of an expert."""

    teacher: str | None = None
    data: dict[str, str]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="ignore", strict=True, allow_inf_nan=False))
class ModelFields:
    """The sizes of a Chronos-2 model or an expert, with their defaults."""

    chronos_config: ForecastingFields
    d_model: Count = 512
    d_kv: Count = 64
    d_ff: Count = 2048
    num_layers: Count = 6
    num_heads: Count = 8
    vocab_size: Count = 2
    initializer_factor: float = Field(0.05, ge=0)
    dropout_rate: float = Field(0.1, ge=0, lt=1)
    layer_norm_epsilon: float = Field(1e-6, ge=1e-30, le=1)
    rope_theta: float = Field(10000.0, ge=1, le=1e30)
    feed_forward_proj: str = "relu"
    attn_implementation: Literal["eager", "sdpa"] | None = None
    provenance: ProvenanceFields | None = None


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="ignore", strict=True))
class CheckpointFields:
    """How a whole checkpoint is read; ``base_...`` belong to a ``MoEEnhancedChronos2``, ``low_rank`` to a mixture."""

    model_type: str = ""
    dtype: DtypeName | None = None
    torch_dtype: DtypeName | None = None
    base_dtype: DtypeName = "float32"
    base_sha256: str | None = None
    low_rank: Count | None = None


def check_checkpoint(
    name: str, kind: type[PreTrainedModel], values: Mapping[str, Any], hub_options: Mapping[str, Any], *, variant: Any
) -> None:
    """Check that a checkpoint can be read, is what it says, and fits its weights.

    Args:
        name: a folder, or a hub id, whose weights are downloaded.
        kind: the class that ``config.json`` names.
        values: of ``config.json``.
        hub_options: where the hub's files lie.
        variant: as in ``PreTrainedModel.from_pretrained``.

    Raises:
        InputError: it is of a newer format, a value is not accepted, or the weights are others or cut short.
    """
    _check_format(values, name=name)
    whole = _parse(values, CheckpointFields, name=name)
    cores = values.get("experts") if kind is DistilledMoE else [values]
    if not isinstance(cores, list) or not all(isinstance(core, dict) for core in cores):
        raise InputError(
            f"the config.json of {name!r} must list its experts, each with its sizes; save the model again"
        )
    shapes = read_shapes(weight_files(name, hub_options, variant=variant))
    fields = [_parse(core, ModelFields, name=name) for core in cores]
    elements = max((torch.Size(shape).numel() for shape in shapes.values()), default=0)
    layers = sum(core.num_layers for core in (fields if whole.low_rank is None else fields[:1]))
    widest = max((max(core.d_model, core.d_ff, core.num_heads * core.d_kv) for core in fields), default=0)
    if layers > len(shapes) or widest > elements:
        raise InputError(
            f"the weights in {name!r} are not those of its config.json, which asks for {layers} layers and a width of "
            f"{widest}, {len(shapes)} weights of at most {elements} numbers cannot hold that; save the model again"
        )
    _compare(_expected(kind, values, name=name), shapes, name=name)


def read_shapes(files: Sequence[Path]) -> Shapes:
    """Read names and shapes of weights; a file that is cut short raises ``SafetensorError``."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            shapes |= {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
    return shapes


def weight_files(name: str, hub_options: Mapping[str, Any], *, variant: Any = None) -> list[Path]:
    """Return the files that hold the weights, one or the shards that an index lists.

    Raises:
        InputError: there are none as safetensors, or the index names anything but files beside it.
    """
    infix = f".{variant}" if variant else ""
    single = stored_file(name, f"model{infix}.safetensors", hub_options)
    if single is not None:
        return [single]
    index = stored_file(name, f"model.safetensors.index{infix}.json", hub_options)
    if index is None:
        raise InputError(f"the checkpoint {name!r} has no weights as safetensors, the only form that is loaded")
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"the index of the weights in {name!r} is damaged: {error}; save the model again") from None
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise InputError(
                f"the index of the weights in {name!r} names {shard!r}, which is not a safetensors file beside it"
            )
    found = [stored_file(name, shard, hub_options) for shard in shards]
    if None in found:
        raise InputError(f"the checkpoint {name!r} lacks {shards[found.index(None)]}; download all of it")
    return [file for file in found if file is not None]


def stored_file(name: str, file: str, hub_options: Mapping[str, Any]) -> Path | None:
    """Return a file of a checkpoint, downloaded if need be; None where it has none."""
    path = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub_options)
    return None if path is None else Path(path)


def _check_format(values: Mapping[str, Any], *, name: str) -> None:
    found = values.get("chronomoe_format", 0)
    if not isinstance(found, int) or found > FORMAT:
        raise InputError(
            f"{name!r} was saved by a newer ChronoMoE: its format is {found!r}, this version reads up to {FORMAT}; "
            "pip install -U chronomoe"
        )


def _parse(values: Mapping[str, Any], kind: type[T], *, name: str) -> T:
    try:
        return TypeAdapter(kind).validate_json(json.dumps(values))  # strict, and objects as JSON has them
    except ValidationError as error:
        raise InputError(f"the config.json of {name!r} does not fit: {refusal(error, kind)}") from None


def _expected(kind: type[PreTrainedModel], values: Mapping[str, Any], *, name: str) -> Shapes:
    """Return the shapes that a configuration asks for, from a model that takes no memory."""
    faults = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
    try:
        with torch.device("meta"):
            model = kind(kind.config_class.from_dict(json.loads(json.dumps(values))))
    except InputError as error:
        raise InputError(f"the config.json of {name!r} does not fit: {error}") from None
    except faults as error:  # whatever a value that nothing checks may do
        reason = " ".join(str(error).split())
        raise InputError(f"the config.json of {name!r} does not fit: {type(error).__name__}: {reason}") from error
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def _compare(expected: Shapes, found: Shapes, *, name: str) -> None:
    for fault, keys in (
        ("missing", expected.keys() - found.keys()),
        ("of another shape", {key for key, shape in expected.items() if found.get(key, shape) != shape}),
        ("of blocks that it does not have", {key for key in found.keys() - expected.keys() if "encoder.block." in key}),
    ):
        if keys:
            raise InputError(
                f"the weights in {name!r} are not those of its config.json: {len(keys)} are {fault}, "
                f"such as {min(keys)!r}; save the model again"
            )


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the type that weights are loaded in; "auto" is about products.

    Raises:
        InputError: there is no such type.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32
    if dtype not in DTYPES:
        raise InputError(f"dtype must be 'auto' or one of {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]
