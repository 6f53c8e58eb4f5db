"""Route 2: Chronos-2 with sparse feed-forward blocks, upcycled from a dense model."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from chronos.chronos2 import Chronos2Model, Chronos2Pipeline
from chronos.chronos2.config import Chronos2CoreConfig
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PretrainedConfig

from chronomoe.errors import InputError
from chronomoe.models.chronos2 import ExactChronos2Model, ForecastOutput
from chronomoe.models.configuration import parse
from chronomoe.models.sparse.config import MoEConfig
from chronomoe.models.sparse.layer import Chronos2MoELayer, MoEAux
from chronomoe.models.unwrapping import model_of


@dataclass
class Chronos2MoEOutput(ForecastOutput):
    """A forecast with what the MoE layers report."""

    aux_loss: Tensor | None = None
    """Balance loss and ``z_weight`` times z-loss, summed over layers; not weighted against the forecast's loss yet."""
    moe: tuple[MoEAux, ...] | None = None
    """Of each layer, in order of computation: load, entropy, chosen experts and so on. Tokens are those that the layer
    computed, the last of them the forecast's: leading patches without a value are cut off, and in the last block the
    forecast tokens are alone."""


class SparseChronos2Model(ExactChronos2Model):
    """What Chronos-2 models with MoE layers share: see ``Chronos2MoEModel`` and ``MoEEnhancedChronos2``.

    Tokens of patches without a value are neither routed nor counted. Where no layer has a capacity, the forecast of a
    group does not depend on the rest of the batch. With ``output_attentions``, upstream's code runs in place of ours:
    the forecast is the same, ``aux_loss`` and ``moe`` are None.
    """

    _keep_in_fp32_modules_strict = {"router", "balance_bias"}  # float16 would round the first router to zero

    @property
    def moe_layers(self) -> dict[int, Chronos2MoELayer]:
        """The MoE layers, in the order of computation, which is that of ``Chronos2MoEOutput.moe``."""
        raise NotImplementedError

    @property
    def moe_blocks(self) -> list[int]:
        """The encoder block of each of ``moe_layers``."""
        raise NotImplementedError

    def active_parameters(self) -> int:
        """Count what one token uses: everything but the experts that it does not choose."""
        total: int = sum(parameter.numel() for parameter in self.parameters())
        for layer in self.moe_layers.values():
            total += layer.active_parameters() - sum(parameter.numel() for parameter in layer.parameters())
        return total

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Load a checkpoint: see ``PreTrainedModel.from_pretrained``.

        Raises:
            InputError: a weight is missing; nothing is drawn afresh in its place.
        """
        model, report = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        if report["missing_keys"]:
            raise InputError(
                f"the weights in {str(pretrained_model_name_or_path)!r} are not those of its config.json: "
                f"{len(report['missing_keys'])} are missing, such as {min(report['missing_keys'])!r}; "
                "save the model again"
            )
        model._after_loading()
        return (model, report) if output_loading_info else model

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint that ``ChronoMoEPipeline`` loads, and the stock pipelines after ``import chronomoe``."""
        self.config.chronos_pipeline_class = "ChronoMoEPipeline"
        PreTrainedModel.save_pretrained(self, save_directory, *args, **kwargs)

    def _after_loading(self) -> None:
        """Restore what the weights on disk do not hold."""

    def _output(self, notes: list[MoEAux], **parts: Any) -> Chronos2MoEOutput:
        if not notes:
            return Chronos2MoEOutput(**parts)
        weights = [layer.config.z_weight for layer in self.moe_layers.values()]
        losses = [note.balance_loss + weight * note.z_loss for note, weight in zip(notes, weights, strict=True)]
        return Chronos2MoEOutput(**parts, aux_loss=torch.stack(losses).sum(), moe=tuple(notes))


