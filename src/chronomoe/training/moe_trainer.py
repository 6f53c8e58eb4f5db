"""The distillation trainer for networks with MoE layers (routes 2 and 3), as student, teacher or both."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chronomoe.data.soft_targets import SoftTargets
from chronomoe.data.windows import Batch
from chronomoe.errors import InputError
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.models.sparse.upcycling import Chronos2MoEOutput
from chronomoe.training.losses import LossConfig, LossParts, distillation_loss
from chronomoe.training.trainer import Chronos2DistillationTrainer


@dataclass
class TaughtOutput(Chronos2MoEOutput):
    """A student's forecast with that of the teacher that learns beside it."""

    teacher: Any = None
    """The teacher's output; None in evaluation."""


class TeacherAndStudent(nn.Module):
    """A teacher and its student as one network, so that one optimiser and all processes train both.

    Args:
        teacher: runs in training only.
        student: what the network forecasts with.
    """

    def __init__(self, teacher: ExactChronos2Model, student: ExactChronos2Model) -> None:
        super().__init__()
        self.teacher, self.student = teacher, student

    @property
    def chronos_config(self) -> Any:
        """The student's."""
        return self.student.chronos_config

    @property
    def instance_norm(self) -> Any:
        """The student's."""
        return self.student.instance_norm

    def forward(
        self,
        context: Tensor,
        group_ids: Tensor | None = None,
        future_covariates: Tensor | None = None,
        num_output_patches: int = 1,
        **options: Any,
    ) -> TaughtOutput:
        """Forecast with the student and, in training, with the teacher too."""
        inputs = {
            "context": context,
            "group_ids": group_ids,
            "future_covariates": future_covariates,
            "num_output_patches": num_output_patches,
        }
        own = self.student(**inputs, **options)
        return TaughtOutput(**own, teacher=self.teacher(**inputs) if self.training else None)


class LayerUse(NamedTuple):
    """How the student's MoE layers were used in a step."""

    aux_loss: Float[Tensor, ""]
    entropy: Float[Tensor, " layer"]
    load: Float[Tensor, "layer expert"]


class Chronos2MoEDistillationTrainer(Chronos2DistillationTrainer):
    """Distil any teacher, dense or MoE, into any student, dense or MoE.

    The loss is the distillation loss plus ``aux_weight`` times the auxiliary loss of the student's MoE layers. A
    ``teacher`` that is given learns beside the student: its own hard loss and ``aux_weight`` times its own auxiliary
    loss are added, and the student's soft targets are what it says of the same batch, dropout and all, without a
    gradient (Zhang et al., 2018, https://arxiv.org/abs/1706.00384, let both learn from each other instead).

    In several processes each takes the auxiliary losses of its own batch, as it does the forecast's; loss-free biases
    move by the mean of what each process would do, so that all agree, and what is logged is the mean as well.

    Args:
        model: the student.
        soft_targets: a live teacher or a store, whose teacher stays as it is; None where ``teacher`` learns, or for
            the hard loss alone.
        loss: weights and kinds of the losses.
        aux_weight: of the auxiliary losses.
        teacher: one that learns, in place.
        **trainer: what ``Chronos2DistillationTrainer`` takes.

    Raises:
        InputError: ``aux_weight`` is negative, there are two teachers, or the teacher forecasts other quantile levels.
    """

    def __init__(
        self,
        *,
        model: ExactChronos2Model,
        soft_targets: SoftTargets | None,
        loss: LossConfig,
        aux_weight: float = 0.01,
        teacher: ExactChronos2Model | None = None,
        **trainer: Any,
    ) -> None:
        if not aux_weight >= 0:
            raise InputError(f"aux_weight must not be negative, got {aux_weight}")
        if teacher is not None:
            if soft_targets is not None:
                raise InputError(
                    "a teacher that learns gives the soft targets itself; pass teacher or soft_targets, not both"
                )
            check_levels(teacher, model)
        learns = model if teacher is None else TeacherAndStudent(teacher, model)
        super().__init__(model=learns, soft_targets=soft_targets, loss=loss, **trainer)
        self.aux_weight = aux_weight
        self._uses: list[LayerUse] = []

    def teacher_forecast(self, inputs: Batch, output: Any) -> Tensor | None:
        """Return the soft targets of a batch: those of the teacher that learns beside, where there is one."""
        beside = getattr(output, "teacher", None)
        if beside is None:
            return super().teacher_forecast(inputs, output)
        forecast: Tensor = beside.normalized_preds.detach()
        return forecast[..., : inputs["future_target"].shape[1]]

    def auxiliary_loss(self, output: Any, target: Tensor) -> Tensor:
        """Return the weighted auxiliary losses, and the hard loss of a teacher that learns beside."""
        total = self.aux_weight * _auxiliary(output, target)
        beside = getattr(output, "teacher", None)
        if beside is not None:
            levels = torch.tensor(self.model.chronos_config.quantiles, device=target.device)
            own = distillation_loss(
                beside.normalized_preds, teacher=None, target=target, levels=levels, config=self.loss
            )
            auxiliary = _auxiliary(beside, target)
            total = total + own.hard + self.aux_weight * auxiliary
            self._parts["teacher_hard"].append(own.hard.item())
            self._parts["teacher_aux"].append(auxiliary.item())
        return total

    def note(self, parts: LossParts, output: Any) -> None:
        """Remember a step for the next report."""
        super().note(parts, output)
        layers = getattr(output, "moe", None)
        if layers:
            entropy = torch.stack([layer.entropy for layer in layers])
            load = torch.stack([layer.load for layer in layers])
            self._uses.append(LayerUse(*(part.detach().float() for part in (output.aux_loss, entropy, load))))

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Add the student's auxiliary loss, and router entropy and load by layer: means over steps and processes."""
        if "loss" in logs and self._uses:
            means = [torch.stack(column).mean(dim=0) for column in zip(*self._uses, strict=True)]
            aux_loss, entropy, load = self.accelerator.reduce(means, reduction="mean")
            logs |= {"aux_loss": aux_loss.item(), "entropy": entropy.tolist(), "load": load.tolist()}
            self._uses.clear()
        super().log(logs, *args, **kwargs)


def _auxiliary(output: Any, like: Tensor) -> Tensor:
    auxiliary: Tensor | None = getattr(output, "aux_loss", None)
    return like.new_zeros(()) if auxiliary is None else auxiliary


def check_levels(teacher: ExactChronos2Model, student: ExactChronos2Model) -> None:
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
