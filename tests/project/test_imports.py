import ast
from pathlib import Path

import pytest

import chronomoe

ROOT = Path(chronomoe.__file__).parent
LAYERS = [
    {"cli", "__main__", "integrations"},
    {"run", "plan", "inputs", "trained", "recipe", "predict", "serving", "pretraining"},
    {"stages"},
    {"report", "evaluation"},
    {"pipeline", "checkpoints", "export"},
    {"training"},
    {"data"},
    {"models"},
    {"errors"},
]
"""Folders, and modules beside them, from the top down."""
MODULES = sorted(ROOT.rglob("*.py"))
MOST_LINES = 400


def imports(source):
    """Name what a source imports of this package: ``"models.router"``, or ``""`` for the package itself."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which layer they reach"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "chronomoe" else set()
            names |= {node.module} if node.module != "chronomoe" else set()
    return {name.removeprefix("chronomoe").removeprefix(".") for name in names if name.split(".")[0] == "chronomoe"}


def layer(name):
    part = name.split(".")[0]
    for depth, parts in enumerate(LAYERS):
        if part in parts:
            return depth
    return layer("pipeline")  # the package itself and its public names


def climbing(name, source):
    """List the imports of module ``name`` that reach up; within a layer any order is fine."""
    return sorted(imported for imported in imports(source) if layer(imported) < layer(name))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    if name == "__init__":
        return  # gathers the public names of every layer
    assert climbing(name, path.read_text()) == []


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("models.router", "from chronomoe.data.frames import Series", ["data.frames"]),
        ("models.router", "from chronomoe.errors import InputError\nimport torch", []),
        ("data.windows", "def f():\n    import chronomoe.training.losses", ["training.losses"]),
        ("data.windows", "from chronomoe import pipeline, errors", ["pipeline"]),
        ("errors", "import chronomoe", [""]),
        ("evaluation.tasks", "import chronomoe", []),
        ("training.trainer", "from chronomoe import DistilledMoE", ["DistilledMoE"]),
        ("cli", "from chronomoe import __version__\nfrom chronomoe.run import run", []),
        ("evaluation.tasks", "from chronomoe.pipeline import ChronoMoEPipeline", []),
    ],
)
def test_an_import_that_goes_up_is_found(name, source, found):
    assert climbing(name, source) == found


def test_every_module_has_a_layer():
    parts = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in MODULES}
    assert parts - {"__init__", "assets"} <= set().union(*LAYERS)


def test_no_module_is_longer_than_the_limit():
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: lines for name, lines in long.items() if lines > MOST_LINES} == {}


def test_models_touch_no_files_clocks_or_loggers():
    forbidden = {"os", "io", "time", "datetime", "logging", "random", "subprocess", "tempfile", "shutil"}
    for path in (ROOT / "models").rglob("*.py"):
        tree = ast.walk(ast.parse(path.read_text()))
        names = {alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names}
        assert names & forbidden == set(), path.name
