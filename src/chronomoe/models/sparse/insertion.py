"""Route 3: MoE layers inserted into a finished student, which stays bit for bit what it was."""

import copy
import hashlib
from collections.abc import Iterable
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from chronos.chronos2 import Chronos2Model, Chronos2Pipeline
from chronos.chronos2.config import Chronos2CoreConfig
from chronos.chronos2.layers import FeedForward
from pydantic import Field
from torch import Tensor, nn

from chronomoe.errors import InputError
from chronomoe.models.configuration import configuration, parse
from chronomoe.models.sparse.config import MoEConfig
from chronomoe.models.sparse.layer import Chronos2MoELayer
from chronomoe.models.sparse.upcycling import (
    SparseChronos2Model,
    check_dense,
    dense_fields,
    fresh_layer,
)
from chronomoe.models.unwrapping import model_of

SHARE_OF_DENSE = 4
"""An inserted expert has this part of the hidden units of the base's feed-forward block, unless told otherwise."""


@configuration
class MoEInsertionConfig:
    """Which MoE layers are inserted, and where."""

    after: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    """Encoder blocks that a layer follows, one for each layer, in the order of insertion. Layers after the same block
    stand in that order."""
    layer: MoEConfig = field(default_factory=lambda: MoEConfig(num_experts=4, top_k=1))
    """Every layer. Experts are a quarter as wide as the base's feed-forward block where ``expert_width`` is None;
    ``layers`` is not used, and the seed is that of the first layer: each further one counts on."""

    def __post_init__(self) -> None:
        for name in ("noise", "reinit"):
            if getattr(self.layer, name):
                raise InputError(
                    f"{name} changes copies of a dense block, and inserted layers have none; leave it at 0, got "
                    f"{getattr(self.layer, name)}"
                )


class MoEEnhancedConfig(Chronos2CoreConfig):  # type: ignore[misc]
    """The ``config.json`` of a ``MoEEnhancedChronos2``."""

    model_type = "chronomoe-enhanced"

    def __init__(
        self,
        insertion: dict[str, Any] | None = None,
        base_sha256: str = "",
        base_dtype: str = "float32",
        **kwargs: Any,
    ) -> None:
        self.insertion = asdict(MoEInsertionConfig(after=(0,))) if insertion is None else insertion
        self.base_sha256 = base_sha256
        self.base_dtype = base_dtype
        super().__init__(**{"chronos_pipeline_class": "ChronoMoEPipeline"} | kwargs)


