"""The distillation trainer: a ``transformers.Trainer`` of any student from any teacher."""

import functools
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from chronos.chronos2 import Chronos2Pipeline
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from chronomoe.data.fingerprint import fingerprints
from chronomoe.data.fit_inputs import training_windows, validation_windows, windows_for
from chronomoe.data.soft_targets import LiveTeacher, SoftTargets
from chronomoe.data.windows import Batch, collate, model_inputs
from chronomoe.errors import InputError
from chronomoe.models.balancing import AUX_WEIGHT, LossFreeBias
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.models.provenance import check_teacher, learned
from chronomoe.models.student import kept_layers
from chronomoe.models.unwrapping import exact_model_of
from chronomoe.training.arguments import DistilConfig
from chronomoe.training.averaging import AveragedAdamW, averaged_weights, use_averaged_weights
from chronomoe.training.losses import LossConfig, distillation_loss, hidden_loss
from chronomoe.training.validation import validation_loss

STEPS_OF_AN_EPOCH = 1000
"""Windows are drawn without end: what ``num_train_epochs`` counts, where ``max_steps`` is not given."""


class TeacherAndStudent(nn.Module):
    """A teacher and its student as one network, so that one optimiser and all processes train both."""

    def __init__(self, teacher: ExactChronos2Model, student: PreTrainedModel) -> None:
        super().__init__()
        self.teacher, self.student = teacher, student

    def forward(self, **inputs: Any) -> tuple[Any, Any]:
        """Return what the student and what the teacher make of a batch."""
        return self.student(**inputs), self.teacher(**inputs)


