import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_by_a_test_of_this_file():
    tested = {"distil_a_student", "mix_students", "add_a_router"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


def test_the_distillation_example_writes_a_student_and_forecasts(tmp_path, capsys):
    load("distil_a_student").main(tmp_path / "student", steps=3)
    assert (tmp_path / "student" / "model.safetensors").is_file()
    assert "median of the next hour" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "words"), [("mix_students", "experts:"), ("add_a_router", "parameters in the router")]
)
def test_the_example_prints_what_it_promises(name, words, capsys):
    load(name).main()
    assert words in capsys.readouterr().out
