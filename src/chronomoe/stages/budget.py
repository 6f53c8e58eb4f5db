"""What training costs, and how a route's budget is divided: every route gets the operations of the mixture's."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from chronomoe.data.windows import WindowConfig
from chronomoe.errors import InputError
from chronomoe.evaluation.cost import count_flops
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.models.sparse.config import MoEConfig
from chronomoe.models.sparse.insertion import MoEEnhancedChronos2, MoEInsertionConfig
from chronomoe.models.sparse.upcycling import upcycle
from chronomoe.models.student import StudentConfig, create_student_model
from chronomoe.training.growing import ExpansionConfig, candidate_places


def late_gain(curve: Mapping[str, Sequence[float | int]]) -> float:
    """Return how far the log of the validation loss fell in the second half of a training, at least 0."""
    steps, losses = curve["eval_step"], curve["eval_loss"]
    middle = next(index for index, step in enumerate(steps) if 2 * step >= steps[-1])
    return max(0.0, math.log(losses[middle] / losses[-1])) if losses[-1] > 0 else 0.0


def allocate(steps: int, gains: Mapping[str, float], *, trust: float = 0.5, floor: float = 0.001) -> dict[str, int]:
    """Divide steps in proportion to the square root of what the last ones gained, at least one each.

    A loss of the form ``a + b / steps`` gains in proportion to ``b`` between half of its steps and all of them, and the
    sum of such losses is least where steps go by the square root of ``b``.

    Args:
        steps: in all.
        gains: from ``late_gain``.
        trust: in a gain measured on a few windows, from 0 to 1; the rest goes to the mean gain.
        floor: added to each: a gain of 0 on a few windows is not sure to be none.
    """
    mean = sum(gains.values()) / len(gains)
    weights = {name: math.sqrt(trust * gain + (1 - trust) * mean + floor) for name, gain in gains.items()}
    total = sum(weights.values())
    return {name: max(1, round(steps * weight / total)) for name, weight in weights.items()}


class Division(NamedTuple):
    """Steps of each part of a route's training, and the share of the budget they take together."""

    steps: dict[str, int]
    training: float


class Budget:
    """The operations that all training of a route may take, counted in forward passes of one window."""

    def __init__(
        self,
        teacher: ExactChronos2Model,
        windows: WindowConfig,
        *,
        size: StudentConfig,
        steps: int,
        most_experts: int,
        dynamic: bool = False,
    ) -> None:
        """Count them.

        Args:
            teacher: students are cut from it.
            windows: their shape.
            size: of an expert.
            steps: the mixture's, in all.
            most_experts: of a series.
            dynamic: whether most series use one, so that an expert's size is that of equal active compute.
        """
        self.teacher, self.windows, self.size, self.steps = teacher, windows, size, steps
        self.dynamic = dynamic
        layers = (size.num_layers or teacher.config.num_layers) * most_experts
        fits = most_experts > 1 and layers <= teacher.config.num_layers
        self.wide = replace(size, num_layers=layers) if fits else None
        """The size with the compute of a mixture whose series all use ``most_experts``; None where it is too deep."""
        self.operations = steps * self.cost_of_size(size)

    @property
    def active_size(self) -> StudentConfig:
        """The size of the mixture's active compute: an expert's, or the wide one where K is fixed and there is one."""
        return self.size if self.dynamic else self.wide or self.size

    def cost_of_size(self, size: StudentConfig) -> float:
        """Return the operations of one forward pass of a student."""
        return self.cost(create_student_model(self.teacher, size))

    def cost(self, model: ExactChronos2Model) -> float:
        """Return the operations of one forward pass of a model."""
        context = torch.zeros(1, self.windows.context_length)
        return float(count_flops(model.eval(), context, horizon=self.windows.horizon))

    def steps_of(self, size: StudentConfig) -> int:
        """Return how many steps of a student of another size the budget pays for."""
        return max(1, round(self.operations / self.cost_of_size(size)))

    def divide(self, shares: Mapping[str, float], costs: Mapping[str, float]) -> Division:
        """Turn shares of the budget into steps.

        Raises:
            InputError: a part gets none.
        """
        steps = {part: round(share * self.operations / costs[part]) for part, share in shares.items()}
        for part, count in steps.items():
            if count < 1:
                raise InputError(f"the budget of {self.steps} steps leaves none for the {part}; raise it")
        return Division(steps, sum(count * costs[part] for part, count in steps.items()) / self.operations)

    def upcycling(
        self, layers: MoEConfig, teacher_layers: MoEConfig, *, dense_share: float, teacher_share: float
    ) -> Division:
        """Divide the budget between the teacher, the dense student and the one with MoE layers.

        Raises:
            InputError: widths do not divide, a block is not there, or a part gets less than one step.
        """
        dense = create_student_model(self.teacher, self.active_size)
        costs = {"teacher": 0.0, "dense": self.cost(dense), "student": self.cost(upcycle(dense, layers))}
        shares = {"teacher": teacher_share, "dense": dense_share}
        if teacher_share:
            costs["teacher"] = self.cost(upcycle(self.teacher, teacher_layers))
        shares["student"] = 1 - sum(shares.values())
        return self.divide({part: share for part, share in shares.items() if share > 0}, costs)

    def expanding(self, layers: MoEConfig, *, base_share: float, max_layers: int, probe_steps: int) -> Division:
        """Divide the budget between the base and each layer, whose probes count.

        Raises:
            InputError: widths do not divide, a block is not there, or a part gets less than one step.
        """
        base = create_student_model(self.teacher, self.active_size)
        places = len(candidate_places(base, ExpansionConfig(layer=layers)))
        blocks = (tuple(range(places)) * max_layers)[:max_layers]
        grown = MoEEnhancedChronos2(base, MoEInsertionConfig(after=blocks, layer=layers))
        costs = {"base": self.cost(base), "layer": max_layers * self.cost(grown)}
        found = self.divide({"base": base_share, "layer": 1 - base_share}, costs)
        probes = places * probe_steps if places > 1 else 0
        if found.steps["layer"] <= probes:
            raise InputError(
                f"expanding leaves {found.steps['layer']} steps for each layer, of which {probes} go to probes of "
                f"{places} places; lower base_share, probe_steps or max_layers, or raise the budget"
            )
        return found._replace(steps=found.steps | {"layer": found.steps["layer"] - probes})
