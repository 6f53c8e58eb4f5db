"""The API pages show every public name; what they show says what it is; examples in docstrings give what they show."""

import dataclasses
import doctest
import importlib
import inspect
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import chronomoe

PAGES = Path(__file__).parents[2] / "docs" / "api"
SHOWN = sorted({name for page in PAGES.glob("*.md") for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)})
FIRST = (
    "ChronoMoEPipeline",
    "ChronoMoEPipeline.routing",
    "InputError",
    "MoEEnhancedChronos2",
    "create_student_model",
    "Chronos2DistillationTrainer",
    "build_mixture",
    "fit_router",
    "data.domains.load_domain",
    "upcycle",
)
"""The names that a user calls first: each has an example."""


def found(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def undocumented(thing, path):
    """List what is public of a class or function and says nothing of itself."""
    missing = [] if inspect.getdoc(thing) else [path]
    if not inspect.isclass(thing):
        return missing
    source = inspect.getsource(thing)
    if dataclasses.is_dataclass(thing):
        fields = [field.name for field in dataclasses.fields(thing)]
        missing += [f"{path}.{name}" for name in fields if not re.search(rf'^    {name}: .*\n    """\S', source, re.M)]
    own = [(name, value) for name, value in vars(thing).items() if inspect.isfunction(value) and name[0] != "_"]
    return missing + [f"{path}.{name}" for name, value in own if not inspect.getdoc(getattr(thing, name))]


def test_every_public_name_is_on_a_page():
    shown = {name.rpartition(".")[2] for name in SHOWN}
    assert set(chronomoe.__all__) - shown == {"__version__"}


@pytest.mark.parametrize("path", SHOWN)
def test_what_a_page_shows_exists_and_says_what_it_is(path):
    assert undocumented(found(path), path) == []


@pytest.mark.parametrize("path", FIRST)
def test_an_example_gives_what_it_shows(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    thing = chronomoe
    for name in path.split("."):
        thing = getattr(thing, name)
    public = {name: getattr(chronomoe, name) for name in chronomoe.__all__} | {thing.__name__: thing}
    (example,) = doctest.DocTestFinder(recurse=False).find(
        thing, path, globs=public | {"np": np, "pd": pd}, module=False
    )
    assert example.examples
    doctest.DebugRunner(optionflags=doctest.ELLIPSIS).run(example)
