"""Pretraining a compact Chronos-2 teacher on synthetic series."""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from chronos.chronos2 import Chronos2Model
from chronos.chronos2.config import Chronos2CoreConfig
from torch.utils.tensorboard import SummaryWriter
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from chronomoe.data.synthetic import CorpusConfig, MixConfig, PretrainingWindows, build_corpus
from chronomoe.data.windows import Batch, Window, collate, model_inputs
from chronomoe.errors import InputError
from chronomoe.models.group_attention import ExactChronos2Model, cast_parameters, use_exact_group_attention
from chronomoe.training.trainer import last_checkpoint

QUANTILE_LEVELS = (0.01, *(round(0.05 * step, 2) for step in range(1, 20)), 0.99)
"""The 21 levels of the public Chronos-2 checkpoint."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Size of the model."""

    d_model: int = 192
    """Width of a token."""
    d_kv: int = 64
    """Width of an attention head."""
    num_heads: int = 3
    """Attention heads."""
    d_ff: int = 768
    """Units of each feed-forward block."""
    num_layers: int = 4
    """Encoder blocks."""
    patch_size: int = 16
    """Steps of a token."""
    dropout_rate: float = 0.0
    """Dropout everywhere."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A whole pretraining run."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """Size of the model."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """Which series are drawn."""
    mix: MixConfig = field(default_factory=MixConfig)
    """How they become windows; its context length and horizon are the model's."""
    steps: int = 4250
    """Optimiser steps."""
    batch_size: int = 64
    """Windows of a step, on each process."""
    learning_rate: float = 2e-3
    """Peak of the warm-up, stable, decay schedule."""
    warmup_steps: int = 200
    """Steps of linear warm-up."""
    decay_steps: int = 1500
    """Last steps, in which the learning rate falls to a hundredth of its peak."""
    weight_decay: float = 0.01
    """AdamW's."""
    save_steps: int = 250
    """Steps between two resumable checkpoints."""
    bf16: bool = False
    """Train in bf16 autocast: faster on a GPU or a processor with bf16 instructions, far slower elsewhere."""
    seed: int = 0
    """Of initial weights and windows; the corpus has its own."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise InputError(f"steps and batch_size must be at least 1, got {self.steps} and {self.batch_size}")
        if self.mix.horizon % self.teacher.patch_size or self.mix.context_length % self.teacher.patch_size:
            raise InputError(
                f"context length and horizon must be multiples of the patch size {self.teacher.patch_size}, got "
                f"{self.mix.context_length} and {self.mix.horizon}"
            )
        if self.corpus.length < self.mix.context_length + self.mix.horizon:
            raise InputError(
                f"the corpus needs series of at least a context and a horizon, {self.mix.context_length} + "
                f"{self.mix.horizon} steps, got {self.corpus.length}"
            )


def new_teacher(config: PretrainConfig) -> ExactChronos2Model:
    """Make an untrained Chronos-2 of the configured size, the same for the same seed."""
    size = config.teacher
    core = Chronos2CoreConfig(
        d_model=size.d_model,
        d_kv=size.d_kv,
        d_ff=size.d_ff,
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        dropout_rate=size.dropout_rate,
        chronos_config={
            "context_length": config.mix.context_length,
            "input_patch_size": size.patch_size,
            "input_patch_stride": size.patch_size,
            "output_patch_size": size.patch_size,
            "max_output_patches": config.mix.horizon // size.patch_size,
            "quantiles": list(QUANTILE_LEVELS),
            "use_reg_token": True,
            "use_arcsinh": True,
        },
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return use_exact_group_attention(Chronos2Model(core))


def _loss_inputs(windows: Sequence[Window], *, patch_size: int) -> Batch:
    batch = collate(windows, patch_size=patch_size)
    return {**model_inputs(batch), "future_target": batch["future_target"]}


class InOrderTrainer(Trainer):
    """A ``Trainer`` that takes windows in their order: they are drawn at random already."""

    def _get_train_sampler(self, train_dataset: object = None) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def pretrain(
    config: PretrainConfig,
    out: Path,
    *,
    callbacks: list[TrainerCallback] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ExactChronos2Model:
    """Train a teacher and write its checkpoint to ``out``; an interrupted run continues at its last saved step.

    ``out`` also gets ``pretrain.json`` (the configuration), ``corpus/``, ``checkpoints/`` and TensorBoard files in
    ``logs/``.

    Raises:
        InputError: ``out`` holds a run of another configuration.
    """
    checkpoints = out / "checkpoints"
    resume = last_checkpoint(checkpoints)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": min(config.decay_steps, config.steps), "min_lr_ratio": 0.01},
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        bf16=config.bf16,
        seed=config.seed,
        save_steps=config.save_steps,
        save_total_limit=2,
        logging_steps=50,
        report_to="none",
        remove_unused_columns=False,
        ignore_data_skip=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=False,
    )
    with arguments.main_process_first(local=False, desc="corpus"):
        _record(config, out)
        series = build_corpus(out / "corpus", config.corpus, progress=progress)
    batch_size = config.batch_size * arguments.world_size
    done = int(resume.rsplit("-", 1)[1]) if resume else 0
    model = new_teacher(config)
    trainer = InOrderTrainer(
        model=model,
        args=arguments,
        train_dataset=PretrainingWindows(
            series,
            config.mix,
            size=config.steps * batch_size,
            batch_size=batch_size,
            seed=config.seed,
            first=done * batch_size,
        ),
        data_collator=functools.partial(_loss_inputs, patch_size=config.teacher.patch_size),
        callbacks=[TensorBoardCallback(SummaryWriter(str(out / "logs"))), *(callbacks or [])],
    )
    trainer.train(resume_from_checkpoint=resume)
    cast_parameters(model, torch.bfloat16)
    if trainer.is_world_process_zero():
        model.save_pretrained(out)
    return model


def _record(config: PretrainConfig, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    record, partial = out / "pretrain.json", out / "pretrain.json.partial"
    wanted = json.loads(json.dumps(asdict(config)))
    if record.exists() and json.loads(record.read_text()) != wanted:
        raise InputError(f"{out} holds a pretraining run of another configuration; choose another folder")
    partial.write_text(json.dumps(wanted, indent=2))
    partial.replace(record)
