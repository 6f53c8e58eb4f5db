"""How a student is trained, and what that is to ``transformers.Trainer``."""

from dataclasses import field
from typing import Any, Literal

import torch
from pydantic import Field
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from chronomoe.models.configuration import Seed, configuration
from chronomoe.training.losses import LossConfig

CPU = torch.device("cpu")


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
    """Forward and backward passes of the student in bf16 autocast, for processors and GPUs with units for it; weights,
    residual stream, routers, losses and optimiser stay in float32, and so does validation."""
    checkpoint_steps: int = Field(200, ge=1)
    """Steps between two points that an interrupted training continues from."""
    seed: Seed = 0
    """Of the order of the windows."""

    def arguments(self, folder: str, *, device: torch.device, saves: bool, validates: bool) -> TrainingArguments:
        """Return the same as arguments of ``transformers.Trainer``.

        Args:
            folder: for checkpoints.
            device: where the model is, and stays.
            saves: whether there are any.
            validates: whether the validation loss is taken, after every fifth of the steps.
        """
        return training_arguments(
            folder,
            device=device,
            max_steps=self.steps,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            lr_scheduler_type="cosine" if self.schedule == "cosine" else "constant_with_warmup",
            warmup_steps=round(self.warmup_share * self.steps),
            weight_decay=self.weight_decay,
            seed=self.seed,
            save_strategy="steps" if saves else "no",
            save_steps=self.checkpoint_steps,
            logging_steps=max(1, self.steps // 40),
            eval_strategy="steps" if validates else "no",
            eval_steps=max(1, self.steps // 5),
        )


def training_arguments(folder: str, *, device: torch.device = CPU, **changes: Any) -> TrainingArguments:
    """Return the arguments that all our trainers share, with changes; nothing is reported to the outside.

    Args:
        folder: for checkpoints.
        device: where the model is, and stays.
        **changes: of ``TrainingArguments``.
    """
    settings: dict[str, Any] = {
        "output_dir": folder,
        "report_to": "none",
        "remove_unused_columns": False,
        "label_names": ["future_target"],
        "prediction_loss_only": True,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda",
        "ddp_find_unused_parameters": True,  # univariate batches leave group attention's q and k unused
        "optim": "adamw_torch_fused",
        "adam_beta2": 0.98,
        "max_grad_norm": 1.0,
        "save_total_limit": 1,
        "disable_tqdm": True,
    }
    return on_device(TrainingArguments(**(settings | changes)), device)


def on_device(arguments: TrainingArguments, device: torch.device) -> TrainingArguments:
    """Let a trainer use this one device, where ``transformers`` takes the first of its kind, or all in turns.

    Of several processes each already has its own.
    """
    if arguments.parallel_mode == ParallelMode.DISTRIBUTED:
        return arguments
    if device.type == "cuda":
        torch.cuda.set_device(device)  # accelerate's "cuda" is the current one
    arguments.__dict__["_setup_devices"] = device  # what ``arguments.device`` found out
    arguments._n_gpu = int(device.type != "cpu")
    return arguments