class Chronos2DistillationTrainer(Trainer):
    """Distil any teacher into any student, dense, with MoE layers, or a mixture.

    The loss is the distillation loss plus ``aux_weight`` times the student's auxiliary loss. A ``teacher`` that is
    given learns beside the student: its own hard loss and ``aux_weight`` times its own auxiliary loss are added, and
    the student's soft targets are what it says of the same batch, dropout and all, without a gradient (Zhang et al.,
    2018, https://arxiv.org/abs/1706.00384, let both learn from each other instead).

    Validation is ``chronomoe.training.validation.validation_loss`` of the student, which every process takes of all
    windows. In several processes each takes the auxiliary losses of its own batch, as it does the forecast's; loss-free
    biases move by the mean of what each process would do, and what is logged is the mean as well.

    ``train`` leaves the student in evaluation mode, with averaged weights where the optimiser keeps them, and notes in
    its configuration which teacher and data it learned from.

    Args:
        student_model: any model that is called as a ``Chronos2Model`` and returns ``normalized_preds``, or a pipeline.
        train_dataset: windows, or data of any form that ``chronomoe.data.fit_inputs.training_windows`` takes, a
            frame or what ``Chronos2Pipeline.fit`` takes among them.
        eval_dataset: likewise; its validation loss is taken.
        teacher_pipeline: gives the soft targets of every batch, and stays as it is; a pipeline or a model.
        soft_targets: a store of them, in place of the pipeline; with neither, what happened is all that is learned.
        prediction_length: horizon of the windows that are cut from data.
        context_length: their context; the model's where that is shorter.
        columns: ``target``, ``known_covariates`` and ``freq`` of frames and files.
        args: how the student is trained; a ``DistilConfig`` brings the losses along.
        output_dir: of checkpoints, where ``args`` is a ``DistilConfig``; none are kept when None.
        loss: weights and kinds of the losses.
        teacher: one that learns, in place.
        hidden_teacher: the teacher whose hidden states are followed where ``loss.hidden_weight`` is not 0;
            ``teacher_pipeline``'s when None.
        aux_weight: of auxiliary losses; by default a mixture's own, else ``AUX_WEIGHT``.
        learning_rates: of submodules by name, such as ``{"experts": 1e-5}``; the trainer's for all others.
        **trainer: what ``transformers.Trainer`` takes.

    Raises:
        InputError: ``aux_weight`` is negative, there are two teachers, the teacher forecasts other quantile levels or
            is not the one that the student has learned from, the student cannot follow hidden states, or the data
            break a rule.

    Examples:
        >>> teacher = ChronoMoEPipeline.from_pretrained("tiny")
        >>> student = create_student_model(teacher, "slim")
        >>> trainer = Chronos2DistillationTrainer(
        ...     student_model=student,
        ...     teacher_pipeline=teacher,
        ...     train_dataset="demo:traffic",
        ...     context_length=96,
        ...     args=DistilConfig(steps=1, batch_size=2),
        ... )
        >>> trainer.train().global_step
        1
    """

    def __init__(
        self,
        *,
        student_model: PreTrainedModel | Chronos2Pipeline,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        teacher_pipeline: Chronos2Pipeline | ExactChronos2Model | None = None,
        soft_targets: SoftTargets | None = None,
        prediction_length: int = 48,
        context_length: int = 512,
        columns: Mapping[str, Any] | None = None,
        args: TrainingArguments | DistilConfig | None = None,
        output_dir: str | Path | None = None,
        loss: LossConfig | None = None,
        teacher: ExactChronos2Model | None = None,
        hidden_teacher: ExactChronos2Model | None = None,
        aux_weight: float | None = None,
        learning_rates: Mapping[str, float] | None = None,
        **trainer: Any,
    ) -> None:
        config = DistilConfig() if args is None else args
        self.student = student = exact_model_of(student_model)
        self.bf16 = isinstance(config, DistilConfig) and config.bf16
        self.loss = loss or (config.loss if isinstance(config, DistilConfig) else LossConfig())
        self.aux_weight = getattr(student, "aux_weight", AUX_WEIGHT) if aux_weight is None else aux_weight
        if not self.aux_weight >= 0:
            raise InputError(f"aux_weight must be at least 0, got {self.aux_weight}")
        if sum(one is not None for one in (teacher, teacher_pipeline, soft_targets)) > 1:
            raise InputError("a student has one teacher; pass one of teacher, teacher_pipeline and soft_targets")
        if teacher_pipeline is not None:
            soft_targets = LiveTeacher(exact_model_of(teacher_pipeline))
            check_levels(soft_targets.teacher, student)
            hidden_teacher = hidden_teacher or soft_targets.teacher
        if teacher is not None:
            check_levels(teacher, student)
        if self.loss.hidden_weight:
            _check_hidden(student, hidden_teacher)
        self.soft_targets = soft_targets
        if isinstance(config, DistilConfig):
            folder = tempfile.gettempdir() if output_dir is None else str(output_dir)
            arguments = config.arguments(
                folder, device=student.device, saves=output_dir is not None, validates=eval_dataset is not None
            )
            if config.ema_decay:
                rates = {
                    "lr": config.learning_rate,
                    "betas": (arguments.adam_beta1, arguments.adam_beta2),
                    "fused": True,
                }
                trainer["optimizer_cls_and_kwargs"] = (AveragedAdamW, rates | {"average_decay": config.ema_decay})
        else:
            arguments = config
        windows = windows_for(student, prediction_length=prediction_length, context_length=context_length)
        given = dict(columns or {})
        if train_dataset is not None:
            size, seed = _draws(arguments), arguments.seed
            train_dataset = training_windows(train_dataset, windows, size=size, seed=seed, **given)
        if eval_dataset is not None:
            eval_dataset = validation_windows(eval_dataset, windows, **given)
        gather = functools.partial(collate, patch_size=student.chronos_config.output_patch_size)
        super().__init__(
            model=student if teacher is None else TeacherAndStudent(teacher, student),
            args=arguments,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **{"data_collator": gather} | trainer,
        )
        self.remove_callback(PrinterCallback)
        self.hidden_teacher = None if hidden_teacher is None else hidden_teacher.eval()
        self.learning_rates = dict(learning_rates or {})
        self._parts: dict[str, list[Tensor]] = defaultdict(list)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as ``transformers.Trainer.train`` does, whose arguments these are."""
        taught = getattr(self.soft_targets, "revision", None)
        check_teacher(self.student, taught)
        result = super().train(*args, **kwargs)
        use_averaged_weights(self.optimizer)
        self.model.eval()
        learned(self.student, teacher=taught, data=fingerprints(self.train_dataset))
        return result

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Return the loss of a batch that ``collate`` made."""
        follow = self.loss.hidden_weight > 0
        # Not the framework's autocast, which would stay around the student's forward, in validation and afterwards.
        with torch.autocast(self.student.device.type, torch.bfloat16, enabled=self.bf16):
            output = model(**model_inputs(inputs), **({"output_hidden_states": True} if follow else {}))
        output, taught = output if isinstance(output, tuple) else (output, None)
        target, _ = self.student.instance_norm(inputs["future_target"], output.loc_scale)
        levels = torch.tensor(self.student.chronos_config.quantiles, device=target.device)
        measure = functools.partial(distillation_loss, target=target, levels=levels, config=self.loss)
        if taught is not None:
            soft_target = taught.normalized_preds.detach().float()
        else:
            soft_target = None if self.soft_targets is None else self.soft_targets(inputs)
        parts = measure(output.normalized_preds.float(), teacher=soft_target)
        self._note(soft_loss=parts.soft, hard_loss=parts.hard)
        total = parts.total
        if follow:
            total = total + self.loss.hidden_weight * self._hidden_loss(output.hidden_states, inputs)
        auxiliary = _auxiliary(output, total)
        added = self.aux_weight * auxiliary
        if taught is not None:
            own = measure(taught.normalized_preds.float(), teacher=None)
            added = added + own.hard + self.aux_weight * _auxiliary(taught, total)
            self._note(teacher_hard_loss=own.hard, teacher_aux_loss=_auxiliary(taught, total))
        layers = getattr(output, "moe", None)
        if layers:
            entropy, load = ([getattr(layer, name) for layer in layers] for name in ("entropy", "load"))
            self._note(aux_loss=auxiliary, entropy=torch.stack(entropy), load=torch.stack(load))
        total = total + added
        return (total, output) if return_outputs else total

    def evaluation_loop(
        self, dataloader: DataLoader[Any], *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Take the student's validation loss, with averaged weights where the optimiser keeps them."""
        windows: Any = dataloader.dataset
        with averaged_weights(self.optimizer):
            loss = validation_loss(self.student, windows, batch_size=self.args.eval_batch_size)
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": loss}, len(windows))  # type: ignore[arg-type]

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Take a step; then processes average the biases that each has moved by the load of its own windows."""
        loss: Tensor = super().training_step(model, *args, **kwargs)
        if self.accelerator.num_processes > 1:
            for module in model.modules():
                if isinstance(module, LossFreeBias) and module.rate:
                    module.bias.copy_(self.accelerator.reduce(module.bias, reduction="mean"))
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the framework's optimiser, and move submodules with a rate of their own into groups of their own."""
        is_new = self.optimizer is None  # type: ignore[has-type]
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        for name, rate in self.learning_rates.items() if is_new else ():
            members = set(self.student.get_submodule(name).parameters())
            for group in list(optimizer.param_groups):
                own = [parameter for parameter in group["params"] if parameter in members]
                group["params"] = [parameter for parameter in group["params"] if parameter not in members]
                optimizer.add_param_group({**group, "params": own, "lr": rate})
        return optimizer

    def _hidden_loss(self, states: tuple[Tensor, ...], inputs: Batch) -> Tensor:
        assert self.hidden_teacher is not None  # checked when this trainer was made
        self.hidden_teacher.to(inputs["context"].device)
        with torch.no_grad():
            teacher = self.hidden_teacher(**model_inputs(inputs), output_hidden_states=True).hidden_states
        observed = self._observed_tokens(inputs["context"], states[0].shape[1])
        return hidden_loss(states, teacher, kept_layers(len(teacher), len(states)), observed=observed)

    def _observed_tokens(self, context: Tensor, tokens: int) -> Tensor:
        """Return which tokens stand for any value: patches of the context that have one, and all that follow them."""
        size = self.student.chronos_config.input_patch_size
        seen = nn.functional.pad(context.isfinite(), (-context.shape[1] % size, 0))
        patches = seen.unflatten(1, (-1, size)).any(dim=-1)
        patches = patches[:, max(0, patches.shape[1] - tokens) :]
        return nn.functional.pad(patches, (0, tokens - patches.shape[1]), value=True)

    def _note(self, **values: Tensor) -> None:
        """Remember parts of a step's loss for the next report."""
        for name, value in values.items():
            self._parts[name].append(value.detach().float())

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Add the parts of the loss, and router entropy and load by layer: means over steps and processes."""
        if "loss" in logs and self._parts:
            means = {name: torch.stack(values).mean(dim=0) for name, values in self._parts.items()}
            logs |= {name: mean.tolist() for name, mean in self.accelerator.reduce(means, reduction="mean").items()}
            self._parts.clear()
        super().log(logs, *args, **kwargs)


Chronos2MoEDistillationTrainer = Chronos2DistillationTrainer
"""One trainer serves networks with MoE layers, as student, teacher or both."""


def _draws(args: TrainingArguments) -> int:
    """Return how many windows a training sees, or an epoch where its steps are not said."""
    batch: int = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    return batch * (args.max_steps if args.max_steps > 0 else STEPS_OF_AN_EPOCH)


def _auxiliary(output: Any, like: Tensor) -> Tensor:
    auxiliary: Tensor | None = getattr(output, "aux_loss", None)
    return like.new_zeros(()) if auxiliary is None else auxiliary


def check_levels(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Refuse a teacher that forecasts other quantile levels than its student.

    Raises:
        InputError: the levels differ.
    """
    own, theirs = (list(model.chronos_config.quantiles) for model in (student, teacher))
    if own != theirs:
        raise InputError(
            f"teacher and student must forecast the same quantile levels, got {len(theirs)} and {len(own)}: "
            f"{theirs} and {own}; cut the student from this teacher"
        )


def _check_hidden(student: PreTrainedModel, teacher: ExactChronos2Model | None) -> None:
    if teacher is None:
        raise InputError("hidden_weight needs the teacher itself: a soft-target store holds forecasts only")
    if isinstance(student, DistilledMoE):
        raise InputError("hidden_weight must be 0 for a mixture: its experts' tokens follow no single teacher's")
    if student.config.d_model != teacher.config.d_model:
        raise InputError(
            f"hidden_weight needs a student of the teacher's d_model {teacher.config.d_model}, "
            f"got {student.config.d_model}; set it to 0 or keep d_model"
        )


def last_checkpoint(folder: Path) -> str | None:
    """Return the latest checkpoint of a trainer that was written to its end; None where there is none.

    The trainer's state is what is written last, so a folder without it was left by a kill.
    """
    states = folder.glob("checkpoint-*/trainer_state.json")
    complete = [state.parent for state in states if state.read_text().endswith("}\n")]
    latest = max(complete, key=lambda checkpoint: int(checkpoint.name.rsplit("-", 1)[1]), default=None)
    return None if latest is None else str(latest)
