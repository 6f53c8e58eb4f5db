import dataclasses

import pytest
from pydantic import Field

from chronomoe.errors import InputError
from chronomoe.models.configuration import configuration, parse


@configuration
class Inner:
    count: int = Field(2, ge=1)
    share: float = Field(0.5, gt=0, le=1)
    most: int | None = Field(None, ge=1)

    def __post_init__(self):
        if self.most is not None and self.most < self.count:
            raise InputError(f"most must be at least count, got {self.most} and {self.count}")


@configuration
class Outer:
    inner: Inner = dataclasses.field(default_factory=Inner)
    parts: tuple[Inner, ...] = ()
    size: str | Inner = "small"


def test_values_and_defaults_are_kept():
    assert Inner(count=3) == Inner(count=3, share=0.5, most=None)
    assert dataclasses.replace(Inner(), count=4).count == 4


def test_a_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Inner().count = 3


def test_a_plain_dictionary_becomes_nested_configurations():
    found = parse({"inner": {"count": 3}, "parts": [{"share": 0.1}], "size": {"count": 5}}, Outer, source="x")
    assert found == Outer(inner=Inner(count=3), parts=(Inner(share=0.1),), size=Inner(count=5))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"share": 0.0}, "share must be above 0, got 0.0"),
        ({"share": 1.5}, "share must be at most 1, got 1.5"),
        ({"most": 1}, "most must be at least count, got 1 and 2"),
        ({"cuont": 1}, "unknown key 'cuont' at the top. Available: count, share, most. Did you mean 'count'?"),
        ({"count": "many"}, "count must be a valid integer, unable to parse string as an integer, got 'many'"),
    ],
)
def test_a_broken_rule_is_said_with_the_value_and_what_is_accepted(values, said):
    with pytest.raises(InputError) as refused:
        Inner(**values)
    assert str(refused.value) == said


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"inner": {"count": 0}}, "x.yaml: inner.count must be at least 1, got 0"),
        ({"parts": [{}, {"share": 2}]}, "x.yaml: parts[1].share must be at most 1, got 2"),
        ({"size": {"count": 0}}, "x.yaml: size.count must be at least 1, got 0"),
        ({"size": {"cnt": 1}}, "unknown key 'cnt' in size. Available: count, share, most. Did you mean 'count'?"),
        ({"prts": []}, "unknown key 'prts' at the top. Available: inner, parts, size. Did you mean 'parts'?"),
        ({"inner": {"count": 3, "most": 2}}, "x.yaml: inner: most must be at least count, got 2 and 3"),
    ],
)
def test_a_complaint_names_the_place(values, said):
    with pytest.raises(InputError) as refused:
        parse(values, Outer, source="x.yaml")
    assert said in str(refused.value)
