"""The trainer of a teacher: ready batches in their order, averaged weights in validation."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer, TrainingArguments

from chronomoe.data.domains import load_domain
from chronomoe.data.windows import Batch, EvaluationWindows, WindowConfig, collate, model_inputs
from chronomoe.pretraining.config import PretrainConfig
from chronomoe.training.arguments import on_device
from chronomoe.training.averaging import averaged_weights


class ValidationBatches(Dataset[Batch]):
    """Windows of one domain, as ready batches."""

    def __init__(self, spec: str, config: PretrainConfig, *, windows: int = 64, rows: int = 32) -> None:
        domain = load_domain(spec)
        self.name, self.rows, self.patch_size = domain.name, rows, config.teacher.patch_size
        length = min(512, config.mix.context_length)
        shape = WindowConfig(
            context_length=length, horizon=min(96, config.mix.horizon), min_context_length=min(64, length)
        )
        self._windows = EvaluationWindows(domain, shape, part="validation", limit=windows)

    def __len__(self) -> int:
        return -(-len(self._windows) // self.rows)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        places = range(index * self.rows, min(len(self._windows), (index + 1) * self.rows))
        batch = collate([self._windows[place] for place in places], patch_size=self.patch_size)
        return {**model_inputs(batch), "future_target": batch["future_target"]}


class PretrainingTrainer(Trainer):
    """A ``Trainer`` of ready batches, taken in their order; its weights are validated as averages."""

    rows_seen = 0
    tokens_seen = 0
    since = 0.0

    def _get_train_sampler(self, train_dataset: object = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)

    def training_step(self, model: torch.nn.Module, inputs: Batch, *rest: Any, **options: Any) -> Tensor:
        """Count the windows, then train on them."""
        self.since = self.since or time.perf_counter()
        self.rows_seen += len(inputs["context"])
        patch = self.accelerator.unwrap_model(model).chronos_config.input_patch_size
        self.tokens_seen += len(inputs["context"]) * (
            -(-inputs["context"].shape[1] // patch) + 1 + inputs["num_output_patches"]
        )
        loss: Tensor = super().training_step(model, inputs, *rest, **options)
        return loss

    def log(self, logs: dict[str, float], *rest: Any, **options: Any) -> None:
        """Add the windows and tokens per second since the last report, over all processes."""
        if "loss" in logs and self.since:
            seconds = (time.perf_counter() - self.since) / self.args.world_size
            logs |= {
                "windows_per_second": round(self.rows_seen / seconds, 1),
                "tokens_per_second": round(self.tokens_seen / seconds),
            }
            self.rows_seen, self.tokens_seen, self.since = 0, 0, time.perf_counter()
        super().log(logs, *rest, **options)

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Validate the averaged weights; the time it takes is not counted as training."""
        begun = time.perf_counter()
        with averaged_weights(self.optimizer):
            metrics: dict[str, float] = super().evaluate(*arguments, **options)
        if self.since:
            self.since += time.perf_counter() - begun
        return metrics


def training_arguments(config: PretrainConfig, folder: Path, device: torch.device) -> TrainingArguments:
    """Translate the configuration for ``transformers``; checkpoints go to ``folder``."""
    watch = config.validation is None or len(config.validation) > 0
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=1,  # an item is a batch
        per_device_eval_batch_size=1,
        learning_rate=config.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={
            "num_decay_steps": config.decay,
            "decay_type": "1-sqrt",
            "min_lr_ratio": 0.01,
        },
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=1.0,
        bf16=config.bf16,
        seed=config.seed,
        save_steps=config.save_steps,
        save_total_limit=2,
        logging_steps=50,
        eval_strategy="steps" if watch else "no",
        eval_steps=config.validation_steps if watch else None,
        prediction_loss_only=True,
        label_names=["future_target"],
        report_to="none",
        remove_unused_columns=False,
        ignore_data_skip=True,
        ddp_find_unused_parameters=True,  # univariate batches leave group attention's q and k unused
        use_cpu=device.type == "cpu",
        dataloader_num_workers=config.workers,
        dataloader_prefetch_factor=4 if config.workers else None,
        dataloader_pin_memory=device.type == "cuda",
        disable_tqdm=False,
    )
    return on_device(arguments, device)
