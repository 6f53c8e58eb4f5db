"""Fine-tuning a mixture on series of one's own, as ``Chronos2Pipeline.fit`` does it for one model."""

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from chronos.chronos2.dataset import Chronos2Dataset, DatasetMode
from chronos.chronos2.trainer import Chronos2Trainer, EvaluateAndSaveFinalStepCallback
from torch import Tensor, nn
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from transformers.training_args import TrainingArguments
from transformers.utils.import_utils import is_peft_available

from chronomoe.errors import InputError
from chronomoe.models.distilled_moe import DistilledMoE

if TYPE_CHECKING:
    from peft import LoraConfig  # type: ignore[import-not-found,import-untyped]

LOG_STEPS = 100
LORA_TARGETS = [*(f"self_attention.{name}" for name in "qkvo"), "output_patch_embedding.output_layer"]


class MixtureTrainer(Chronos2Trainer):  # type: ignore[misc]
    """Adds the mixture's auxiliary loss in training; validation is on the forecast alone."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        """Return the loss, with the output when asked for."""
        output = model(**inputs)
        loss: Tensor = output.loss + output.aux_loss if model.training else output.loss
        return (loss, output) if return_outputs else loss


def finetune_mixture(
    mixture: DistilledMoE,
    *,
    inputs: Any,
    prediction_length: int,
    validation_inputs: Any,
    finetune_mode: str,
    lora_config: "LoraConfig | dict[str, Any] | None",
    context_length: int,
    learning_rate: float,
    num_steps: int,
    batch_size: int,
    output_dir: Path,
    min_past: int,
    callbacks: Sequence[TrainerCallback] | None,
    remove_printer_callback: bool,
    disable_data_parallel: bool,
    trainer_options: dict[str, Any],
) -> DistilledMoE:
    """Fine-tune a float32 copy of the mixture; the arguments are those of ``ChronoMoEPipeline.fit``.

    Raises:
        InputError: the mode is unknown, LoRA is asked for without ``peft``, or set up without being asked for.
    """
    if finetune_mode not in ("full", "lora"):
        raise InputError(f"finetune_mode must be 'full' or 'lora', got {finetune_mode!r}")
    if finetune_mode == "full" and lora_config is not None:
        raise InputError("lora_config needs finetune_mode='lora', got 'full'")
    model: Any = extend(copy.deepcopy(mixture).float(), context_length=context_length, horizon=prediction_length)
    if finetune_mode == "lora":
        model = _with_adapters(model, lora_config)

    dataset = partial(
        Chronos2Dataset,
        context_length=context_length,
        prediction_length=prediction_length,
        batch_size=batch_size,
        output_patch_size=mixture.chronos_config.output_patch_size,
    )
    on_cpu = mixture.device.type == "cpu"
    options: dict[str, Any] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "learning_rate": learning_rate,
        "max_steps": num_steps,
        "logging_steps": LOG_STEPS,
        "report_to": "none",
        "save_strategy": "no",
        "save_only_model": True,
        "save_total_limit": 1,
        "prediction_loss_only": True,
        "bf16": not on_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        "use_cpu": on_cpu,
    }
    watchers = list(callbacks or [])
    if validation_inputs is not None:
        watchers.append(EvaluateAndSaveFinalStepCallback())
        options |= {
            "save_strategy": "steps",
            "save_steps": LOG_STEPS,
            "eval_strategy": "steps",
            "eval_steps": LOG_STEPS,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "label_names": ["future_target"],
        }
    arguments = TrainingArguments(**(options | trainer_options))
    if disable_data_parallel and not on_cpu:
        arguments._n_gpu = 1  # as upstream does: nn.DataParallel is slower than one GPU here
    validation = None if validation_inputs is None else dataset(validation_inputs, mode=DatasetMode.VALIDATION)
    trainer = MixtureTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset(inputs, min_past=min_past, mode=DatasetMode.TRAIN),
        eval_dataset=validation,
        callbacks=watchers,
    )
    if remove_printer_callback:
        trainer.pop_callback(PrinterCallback)
    trainer.train()
    tuned: DistilledMoE = model.merge_and_unload() if finetune_mode == "lora" else model
    tuned.eval()
    return tuned


def extend(mixture: DistilledMoE, *, context_length: int, horizon: int) -> DistilledMoE:
    """Let a mixture read and forecast at least this many steps in one pass, in place."""
    for expert, core in zip(mixture.experts, mixture.config.experts, strict=True):
        limits = expert.chronos_config
        limits.context_length = max(limits.context_length, context_length)
        limits.max_output_patches = max(limits.max_output_patches, math.ceil(horizon / limits.output_patch_size))
        core["chronos_config"] = asdict(limits)
        expert.config.chronos_config = asdict(limits)
    mixture.chronos_config = mixture.experts[0].chronos_config
    mixture.config.chronos_config = asdict(mixture.chronos_config)
    return mixture


def _with_adapters(model: DistilledMoE, config: "LoraConfig | dict[str, Any] | None") -> nn.Module:
    if not is_peft_available():
        raise InputError("finetune_mode='lora' needs peft: pip install peft, or use finetune_mode='full'")
    from peft import LoraConfig, get_peft_model

    if config is None:
        config = LoraConfig(r=8, lora_alpha=16, target_modules=LORA_TARGETS, modules_to_save=["router"])
    elif isinstance(config, dict):
        config = LoraConfig(**config)
    adapted: nn.Module = get_peft_model(model, config)
    return adapted
