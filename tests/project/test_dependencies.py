"""What the package imports is what it declares: a fresh environment must be able to run it."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import chronomoe
from chronomoe.errors import InputError, extra

ROOT = Path(__file__).parents[2]
SOURCE = Path(chronomoe.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = (
    "autogluon",
    "baselines",
    "darts",
    "fev",
    "gluonts",
    "lora",
    "onnx",
    "openvino",
    "pretrain",
    "ray",
    "s3",
    "serve",
    "sktime",
)
"""Extras whose packages ``src`` imports; the others are data, or for developers."""
INSIDE = {"torch.utils.tensorboard": "tensorboard"}
"""Modules that import a package which is not theirs."""
DISTRIBUTIONS = {"autogluon": ["autogluon.timeseries"]} | packages_distributions()
CLIENTS = {"autogluon", "darts", "gluonts", "sktime"}
"""Extras that need an environment of their own: see ``make clients``."""


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements):
    return {normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


CORE = names(PROJECT["dependencies"])
OPTIONAL = {name: names(PROJECT["optional-dependencies"][name]) for name in EXTRAS}


def distributions(module):
    """Name the distributions that can bring a module; none for the standard library and this package."""
    top = module.split(".")[0]
    if top in sys.stdlib_module_names or top == "chronomoe":
        return set()
    top = INSIDE.get(module, top)
    return {normal(found) for found in DISTRIBUTIONS.get(top, [top])}


ROOMS = {"export": "onnx", "serving": "serve"}
"""Folders that only what stands in a ``with extra(...)`` block imports."""


def imported(source, room=None):
    """List what a source imports, each with the extra whose ``with extra(...)`` block it stands in."""
    found = []

    def visit(node, within):
        if isinstance(node, ast.Import):
            found.extend((alias.name, within) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module, within))
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        elif isinstance(node, ast.With) and ast.unparse(node.items[0]).startswith("extra("):
            within = node.items[0].context_expr.args[0].value
        for child in ast.iter_child_nodes(node):
            visit(child, within)

    visit(ast.parse(source), ROOMS.get(room))
    return found


IMPORTS = [
    (str(path.relative_to(SOURCE)), module, within)
    for path in sorted(SOURCE.rglob("*.py"))
    for module, within in imported(path.read_text(), path.relative_to(SOURCE).parts[0])
    if distributions(module)
]


def test_every_import_is_declared_where_it_is_needed():
    undeclared = [
        (path, module, within)
        for path, module, within in IMPORTS
        if not distributions(module) & (CORE | OPTIONAL.get(within, set()))
    ]
    assert not undeclared, "declare it in pyproject.toml, in an extra if it stands in `with extra(name):`"


def test_nothing_is_declared_that_is_not_imported():
    used = set().union(*(distributions(module) for _, module, _ in IMPORTS))
    declared = CORE.union(*OPTIONAL.values())
    for_us = {
        "boto3",
        "onnxscript",
        "httptools",
        "uvloop",
    }  # upstream reads S3, torch exports, uvicorn serves with these
    assert declared - used - for_us == set()


def test_a_missing_extra_is_refused_with_the_command_that_installs_it():
    advice = r"needs nowhere, which is not installed; run: pip install 'chronomoe\[lora\]'"
    with pytest.raises(InputError, match=advice), extra("lora"):
        import nowhere  # noqa: F401


def test_developers_get_every_extra():
    assert {f"chronomoe[{name}]" for name in {*EXTRAS, "corpus"} - CLIENTS} <= {
        f"chronomoe[{name}]"
        for requirement in PROJECT["optional-dependencies"]["dev"]
        if requirement.startswith("chronomoe[")
        for name in requirement.removeprefix("chronomoe[").removesuffix("]").split(",")
    }
