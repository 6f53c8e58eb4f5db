"""The distillation trainer: a ``transformers.Trainer`` with one overridden method."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.training_args import ParallelMode

from chronomoe.data.soft_targets import SoftTargets
from chronomoe.data.windows import Batch, model_inputs
from chronomoe.models.balancing import LossFreeBias
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.models.student import kept_layers
from chronomoe.training.losses import LossConfig, LossParts, distillation_loss, hidden_loss

CPU = torch.device("cpu")


class Chronos2DistillationTrainer(Trainer):
    """Train a student on soft targets (the teacher's quantiles) and hard ones (what happened).

    Any model that is called as a ``Chronos2Model`` and returns ``normalized_preds`` can be the student, a mixture too.
    In evaluation the loss is the hard one, so that it compares students of different teachers and weights.

    Args:
        soft_targets: a live teacher or a store; None trains on the hard loss alone.
        loss: weights and kinds of the losses.
        hidden_teacher: the teacher whose hidden states are followed where ``loss.hidden_weight`` is not 0.
        expert_learning_rate: trains a mixture's experts beside its router, whose rate is the trainer's.
        **trainer: what ``transformers.Trainer`` takes.
    """

    def __init__(
        self,
        *,
        soft_targets: SoftTargets | None,
        loss: LossConfig,
        hidden_teacher: ExactChronos2Model | None = None,
        expert_learning_rate: float | None = None,
        **trainer: Any,
    ) -> None:
        super().__init__(**trainer)
        self.soft_targets, self.loss, self.expert_learning_rate = soft_targets, loss, expert_learning_rate
        self.hidden_teacher = None if hidden_teacher is None else hidden_teacher.eval()
        self._parts: dict[str, list[float]] = defaultdict(list)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Return the distillation loss of a batch that ``collate`` made, plus the auxiliary loss of a mixture."""
        follow = model.training and self.loss.hidden_weight > 0
        output = model(**model_inputs(inputs), **({"output_hidden_states": True} if follow else {}))
        plain = self.accelerator.unwrap_model(model)
        target, _ = plain.instance_norm(inputs["future_target"], output.loc_scale)
        parts = distillation_loss(
            output.normalized_preds,
            teacher=self.teacher_forecast(inputs, output) if model.training else None,
            target=target,
            levels=torch.tensor(plain.chronos_config.quantiles, device=target.device),
            config=self.loss,
        )
        total = parts.total
        if follow:
            total = total + self.loss.hidden_weight * self._hidden_loss(output.hidden_states, inputs)
        if model.training:
            total = total + self.auxiliary_loss(output, target)
            self.note(parts, output)
        return (total, {"loss": total}) if return_outputs else total

    def teacher_forecast(self, inputs: Batch, output: Any) -> Tensor | None:
        """Return the soft targets of a batch, or None; ``output`` is what the model made of it."""
        return None if self.soft_targets is None else self.soft_targets(inputs)

    def auxiliary_loss(self, output: Any, target: Tensor) -> Tensor:
        """Return what is added to the distillation loss in training: a mixture's own, already weighted."""
        auxiliary: Tensor | None = getattr(output, "aux_loss", None)
        return target.new_zeros(()) if auxiliary is None else auxiliary

    def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Take a step; then processes average the biases that each has moved by the load of its own windows."""
        loss: Tensor = super().training_step(model, *args, **kwargs)
        if self.accelerator.num_processes > 1:
            for module in model.modules():
                if isinstance(module, LossFreeBias) and module.rate:
                    module.bias.copy_(self.accelerator.reduce(module.bias, reduction="mean"))
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the framework's optimizer, or one with a rate of their own for the experts of a mixture."""
        optimizer: torch.optim.Optimizer | None = self.optimizer  # type: ignore[has-type]
        if self.expert_learning_rate is None or optimizer is not None:
            made: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
            return made
        decays = set(self.get_decay_parameter_names(self.model))  # neither biases nor norms
        router = {f"router.{name}" for name, _ in self.model.router.named_parameters()}
        kind, options = Trainer.get_optimizer_cls_and_kwargs(self.args, self.model)
        groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = defaultdict(list)
        for name, parameter in self.model.named_parameters():
            groups[name in router, name in decays].append(parameter)
        rates = {True: self.args.learning_rate, False: self.expert_learning_rate}
        split: torch.optim.Optimizer = kind(
            [
                {"params": group, "lr": rates[routes], "weight_decay": self.args.weight_decay if decayed else 0.0}
                for (routes, decayed), group in groups.items()
            ],
            **options,
        )
        self.optimizer = split
        return split

    def _hidden_loss(self, states: tuple[Tensor, ...], inputs: Batch) -> Tensor:
        assert self.hidden_teacher is not None  # checked by the caller that made this trainer
        self.hidden_teacher.to(inputs["context"].device)
        with torch.no_grad():
            teacher = self.hidden_teacher(**model_inputs(inputs), output_hidden_states=True).hidden_states
        observed = self._observed_tokens(inputs["context"], states[0].shape[1])
        return hidden_loss(states, teacher, kept_layers(len(teacher), len(states)), observed=observed)

    def _observed_tokens(self, context: Tensor, tokens: int) -> Tensor:
        """Return which tokens stand for any value: patches of the context that have one, and all that follow them."""
        size = self.accelerator.unwrap_model(self.model).chronos_config.input_patch_size
        seen = torch.nn.functional.pad(context.isfinite(), (-context.shape[1] % size, 0))
        patches = seen.unflatten(1, (-1, size)).any(dim=-1)
        patches = patches[:, max(0, patches.shape[1] - tokens) :]
        return torch.nn.functional.pad(patches, (0, tokens - patches.shape[1]), value=True)

    def note(self, parts: LossParts, output: Any) -> None:
        """Remember a step for the next report."""
        self._parts["soft"].append(parts.soft.item())
        self._parts["hard"].append(parts.hard.item())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means of the soft and hard loss since the last report."""
        if "loss" in logs:
            logs |= {f"{name}_loss": sum(values) / len(values) for name, values in self._parts.items() if values}
            self._parts.clear()
        super().log(logs, *args, **kwargs)


def last_checkpoint(folder: Path) -> str | None:
    """Return the latest checkpoint of a trainer that was written to its end; None where there is none.

    The trainer's state is what is written last, so a folder without it was left by a kill.
    """
    states = folder.glob("checkpoint-*/trainer_state.json")
    complete = [state.parent for state in states if state.read_text().endswith("}\n")]
    latest = max(complete, key=lambda checkpoint: int(checkpoint.name.rsplit("-", 1)[1]), default=None)
    return None if latest is None else str(latest)


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