class GrownFeedForward(FeedForward):  # type: ignore[misc]
    """A feed-forward block, as it was, and the MoE layers that follow it."""

    def __init__(self, dense: FeedForward) -> None:
        nn.Module.__init__(self)
        self.mlp, self.layer_norm, self.dropout = dense.mlp, dense.layer_norm, dense.dropout
        self.inserted = nn.ModuleList()

    def dense(self, hidden: Tensor) -> Tensor:
        """Apply the block without what was inserted."""
        fed: Tensor = super().forward(hidden)
        return fed

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply the block and the MoE layers."""
        hidden_states = self.dense(hidden_states)
        for layer in self.inserted:
            hidden_states = layer(hidden_states)
        return hidden_states


class MoEEnhancedChronos2(SparseChronos2Model):
    """A Chronos-2 model with residual MoE layers after chosen encoder blocks.

    They start as the identity. Everything else is frozen: a checkpoint holds the hash of the base's weights, and
    neither saves nor loads with others. New modules in a frozen model are those of Houlsby et al., 2019,
    https://arxiv.org/abs/1902.00751; theirs are dense.

    Args:
        base_model: a dense model or its pipeline, which is copied, or the configuration of a checkpoint.
        moe_config: the layers, or what one after the last block is like; the default one there when None. The
            configuration of a checkpoint holds its own.

    Raises:
        InputError: the base has MoE layers, or a layer is to follow a block that is not there.

    Examples:
        >>> base = load_teacher("tiny")
        >>> grown = MoEEnhancedChronos2(base, MoEConfig(num_experts=4, top_k=1))
        >>> grown.num_parameters() > base.num_parameters()
        True
    """

    config_class = MoEEnhancedConfig

    def __init__(
        self,
        base_model: Chronos2Model | Chronos2Pipeline | MoEEnhancedConfig,
        moe_config: MoEInsertionConfig | MoEConfig | None = None,
    ) -> None:
        base = model_of(base_model)
        if isinstance(base, MoEEnhancedConfig):
            super().__init__(base)
            insertion = self.insertion
            _check_places(insertion.after, base.num_layers)
        else:
            check_dense(base, what="inserting MoE layers", remedy="insert into the dense model, or use with_layer")
            last = (base.config.num_layers - 1,)
            if isinstance(moe_config, MoEInsertionConfig):
                insertion = moe_config
            elif moe_config is None:
                insertion = MoEInsertionConfig(after=last)
            else:
                insertion = MoEInsertionConfig(after=last, layer=moe_config)
            _check_places(insertion.after, base.config.num_layers)
            self.__dict__.update(copy.deepcopy(base.__dict__))  # in place of drawing weights: all that a module is
            self.config = MoEEnhancedConfig(
                **dense_fields(base.config),
                insertion=asdict(insertion),
                base_sha256=hash_weights(base.named_parameters()),
                base_dtype=_name(base.dtype),
            )
        self.requires_grad_(False)
        for number, after in enumerate(insertion.after):
            self._insert(after, number, insertion.layer)

    @property
    def insertion(self) -> MoEInsertionConfig:
        """The inserted layers."""
        return parse(self.config.insertion, MoEInsertionConfig, source="the inserted layers' configuration")

    @property
    def moe_layers(self) -> dict[int, Chronos2MoELayer]:
        """The inserted layers in order of computation, by their number in the order of insertion."""
        places = self._places()
        return {number: self._stack(after).inserted[depth] for after, depth, number in places}  # type: ignore[misc]

    @property
    def moe_blocks(self) -> list[int]:
        """The encoder block that each of ``moe_layers`` follows."""
        return [after for after, _, _ in self._places()]

    def with_layer(self, after: int) -> "MoEEnhancedChronos2":
        """Return a copy with one more layer, which is the identity; the others keep their weights.

        Raises:
            InputError: there is no such block.
        """
        insertion = self.insertion
        _check_places((after,), self.config.num_layers)
        grown = copy.deepcopy(self)
        grown.config.insertion = asdict(replace(insertion, after=(*insertion.after, after)))
        grown._insert(after, len(insertion.after), insertion.layer)
        return grown

    def base_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Yield the names, as the base has them, and weights of all that was not inserted."""
        return ((name, value) for name, value in self.named_parameters() if ".inserted." not in name)

    def base_hash(self) -> str:
        """Return the hash of the base's weights, which is that of the model the layers were inserted into."""
        return hash_weights(self.base_parameters())

    def accept_base(self) -> None:
        """Take the base's weights as they are now for those that stay, as after adapters were merged into them."""
        self.config.base_sha256, self.config.base_dtype = self.base_hash(), _name(self.dtype)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint with the hash of the base: see ``SparseChronos2Model.save_pretrained``.

        Raises:
            InputError: the base's weights changed since layers were inserted.
        """
        if self._is_comparable():
            self._check_base("insert layers into the changed model instead, or keep the base frozen")
        else:  # drawn afresh, or rounded to a narrower type: another base
            self.accept_base()
        super().save_pretrained(save_directory, *args, **kwargs)

    def _after_loading(self) -> None:
        for _, parameter in self.base_parameters():
            parameter.requires_grad_(False)
        if self._is_comparable():
            self._check_base("the file was changed, save the model again")

    def _is_comparable(self) -> bool:
        """Whether the weights still have the bits that were hashed, which a narrower type has not."""
        hashed: torch.dtype = getattr(torch, self.config.base_dtype)
        return bool(self.config.base_sha256) and torch.promote_types(hashed, self.dtype) == self.dtype

    def _check_base(self, remedy: str) -> None:
        found, wanted = self.base_hash(), self.config.base_sha256
        if found != wanted:
            raise InputError(
                f"the base's weights must stay those that layers were inserted into: their sha256 is {found[:12]}, not "
                f"{wanted[:12]}; {remedy}"
            )

    def _feed_forward(self, block: nn.Module, hidden: Tensor, *, observed: Tensor | None, notes: list[Any]) -> Tensor:
        feed_forward = block.layer[2]  # type: ignore[index]
        if not isinstance(feed_forward, GrownFeedForward):
            return super()._feed_forward(block, hidden, observed=observed, notes=notes)
        hidden = feed_forward.dense(hidden)
        for layer in feed_forward.inserted:
            assert isinstance(layer, Chronos2MoELayer)
            hidden, note = layer.mix(hidden, None if observed is None else observed > 0)
            notes.append(note)
        return hidden

    def _insert(self, after: int, number: int, layer: MoEConfig) -> None:
        block = self.encoder.block[after]
        if not isinstance(block.layer[2], GrownFeedForward):
            block.layer[2] = GrownFeedForward(block.layer[2])
        if layer.expert_width is None:
            layer = replace(layer, expert_width=max(1, self.config.d_ff // SHARE_OF_DENSE))
        generator = torch.Generator().manual_seed(layer.seed + number)
        new = fresh_layer(self.config, layer, generator=generator).cast(self.dtype)
        block.layer[2].inserted.append(new.to(self.device).train(self.training))

    def _stack(self, after: int) -> GrownFeedForward:
        stack = self.encoder.block[after].layer[2]
        assert isinstance(stack, GrownFeedForward)
        return stack

    def _places(self) -> list[tuple[int, int, int]]:
        """Return block, depth in its stack, and number of each layer, in order of computation."""
        after = self.insertion.after
        return sorted((block, after[:number].count(block), number) for number, block in enumerate(after))


def hash_weights(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 of named weights as float32, so that it outlives a cast to a wider type and back."""
    total = hashlib.sha256()
    for name, value in sorted(parameters, key=lambda entry: entry[0]):
        total.update(f"{name} {tuple(value.shape)}".encode())
        total.update(value.detach().float().cpu().contiguous().numpy().data)
    return total.hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_places(after: Iterable[int], num_layers: int) -> None:
    if max(after) >= num_layers or min(after) < 0:
        raise InputError(
            f"layers can follow the encoder blocks 0 to {num_layers - 1}, the model's own, got {list(after)}"
        )
