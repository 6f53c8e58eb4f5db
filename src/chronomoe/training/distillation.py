"""Distilling one student."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chronomoe.data.soft_targets import SoftTargets
from chronomoe.data.windows import Window
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.training.arguments import DistilConfig
from chronomoe.training.trainer import Chronos2DistillationTrainer, last_checkpoint

Progress = Callable[[int, int], None]
Curve = dict[str, list[Any]]
MOE_CURVES = ("aux_loss", "entropy", "load", "teacher_hard_loss", "teacher_aux_loss")
"""In the curve where there are MoE layers: of each step a number, or ``entropy`` of each layer's router and ``load`` of
each layer's experts."""


class _Reporter(TrainerCallback):
    """Passes steps on to a progress function, and keeps no checkpoint of the last one.

    From there the framework would take one step too many.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Report one more step."""
        control.should_save &= state.global_step < state.max_steps
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
    trainer = Chronos2DistillationTrainer(
        student_model=student,
        args=config,
        output_dir=folder,
        train_dataset=windows,
        eval_dataset=validation,
        soft_targets=soft_targets,
        callbacks=[_Reporter(progress)],
        **options,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
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
