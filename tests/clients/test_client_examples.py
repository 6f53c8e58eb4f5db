import importlib.util
from pathlib import Path

import pytest

from chronomoe import InputError

FOLDER = Path(__file__).parents[2] / "examples" / "clients"
NEEDS = {
    "with_autogluon": "autogluon.timeseries",
    "with_darts": "darts",
    "with_fev": "fev",
    "with_gluonts": "gluonts",
    "with_nixtla": "pandas",
    "with_sktime": "sktime",
}
SHORT = {"with_autogluon": {"steps": 2}}
PRINTS = {
    "with_autogluon": "WeightedEnsemble",
    "with_darts": "forecasts of",
    "with_fev": "'horizon': 24",
    "with_gluonts": "MASE",
    "with_nixtla": "3 windows: mean absolute error",
    "with_sktime": "0.9",
}


def test_every_example_is_run_and_short():
    found = list(FOLDER.glob("*.py"))
    assert {path.stem for path in found} == set(NEEDS)
    assert all(len(path.read_text().splitlines()) < 40 for path in found)


@pytest.mark.parametrize("name", NEEDS)
def test_the_example_prints_what_it_promises(name, capsys, tmp_path, monkeypatch):
    pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed; run make clients")
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(**SHORT.get(name, {}))
    assert PRINTS[name] in capsys.readouterr().out


@pytest.mark.parametrize("name", ["autogluon", "darts", "fev", "gluonts", "sktime"])
def test_a_client_that_is_not_installed_is_named_with_its_extra(name):
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(InputError, match=rf"this needs {name}, .* pip install 'chronomoe\[{name}\]'"):
        importlib.import_module(f"chronomoe.integrations.{name}")
