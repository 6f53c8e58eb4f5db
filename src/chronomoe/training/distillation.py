"""Distilling one student, and choosing experts among candidates."""

import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chronomoe.data.soft_targets import SoftTargets
from chronomoe.data.windows import Window, check_seed, collate
from chronomoe.errors import InputError
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.models.configuration import configuration
from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.models.sparse.upcycling import SparseChronos2Model
from chronomoe.training.losses import LossConfig
from chronomoe.training.moe_trainer import Chronos2MoEDistillationTrainer
from chronomoe.training.trainer import (
    Chronos2DistillationTrainer,
    last_checkpoint,
    training_arguments,
)

Progress = Callable[[int, int], None]
Curve = dict[str, list[Any]]
MOE_CURVES = ("aux_loss", "entropy", "load", "teacher_hard_loss", "teacher_aux_loss")
"""In the curve where there are MoE layers: of each step a number, or ``entropy`` of each layer's router and ``load`` of
each layer's experts."""


@configuration
class DistilConfig:
    """How one student is trained."""

    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 64
    """Windows of a step, on each process."""
    learning_rate: float = 1e-3
    """Peak, at the end of a linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How the learning rate goes on after the warm-up: to zero, or as it is, for a student that others branch from."""
    warmup_share: float = 0.05
    """Share of the steps spent warming up."""
    weight_decay: float = 0.01
    """AdamW's."""
    loss: LossConfig = field(default_factory=LossConfig)
    """What the student is trained on."""
    bf16: bool = False
    """bf16 autocast: for GPUs and processors with bf16 instructions."""
    checkpoint_steps: int = 200
    """Steps between two points that an interrupted training continues from."""
    seed: int = 0
    """Of the order of the windows."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise InputError(f"steps and batch_size must be at least 1, got {self.steps} and {self.batch_size}")
        if self.schedule not in ("cosine", "constant"):
            raise InputError(f"schedule must be 'cosine' or 'constant', got {self.schedule!r}")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"weight_decay must not be negative, got {self.weight_decay}")
        if not 0 <= self.warmup_share <= 1:
            raise InputError(f"warmup_share must be from 0 to 1, got {self.warmup_share}")
        if self.checkpoint_steps < 1:
            raise InputError(f"checkpoint_steps must be at least 1, got {self.checkpoint_steps}")
        check_seed(self.seed)


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
    hidden_teacher: ExactChronos2Model | None = None,
    expert_learning_rate: float | None = None,
    aux_weight: float = 0.01,
    teacher: ExactChronos2Model | None = None,
    progress: Progress = lambda done, total: None,
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
        validation: windows whose hard loss is taken after every fifth of the steps.
        hidden_teacher: for the hidden-state loss.
        expert_learning_rate: trains a mixture jointly, with this rate for everything but its router.
        aux_weight: of the auxiliary losses of MoE layers, in student and teacher; a mixture weighs its own.
        teacher: one that learns beside the student, in place, and gives the soft targets; see
            :class:`chronomoe.training.moe_trainer.Chronos2MoEDistillationTrainer`.
        progress: called with steps done and in all.
    """
    if config.loss.hidden_weight > 0 and hidden_teacher is None:
        raise InputError("hidden_weight needs the teacher itself: a soft-target store holds forecasts only")
    if config.loss.hidden_weight > 0 and hidden_teacher is not None:
        _check_same_width(student, hidden_teacher)
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
    kind: Callable[..., Chronos2DistillationTrainer] = Chronos2DistillationTrainer
    if expert_learning_rate is not None:
        kind = functools.partial(Chronos2DistillationTrainer, expert_learning_rate=expert_learning_rate)
    elif teacher is not None or isinstance(student, SparseChronos2Model):
        kind = functools.partial(Chronos2MoEDistillationTrainer, aux_weight=aux_weight, teacher=teacher)
    trainer = kind(
        model=student,
        args=arguments,
        train_dataset=windows,
        eval_dataset=validation,
        data_collator=functools.partial(collate, patch_size=patch_size),
        soft_targets=soft_targets,
        loss=config.loss,
        hidden_teacher=hidden_teacher,
        callbacks=[_Reporter(progress)],
    )
    _quiet(trainer)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    student.eval()
    if teacher is not None:
        teacher.eval()
    return training_curve(trainer.state.log_history)


def _check_same_width(student: ExactChronos2Model | DistilledMoE, teacher: ExactChronos2Model) -> None:
    if isinstance(student, DistilledMoE):
        raise InputError("hidden_weight must be 0 for a mixture: its experts' tokens follow no single teacher's")
    if student.config.d_model != teacher.config.d_model:
        raise InputError(
            f"hidden_weight needs a student of the teacher's d_model {teacher.config.d_model}, "
            f"got {student.config.d_model}; set it to 0 or keep d_model"
        )


def _quiet(trainer: Chronos2DistillationTrainer) -> None:
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)


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


def mixture_loss(
    loss_of: Callable[[tuple[int, ...]], NDArray[np.float64]],
    members: Sequence[int],
    domain: NDArray[np.int64],
    *,
    top_k: int,
) -> float:
    """Loss of the mixture that some experts could form if every domain were sent to its best ``top_k`` of them.

    Args:
        loss_of: per-window loss of the plain average of some experts' forecasts.
        members: the experts.
        domain: of each window.
        top_k: experts of a domain.
    """
    teams = [team for size in range(1, top_k + 1) for team in itertools.combinations(members, size)]
    losses = np.stack([loss_of(team) for team in teams])
    return float(np.mean([losses[:, domain == place].mean(axis=1).min() for place in np.unique(domain)]))


def select_experts(
    quantiles: torch.Tensor,
    target: torch.Tensor,
    levels: torch.Tensor,
    domain: NDArray[np.int64],
    *,
    count: int,
    top_k: int,
) -> list[int]:
    """Choose ``count`` candidates greedily, each time the one that lowers the validation loss of the mixture most.

    Args:
        quantiles: candidates' normalised forecasts of validation rows, ``(row, expert, quantile, horizon)``.
        target: normalised, ``(row, horizon)``; NaN does not count.
        levels: quantile levels.
        domain: of each row.
        count: experts to keep, as a rule 3 to 5.
        top_k: experts that the mixture will use for a series.

    Raises:
        InputError: ``count`` is not from 1 to the number of candidates.
    """
    from chronomoe.training.losses import quantile_loss

    candidates = quantiles.shape[1]
    if not 1 <= count <= candidates:
        raise InputError(f"the number of experts to keep must be from 1 to {candidates}, got {count}")

    @functools.cache
    def loss_of(team: tuple[int, ...]) -> NDArray[np.float64]:
        loss = quantile_loss(quantiles[:, list(team)].float().mean(dim=1), target, levels=levels)
        return loss.nanmean(dim=1).cpu().double().numpy()

    alone = [mixture_loss(loss_of, (index,), domain, top_k=1) for index in range(candidates)]  # decides ties
    chosen: list[int] = []
    while len(chosen) < count:
        rest = [index for index in range(candidates) if index not in chosen]
        losses = {index: mixture_loss(loss_of, tuple(sorted([*chosen, index])), domain, top_k=top_k) for index in rest}
        chosen.append(min(losses, key=lambda index: (losses[index], alone[index])))
    return chosen
