import dataclasses
import types
import typing

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from chronomoe.pretraining.config import PretrainConfig
from chronomoe.recipe import RunConfig, dump, load_recipe

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.integers(), st.floats(), st.text(max_size=6), st.just("demo:web")
)
JUNK = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.text(max_size=5), SCALARS, max_size=2))


def members(kind):
    return typing.get_args(kind) if isinstance(kind, types.UnionType) or typing.get_origin(kind) else (kind,)


@st.composite
def values(draw, kind):
    """Draw some keys of a configuration, most of them known, with values that are seldom right."""
    inner = next((part for part in members(kind) if dataclasses.is_dataclass(part)), None)
    if inner is None or draw(st.integers(0, 5)) == 0:
        return draw(JUNK)
    hints = typing.get_type_hints(inner)
    keys = draw(st.lists(st.sampled_from([*hints, "", "stesp", 3]), max_size=4, unique=True))
    found = {key: draw(values(hints.get(key, int))) for key in keys}
    return [found] if typing.get_origin(kind) is tuple else found


@pytest.mark.parametrize("kind", [RunConfig, PretrainConfig])
@given(data=st.data())
def test_a_recipe_is_read_or_refused_and_what_is_read_can_be_written(refused_in_one_line, tmp_path, kind, data):
    drawn = data.draw(values(kind))
    if kind is RunConfig and isinstance(drawn, dict) and data.draw(st.booleans()):
        drawn |= {"domains": [{"data": "demo:web"}]}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(drawn))
    with refused_in_one_line():
        config = load_recipe(str(path), kind)
        path.write_text(dump(config))
        assert repr(load_recipe(str(path), kind)) == repr(config)


@given(text=st.text(max_size=60) | st.binary(max_size=60))
def test_any_text_is_refused_as_a_recipe(refused_in_one_line, tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with refused_in_one_line():
        load_recipe(str(path))
