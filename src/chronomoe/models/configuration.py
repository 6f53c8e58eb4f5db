"""Configurations: frozen pydantic dataclasses whose complaints are ``InputError``.

    @configuration
    class StudentConfig:
        num_layers: int = Field(2, ge=1)

Ranges stand in the fields, unknown keys are refused, and a rule over several fields is a ``__post_init__`` that raises
``InputError``.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from chronomoe.errors import InputError, nearest

T = TypeVar("T")
STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
"""What every generator takes."""


def _each_once(values: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(values)) < len(values):
        raise InputError(f"each block must be named once, got {values}")
    return values


Blocks = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), AfterValidator(_each_once)]
"""Encoder blocks, numbered from 0, each once."""


@dataclass_transform(frozen_default=True, kw_only_default=True)  # no specifiers: mypy misses positional defaults
def configuration(kind: type[T]) -> type[T]:
    """Make a class a frozen, keyword-only dataclass that checks its values and refuses unknown keys.

    Raises:
        InputError: when an instance is made whose values break a rule.
    """
    made = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)(kind)
    checked = made.__init__

    def __init__(self: Any, **values: Any) -> None:
        try:
            checked(self, **values)
        except ValidationError as error:
            raise refusal(error, made) from None

    made.__init__ = __init__  # type: ignore[method-assign,assignment]
    return made  # type: ignore[return-value]


def parse(values: Mapping[str, Any], kind: type[T], *, source: str) -> T:
    """Turn plain values, as JSON and YAML hold them, into a configuration.

    Raises:
        InputError: a key is unknown or a value is not accepted; the message begins with ``source``.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise InputError(f"{source}: {refusal(error, kind)}") from None


def refusal(error: ValidationError, kind: Any) -> InputError:
    """Say pydantic's first complaint in our words: the place, the rule, the value received, what is accepted."""
    complaint = max(error.errors(), key=_weight)
    if complaint["type"] in UNKNOWN:
        *inside, key = complaint["loc"]
        place, known = _follow(inside, kind)
        where = f"in {place}" if place else "at the top"
        return InputError(f"unknown key {key!r} {where}. Available: {', '.join(known)}.{nearest(str(key), known)}")
    return InputError(_in_words(complaint, _follow(complaint["loc"], kind)[0]))


def _weight(complaint: Any) -> tuple[int, bool]:
    """Rank complaints: of a union, those of the member that fits best; a misspelt key before the key that it lacks."""
    return len(complaint["loc"]), complaint["type"] in UNKNOWN


UNKNOWN = ("unexpected_keyword_argument", "invalid_key")
RULES = {
    "greater_than_equal": "must be at least {ge:.12g}",
    "greater_than": "must be above {gt:.12g}",
    "less_than_equal": "must be at most {le:.12g}",
    "less_than": "must be below {lt:.12g}",
    "multiple_of": "must be a multiple of {multiple_of:.12g}",
    "literal_error": "must be {expected}",
    "too_short": "must name at least {min_length}",
}
"""Pydantic's types of complaints, and what we say."""


def _in_words(complaint: Any, place: str) -> str:
    context = complaint.get("ctx", {})
    if isinstance(context.get("error"), InputError):
        return f"{place}: {context['error']}" if place else str(context["error"])
    if complaint["type"] == "missing":
        return f"{place} is required"
    rule = RULES.get(complaint["type"])
    said = complaint["msg"].replace("Input should be", "must be", 1)
    text = rule.format(**context) if rule else said[0].lower() + said[1:]
    return f"{place} {text}, got {complaint['input']!r}"


def _follow(steps: Sequence[int | str], kind: Any) -> tuple[str, list[str]]:
    """Return where a complaint lies, less the names of a union's members, and the keys that are known there."""
    place, known = "", _keys(kind)
    for step in steps:
        options = typing.get_args(kind) if _is_union(kind) else (kind,)
        kind = next((option for option in options if dataclasses.is_dataclass(option)), options[0])
        if isinstance(step, int):
            place, kind = f"{place}[{step}]", (typing.get_args(kind) or (Any,))[0]
        elif step in _keys(kind):
            place, kind = f"{place}.{step}".lstrip("."), typing.get_type_hints(kind)[step]
        known = _keys(kind) or known
    return place, known


def _is_union(kind: Any) -> bool:
    return isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union


def _keys(kind: Any) -> list[str]:
    options = typing.get_args(kind) if _is_union(kind) else (kind,)
    found = next((option for option in options if dataclasses.is_dataclass(option)), None)
    return [] if found is None else [field.name for field in dataclasses.fields(found)]