class Chronos2MoEConfig(Chronos2CoreConfig):  # type: ignore[misc]
    """The ``config.json`` of a ``Chronos2MoEModel``."""

    model_type = "chronomoe-moe"

    def __init__(self, moe: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.moe = asdict(MoEConfig()) if moe is None else moe
        super().__init__(**{"chronos_pipeline_class": "ChronoMoEPipeline"} | kwargs)


class Chronos2MoEModel(SparseChronos2Model):
    """A Chronos-2 model in which MoE layers take the place of feed-forward blocks.

    ``upcycle`` makes one from a dense model. Fresh from a configuration, weights are drawn and MoE layers are the
    identity.

    Raises:
        InputError: an MoE layer is meant for a block that is not there, or widths do not divide.
    """

    config_class = Chronos2MoEConfig

    def __init__(self, config: Chronos2MoEConfig) -> None:
        super().__init__(config)
        moe = parse(config.moe, MoEConfig, source="the MoE layers' configuration")
        generator = torch.Generator().manual_seed(moe.seed)
        for block in _sparse_blocks(moe, config.num_layers):
            layer = fresh_layer(config, moe, generator=generator)
            self.encoder.block[block].layer[2] = layer

    @property
    def moe_layers(self) -> dict[int, Chronos2MoELayer]:
        """The MoE layers by encoder block."""
        layers = {index: block.layer[2] for index, block in enumerate(self.encoder.block)}
        return {index: layer for index, layer in layers.items() if isinstance(layer, Chronos2MoELayer)}

    @property
    def moe_blocks(self) -> list[int]:
        """The encoder blocks that have an MoE layer."""
        return list(self.moe_layers)

    def _feed_forward(self, block: nn.Module, hidden: Tensor, *, observed: Tensor | None, notes: list[Any]) -> Tensor:
        layer = block.layer[2]  # type: ignore[index]
        if not isinstance(layer, Chronos2MoELayer):
            return super()._feed_forward(block, hidden, observed=observed, notes=notes)
        hidden, note = layer.mix(hidden, None if observed is None else observed > 0)
        notes.append(note)
        return hidden


def upcycle(model: Chronos2Model | Chronos2Pipeline, config: MoEConfig) -> Chronos2MoEModel:
    """Make a model with MoE layers that computes what ``model`` does, unless noise or fresh units are asked for.

    Sparse upcycling, Komatsuzaki et al., 2022, https://arxiv.org/abs/2212.05055; how a block is cut into experts, and
    why the output stays the same: see ``chronomoe.models.sparse.init`` and ``chronomoe.models.sparse.layer``.
    A capacity may drop tokens, whose output then differs.

    Args:
        model: any dense Chronos-2 model, or its pipeline; it is not changed. Type, device and mode of the result are
            its own; routers are float32 at least.
        config: experts, and the blocks that get them.

    Raises:
        InputError: the model is not a dense Chronos-2 model, a block is not there, or the widths do not divide.

    Examples:
        >>> sparse = upcycle(load_teacher("tiny"), MoEConfig(num_experts=4, top_k=1, layers=(0,)))
        >>> sparse.active_parameters() < sparse.num_parameters()
        True
    """
    model = model_of(model)
    check_dense(model, what="upcycle", remedy="upcycle the dense model")
    blocks = _sparse_blocks(config, model.config.num_layers)
    config.slice_width(model.config.d_ff)  # refused before anything is copied
    upcycled = copy.deepcopy(model)
    upcycled.__class__ = Chronos2MoEModel
    upcycled.config = Chronos2MoEConfig(**dense_fields(model.config), moe=asdict(config))
    generator = torch.Generator().manual_seed(config.seed)
    for index in blocks:
        block = upcycled.encoder.block[index]
        block.layer[2] = Chronos2MoELayer.from_dense(block.layer[2], config, generator=generator)
    assert isinstance(upcycled, Chronos2MoEModel)
    return upcycled


def check_dense(model: PreTrainedModel, *, what: str, remedy: str) -> None:
    """Refuse a model that is not a dense Chronos-2 model, saying ``what`` needs one and what to do instead.

    Raises:
        InputError: it has MoE layers, or is of another architecture.
    """
    if not isinstance(model, Chronos2Model):
        raise InputError(f"{what} needs a dense Chronos-2 model, got a {type(model).__name__}")
    if isinstance(model, SparseChronos2Model):
        raise InputError(
            f"{what} needs a dense Chronos-2 model, got a {type(model).__name__}, which has MoE layers; {remedy}"
        )


def dense_fields(config: Chronos2CoreConfig) -> Mapping[str, Any]:
    """Return what a configuration says of a model's dense parts, for another kind of configuration."""
    own = ("architectures", "chronos_pipeline_class", "model_type", "transformers_version")
    fields: dict[str, Any] = PretrainedConfig.to_dict(config)
    return {name: value for name, value in fields.items() if name not in own}


def fresh_layer(config: Chronos2CoreConfig, moe: MoEConfig, *, generator: torch.Generator) -> Chronos2MoELayer:
    """Make an MoE layer that fits a model and is the identity."""
    return Chronos2MoELayer(
        d_model=config.d_model,
        d_ff=config.d_ff,
        config=moe,
        dropout_rate=config.dropout_rate,
        layer_norm_epsilon=config.layer_norm_epsilon,
        activation=config.dense_act_fn,
        generator=generator,
    )


def _sparse_blocks(config: MoEConfig, num_layers: int) -> list[int]:
    if config.layers is None:
        return list(range(num_layers))
    if max(config.layers) >= num_layers:
        raise InputError(
            f"layers must be from 0 to {num_layers - 1}, the model's encoder blocks, got {max(config.layers)}"
        )
    return sorted(config.layers)
