"""Configuration of a pretraining run."""

from dataclasses import replace

from pydantic import Field

from chronomoe.errors import InputError
from chronomoe.models.configuration import configuration
from chronomoe.pretraining.batches import MixConfig, Phase
from chronomoe.pretraining.corpus import CorpusConfig


@configuration
class TeacherConfig:
    """Size of the model."""

    d_model: int = Field(192, ge=1)
    """Width of a token."""
    d_kv: int = Field(64, ge=2, multiple_of=2)
    """Width of an attention head; even, for rotary positions."""
    num_heads: int = Field(3, ge=1)
    """Attention heads."""
    d_ff: int = Field(768, ge=1)
    """Units of each feed-forward block."""
    num_layers: int = Field(4, ge=1)
    """Encoder blocks."""
    patch_size: int = Field(16, ge=1)
    """Steps of a token."""
    dropout_rate: float = Field(0.0, ge=0, lt=1)
    """Dropout everywhere."""


@configuration
class PretrainConfig:
    """A whole pretraining run."""

    teacher: TeacherConfig = TeacherConfig()
    """Size of the model."""
    corpus: CorpusConfig = CorpusConfig()
    """Which series are drawn."""
    mix: MixConfig = MixConfig()
    """How they become windows; its context length and horizon are the model's."""
    growth: tuple[Phase, ...] = ()
    """Phases of shorter contexts before the longest one: steps, context length, batch size."""
    steps: int = Field(4250, ge=1)
    """Optimiser steps of all phases together."""
    batch_size: int = Field(64, ge=1)
    """Windows of a batch, on each process, when they have the longest context."""
    learning_rate: float = Field(2e-3, gt=0)
    """Peak of the warm-up, stable, decay schedule."""
    warmup_steps: int = Field(200, ge=0)
    """Steps of linear warm-up."""
    decay_steps: int = Field(1500, ge=0)
    """Last steps, in which the learning rate falls to a hundredth of its peak."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's."""
    average_decay: float = Field(0.998, ge=0, lt=1)
    """Of the running average of the weights, which is what is validated and shipped; 0 for the weights themselves."""
    save_steps: int = Field(250, ge=1)
    """Steps between two resumable checkpoints."""
    validation: tuple[str, ...] | None = None
    """Domains watched during training, as ``load_domain`` takes them; the demo domains when None."""
    validation_steps: int = Field(500, ge=1)
    """Steps between two looks at them."""
    workers: int = Field(0, ge=0)
    """Background processes that make batches, for each training process."""
    bf16: bool = False
    """Train in bf16 autocast: faster on a GPU or a processor with bf16 instructions, far slower elsewhere."""
    seed: int = 0
    """Of initial weights and windows; the corpus has its own."""

    def __post_init__(self) -> None:
        for length in [self.mix.horizon, *(phase.context_length for phase in self.phases)]:
            if length < 1 or length % self.teacher.patch_size:
                raise InputError(
                    f"context lengths and horizon must be multiples of the patch size {self.teacher.patch_size}, "
                    f"got {length}"
                )
        longest = max(phase.context_length for phase in self.phases)
        if longest > self.mix.context_length:
            raise InputError(
                f"contexts must not grow beyond the model's {self.mix.context_length} steps, got {longest}"
            )
        if self.corpus.length < self.mix.context_length + self.mix.horizon:
            raise InputError(
                f"the corpus needs series of at least a context and a horizon, {self.mix.context_length} + "
                f"{self.mix.horizon} steps, got {self.corpus.length}"
            )

    @property
    def phases(self) -> tuple[Phase, ...]:
        """All phases, the longest context last; one that has no step left is left out."""
        phases: list[Phase] = []
        left = self.steps
        for phase in self.growth:
            if phase.steps >= left:
                return (*phases, replace(phase, steps=left))
            phases.append(phase)
            left -= phase.steps
        last = Phase(steps=left, context_length=self.mix.context_length, batch_size=self.batch_size)
        return (*phases, last)

    @property
    def decay(self) -> int:
        """Steps in which the rate falls: after the warm-up, which is not shortened, so that a short run is a start."""
        return max(0, min(self.decay_steps, self.steps - self.warmup_steps))

    def begins_like(self, other: "PretrainConfig", *, steps: int) -> bool:
        """Return whether the first ``steps`` steps of both runs are the same."""
        free = {"steps": 1, "decay_steps": 0, "growth": (), "save_steps": 1, "validation_steps": 1, "workers": 0}
        if replace(self, **free) != replace(other, **free):  # type: ignore[arg-type]
            return False
        if steps and replace(self, steps=steps).phases != replace(other, steps=steps).phases:
            return False
        stable = min(config.steps - config.decay for config in (self, other))
        return steps <= stable or (self.steps, self.decay_steps) == (other.steps, other.decay_steps)
