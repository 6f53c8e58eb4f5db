"""What a model was distilled from, as its configuration and its checkpoint say it."""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, field

from transformers import PreTrainedModel
from transformers.configuration_utils import PretrainedConfig

from chronomoe.errors import InputError
from chronomoe.models.configuration import configuration, parse


@configuration
class Provenance:
    """Fingerprints of a teacher's weights and of data."""

    teacher: str | None = None
    """Whose soft targets were learned; None for none, or one that nothing is known of."""
    data: dict[str, str] = field(default_factory=dict)
    """Those of the series that were learned from, by name of the domain."""


def provenance(config: PretrainedConfig) -> Provenance:
    """Return what a model's configuration says of what it was distilled from; all empty where it says nothing."""
    return parse(getattr(config, "provenance", None) or {}, Provenance, source="the provenance of a model")


def teachers(model: PreTrainedModel) -> set[str]:
    """Return the teachers that are known of a model, or of the experts of a mixture."""
    known = (provenance(part.config).teacher for part in (model, *getattr(model, "experts", ())))
    return {teacher for teacher in known if teacher}


def learned(model: PreTrainedModel, *, teacher: str | None, data: dict[str, str]) -> None:
    """Note in a model's configuration what it learned from, beside what it had learned from before."""
    before = provenance(model.config)
    model.config.provenance = asdict(Provenance(teacher=teacher or before.teacher, data=before.data | data))


def check_teacher(model: PreTrainedModel, teacher: str | None) -> None:
    """Refuse soft targets of another teacher than a model was distilled from so far.

    Raises:
        InputError: the teachers are known and differ.
    """
    others = teachers(model) - {teacher}
    if teacher and others:
        raise InputError(
            f"the student was distilled from teacher {', '.join(sorted(others))}, these soft targets are of {teacher}; "
            "use its own teacher, cut a new student, or set config.provenance to None, also that of each expert of a "
            "mixture, if the change is meant"
        )


def warn_of_mixed(experts: Mapping[str, PreTrainedModel]) -> None:
    """Warn of experts that are known to come from several teachers: their forecasts are averaged all the same."""
    of = {name: "".join(teachers(model)) for name, model in experts.items() if teachers(model)}
    if len(set(of.values())) > 1:
        listed = ", ".join(f"{name} from {teacher}" for name, teacher in of.items())
        warnings.warn(
            f"the experts were distilled from several teachers: {listed}; if that is not meant, distil them from one",
            stacklevel=3,
        )
