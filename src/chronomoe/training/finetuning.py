"""Fine-tuning our models on series of one's own, as ``Chronos2Pipeline.fit`` does it for a dense one."""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from chronos.chronos2.dataset import Chronos2Dataset, DatasetMode
from chronos.chronos2.trainer import Chronos2Trainer, EvaluateAndSaveFinalStepCallback
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from transformers.training_args import TrainingArguments

from chronomoe.errors import InputError, extra
from chronomoe.models.balancing import AUX_WEIGHT, LossFreeBias
from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.models.sparse.upcycling import SparseChronos2Model
from chronomoe.training.arguments import on_device

if TYPE_CHECKING:
    from peft import LoraConfig  # type: ignore[import-not-found,import-untyped]

LOG_STEPS = 100
LORA_DEFAULTS: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 16,
    "target_modules": [*(f"self_attention.{name}" for name in "qkvo"), "output_patch_embedding.output_layer"],
}
"""Upstream's."""


class MoETrainer(Chronos2Trainer):  # type: ignore[misc]
    """Adds the model's auxiliary loss in training; validation is on the forecast alone."""

    aux_weight: float

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        """Return the loss, with the output when asked for."""
        output = model(**inputs)
        loss: Tensor = output.loss + self.aux_weight * output.aux_loss if model.training else output.loss
        return (loss, output) if return_outputs else loss


def finetune(
    model: DistilledMoE | SparseChronos2Model,
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
) -> nn.Module:
    """Fine-tune a float32 copy of the model; the arguments are those of ``ChronoMoEPipeline.fit``.

    With "lora", return it as a ``peft.PeftModel``, whose adapters are not merged.

    Raises:
        InputError: LoRA is asked for without ``peft``, set up without being asked for, or for
            weights that it does not reach.
    """
    if finetune_mode == "full" and lora_config is not None:
        raise InputError("lora_config needs finetune_mode='lora', got 'full'")
    tuned: Any = extend(copy.deepcopy(model).float(), context_length, prediction_length)
    if finetune_mode == "lora":
        tuned = _with_adapters(tuned, lora_config)

    dataset = partial(
        Chronos2Dataset,
        context_length=context_length,
        prediction_length=prediction_length,
        batch_size=batch_size,
        output_patch_size=model.chronos_config.output_patch_size,
    )
    on_cpu = model.device.type == "cpu"
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
    if disable_data_parallel:  # nn.DataParallel is slower than one GPU here
        arguments = on_device(arguments, model.device)
    validation = None if validation_inputs is None else dataset(validation_inputs, mode=DatasetMode.VALIDATION)
    trainer = MoETrainer(
        model=tuned,
        args=arguments,
        train_dataset=dataset(inputs, min_past=min_past, mode=DatasetMode.TRAIN),
        eval_dataset=validation,
        callbacks=watchers,
    )
    trainer.aux_weight = getattr(model, "aux_weight", AUX_WEIGHT)
    if remove_printer_callback:
        trainer.pop_callback(PrinterCallback)
    with _still_biases(tuned) if finetune_mode == "lora" else nullcontext():
        trainer.train()
    finished: nn.Module = tuned.eval()
    return finished


def extend(model: PreTrainedModel, context_length: int, horizon: int) -> PreTrainedModel:
    """Let a model, or all experts of a mixture, read and forecast at least this many steps in one pass, in place."""
    members: Sequence[PreTrainedModel] = model.experts if isinstance(model, DistilledMoE) else [model]
    for member in members:
        limits = member.chronos_config
        limits.context_length = max(limits.context_length, context_length)
        limits.max_output_patches = max(limits.max_output_patches, math.ceil(horizon / limits.output_patch_size))
        member.config.chronos_config = asdict(limits)
    if isinstance(model, DistilledMoE):
        for expert, core in zip(members, model.config.experts, strict=True):
            core["chronos_config"] = asdict(expert.chronos_config)
        model.chronos_config = members[0].chronos_config
        model.config.chronos_config = asdict(model.chronos_config)
    return model


@contextmanager
def _still_biases(model: nn.Module) -> Iterator[None]:
    """Keep loss-free biases where they are: adapters are saved without buffers, so that a moved one would be lost."""
    biases = [module for module in model.modules() if isinstance(module, LossFreeBias)]
    rates = [bias.rate for bias in biases]
    for bias in biases:
        bias.rate = 0.0
    yield
    for bias, rate in zip(biases, rates, strict=True):
        bias.rate = rate


def _with_adapters(model: PreTrainedModel, config: "LoraConfig | dict[str, Any] | None") -> nn.Module:
    with extra("lora"):
        from peft import LoraConfig, get_peft_model

    settings: Any = config if isinstance(config, LoraConfig) else LoraConfig(**config or LORA_DEFAULTS)
    if getattr(settings, "target_parameters", None):
        raise InputError(
            f"LoRA reaches linear layers alone, got target_parameters={settings.target_parameters}; experts and "
            "routers of MoE layers are single tensors; name linear layers in target_modules, or use 'full'"
        )
    if isinstance(model, DistilledMoE) and settings.modules_to_save is None:
        settings = copy.copy(settings)
        settings.modules_to_save = ["router"]
    adapted: nn.Module = get_peft_model(model, settings)
    return adapted
