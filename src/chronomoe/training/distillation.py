"""Distilling one student."""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from chronomoe.data.soft_targets import SoftTargets
from chronomoe.data.windows import Window, collate
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.models.configuration import Seed, configuration
from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.training.averaging import AveragedAdamW, use_averaged_weights
from chronomoe.training.losses import LossConfig
from chronomoe.training.trainer import Chronos2DistillationTrainer, last_checkpoint, training_arguments

Progress = Callable[[int, int], None]
Curve = dict[str, list[Any]]
MOE_CURVES = ("aux_loss", "entropy", "load", "teacher_hard_loss", "teacher_aux_loss")
"""In the curve where there are MoE layers: of each step a number, or ``entropy`` of each layer's router and ``load`` of
each layer's experts."""


@configuration
class DistilConfig:
    """How one student is trained."""

    steps: int = Field(1000, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(64, ge=1)
    """Windows of a step, on each process."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak, at the end of a linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How the learning rate goes on after the warm-up: to zero, or as it is, for a student that others branch from."""
    warmup_share: float = Field(0.05, ge=0, le=1)
    """Share of the steps spent warming up."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Of a running average of the weights, which is what is validated and kept; 0 for the weights themselves. At a
    cosine schedule it changed nothing, see LOG.md."""
    loss: LossConfig = field(default_factory=LossConfig)
    """What the student is trained on."""
    bf16: bool = False
    """bf16 autocast: for GPUs and processors with bf16 instructions."""
    checkpoint_steps: int = Field(200, ge=1)
    """Steps between two points that an interrupted training continues from."""
    seed: Seed = 0
    """Of the order of the windows."""


class _Reporter(TrainerCallback):
    """Passes steps on to a progress function."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Report one more step."""
        self.progress(state.global_step, state.max_steps)


def distil(
    student: ExactChronos2Model | DistilledMoE,
    windows: Dataset[Window],
    soft_targets: SoftTargets | None,
    config: DistilConfig,
    folder: Path,
    *,
    validation: Dataset[Window] | None = None,
    progress: Progress = lambda done, total: None,
    **options: Any,
) -> Curve:
    """Train a student in place, on the device where it is, and return its training curve.

    ``folder`` keeps resumable checkpoints: called again after a kill with the same arguments, training continues at
    the last one and ends with the same weights as if it had never stopped. Works in several processes under
    ``accelerate launch`` or ``torchrun``; each then takes its own share of the windows.

    Args:
        student: a fresh one; its weights are changed.
        windows: training windows.
        soft_targets: live teacher or store; None trains on what happened alone.
        config: steps, rates, losses.
        folder: for checkpoints.
        validation: windows whose loss is taken after every fifth of the steps.
        progress: called with steps done and in all.
        **options: of ``Chronos2DistillationTrainer``: teachers, weight of auxiliary losses, learning rates.
    """
    arguments = training_arguments(
        str(folder),
        device=student.device,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine" if config.schedule == "cosine" else "constant_with_warmup",
        warmup_steps=round(config.warmup_share * config.steps),
        weight_decay=config.weight_decay,
        bf16=config.bf16,
        seed=config.seed,
        save_steps=config.checkpoint_steps,
        logging_steps=max(1, config.steps // 40),
        eval_strategy="no" if validation is None else "steps",
        eval_steps=max(1, config.steps // 5),
    )
    patch_size = student.chronos_config.output_patch_size
    if config.ema_decay:
        rates = {"lr": config.learning_rate, "betas": (arguments.adam_beta1, arguments.adam_beta2), "fused": True}
        options["optimizer_cls_and_kwargs"] = (AveragedAdamW, rates | {"average_decay": config.ema_decay})
    trainer = Chronos2DistillationTrainer(
        model=student,
        args=arguments,
        train_dataset=windows,
        eval_dataset=validation,
        data_collator=functools.partial(collate, patch_size=patch_size),
        soft_targets=soft_targets,
        loss=config.loss,
        callbacks=[_Reporter(progress)],
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    use_averaged_weights(trainer.optimizer)
    trainer.model.eval()
    return training_curve(trainer.state.log_history)


def training_curve(history: Sequence[dict[str, Any]]) -> Curve:
    """Pick steps and losses out of a trainer's log, and what MoE layers add to them."""
    trained = [entry for entry in history if "loss" in entry]
    judged = [entry for entry in history if "eval_loss" in entry]
    return {
        "step": [entry["step"] for entry in trained],
        "loss": [entry["loss"] for entry in trained],
        "soft_loss": [entry.get("soft_loss", 0.0) for entry in trained],
        "hard_loss": [entry.get("hard_loss", 0.0) for entry in trained],
        "eval_step": [entry["step"] for entry in judged],
        "eval_loss": [entry["eval_loss"] for entry in judged],
        **{name: [entry[name] for entry in trained] for name in MOE_CURVES if trained and name in trained[0]},
    }


def save_curve(curve: Curve, path: Path) -> None:
    """Write a training curve as JSON."""
    path.write_text(json.dumps(curve))
