"""What a teacher for unfamiliar series is worth: the mixtures of finished runs with one, on series nobody has seen."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from chronomoe.evaluation.baselines import average_scores
from chronomoe.evaluation.comparison import AVERAGE_SINGLE, MIXTURE, Scores
from chronomoe.evaluation.metrics import bootstrap_relative
from chronomoe.evaluation.routing import task_routing
from chronomoe.evaluation.tasks import Task, forecast, score
from chronomoe.pipeline import load_model
from chronomoe.training.familiarity import TEACHER, add_teacher
from chronomoe.training.routing import ExpertForecasts

GENERALIST = "generalist-full"
DRAWS = 1000


class Tested(NamedTuple):
    """A mixture with a teacher, at one limit of what is familiar."""

    claims: dict[str, list[float]]
    """Its error over that of each rival on unseen series, with the ends of an interval."""
    unseen: float
    """Share of unseen windows that the teacher forecasts."""
    familiar: float
    """Share of the test windows of familiar domains that it forecasts."""
    at_home: list[float]
    """Error over that of the mixture without a teacher on familiar domains, with an interval."""


def with_teacher(
    folder: Path, teacher: Any, unseen: Mapping[str, Task], home: Mapping[str, Task], *, familiar: Sequence[float]
) -> dict[str, Tested]:
    """Give the mixture of a finished run a teacher, and test it at each limit.

    Args:
        folder: of the run.
        teacher: joins the mixture.
        unseen: test windows of domains that the run knows nothing of.
        home: test windows of its own domains.
        familiar: shares of validation windows that count as familiar.
    """
    students = folder / "stages" / "students"
    plain = load_model(folder / "moe")
    levels = list(plain.chronos_config.quantiles)

    def scores(model: Any, tasks: Mapping[str, Task]) -> Scores:
        return {name: score(task, forecast(model, task), levels=levels) for name, task in tasks.items()}

    rivals = {MIXTURE: scores(plain, unseen), TEACHER: scores(teacher, unseen)}
    if (students / GENERALIST).exists():
        rivals[GENERALIST] = scores(load_model(students / GENERALIST / "model"), unseen)
    singles = [scores(load_model(one / "model"), unseen) for one in sorted(students.glob("single-*"))]
    if singles:
        rivals[AVERAGE_SINGLE] = {name: average_scores([one[name] for one in singles]) for name in unseen}
    usual = scores(plain, home)
    cached = folder / "stages" / "expert-forecasts"
    train, validation = (ExpertForecasts(**torch.load(cached / f"{part}.pt")) for part in ("train", "validation"))
    found = {}
    for share in familiar:
        guarded = load_model(folder / "moe")
        add_teacher(guarded, teacher, train, validation, familiar=share)
        own = scores(guarded, unseen)
        found[str(share)] = Tested(
            claims={name: list(bootstrap_relative(own, of, "WQL", draws=DRAWS, seed=0)) for name, of in rivals.items()},
            unseen=_diverted(guarded, unseen),
            familiar=_diverted(guarded, home),
            at_home=list(bootstrap_relative(scores(guarded, home), usual, "WQL", draws=DRAWS, seed=0)),
        )
    return found


def _diverted(mixture: Any, tasks: Mapping[str, Task]) -> float:
    """Return the share of windows that the teacher forecasts, tasks counting alike."""
    shares = [
        (task_routing(mixture, task).expert[:, 0] == len(mixture.experts)).float().mean() for task in tasks.values()
    ]
    return float(torch.stack(shares).mean())
