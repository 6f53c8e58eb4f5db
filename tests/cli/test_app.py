import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pandas as pd
import pytest
import typer
import yaml
from chronos import Chronos2Pipeline
from chronos.chronos2 import Chronos2Model
from click.testing import CliRunner
from safetensors.torch import load_file

from chronomoe import ChronoMoEPipeline
from chronomoe.cli.app import app
from chronomoe.recipe import load_recipe

COMMANDS = typer.main.get_command(app)


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_help_names_every_command(chronomoe, words):
    status, out, err = chronomoe(*words)
    assert (status, err) == (0, "")
    assert set(COMMANDS.commands) >= {
        "run",
        "pretrain",
        "distil",
        "compose",
        "upcycle",
        "expand",
        "evaluate",
        "predict",
        "report",
    }
    for name in COMMANDS.commands:
        assert f" {name} " in out


@pytest.mark.parametrize("name", COMMANDS.commands)
def test_the_help_of_a_command_names_its_options(name):
    found = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(COMMANDS, [name, "--help"])
    assert found.exit_code == 0
    for parameter in COMMANDS.commands[name].params:
        shown = parameter.opts[0] if parameter.param_type_name == "option" else (parameter.name or "")
        assert shown.lower() in found.output.lower()
        assert parameter.help, parameter.name


def option_words(command):
    """Return every word that the command accepts as an option, with the number of words that follow it."""
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    return {word for option in options for word in option.opts}


@pytest.mark.parametrize("name", COMMANDS.commands)
def test_the_help_of_a_command_has_an_example_that_it_accepts(name):
    command = COMMANDS.commands[name]
    (example,) = re.findall(rf"Example: (chronomoe {name} .*)", command.help)
    _, _, *words = example.split()
    assert command.make_context(name, list(words), resilient_parsing=True).params
    assert {word for word in words if word.startswith("-")} <= option_words(command)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run"], "Missing argument 'recipe'; see chronomoe run --help"),
        (["run", "demo"], "Missing option '--out' / '-o'; see chronomoe run --help"),
        (["walk"], "No such command 'walk'; see chronomoe --help"),
        (["run", "demo", "--ot", "x"], "No such option: --ot"),
        (["predict", "tiny", "x.csv", "--horizon", "x", "-o", "y.csv"], "Invalid value for '--horizon'"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(chronomoe, words, message):
    status, out, err = chronomoe(*words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"chronomoe: {message}")


def test_an_interruption_is_one_line_and_status_130(chronomoe, monkeypatch, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("chronomoe.report.page.write_report", interrupt)
    assert chronomoe("report", tmp_path) == (130, "", "chronomoe: interrupted; finished work is kept\n")


def test_the_installed_command_refuses_in_one_line_too(tmp_path):
    code = "from chronomoe.cli.app import main; main()"
    command = [sys.executable, "-c", code, "run", "dmeo", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("chronomoe: Unknown recipe 'dmeo'. Available: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["--version"]])
def test_help_and_version_answer_without_torch(words):
    command = [sys.executable, "-X", "importtime", "-m", "chronomoe", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "chronos", "pandas"}


def test_the_version_is_the_packages(chronomoe):
    assert chronomoe("--version") == (0, f"chronomoe {version('chronomoe')}\n", "")


def test_importing_the_package_registers_our_architectures():
    code = "import chronomoe, chronos.chronos2; print(chronos.chronos2.DistilledMoE, chronomoe.upcycle)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout


def test_a_tilde_in_out_is_the_home_folder(chronomoe, teacher_folder, make_frame, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    make_frame(1, 60).to_csv(tmp_path / "past.csv", index=False)
    status, _, err = chronomoe("predict", teacher_folder, tmp_path / "past.csv", "--horizon", 2, "--out=~/f.csv")
    assert (status, err) == (0, "")
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["f.csv"]


def test_constant_series_are_forecast(chronomoe, teacher_folder, make_frame, tmp_path):
    make_frame(2, 60).assign(target=5.0).to_csv(tmp_path / "past.csv", index=False)
    out = tmp_path / "f.csv"
    status, printed, _ = chronomoe("predict", teacher_folder, tmp_path / "past.csv", "--horizon", 4, "-o", out)
    assert (status, printed) == (0, f"saved {out}: 8 rows\n")
    found = pd.read_csv(out)
    assert list(found.columns) == ["item_id", "timestamp", "target_name", "predictions", "0.1", "0.5", "0.9"]
    assert np.isfinite(found.predictions).all()


def test_series_too_short_are_skipped_with_a_count(chronomoe, teacher_folder, make_frame, tmp_path):
    short = make_frame(1, 20).assign(item_id="short")
    pd.concat([make_frame(2, 300), short]).to_csv(tmp_path / "data.csv", index=False)
    words = ["--horizon", 16, "--context-length", 64, "--limit", 2, "--out", tmp_path / "e.jsonl"]
    status, _, err = chronomoe("evaluate", teacher_folder, "--data", tmp_path / "data.csv", *words)
    assert status == 0
    assert "data: 1 series too short for a window, skipped" in err


def test_commands_train_and_score_from_memory_mapped_files(
    chronomoe, teacher_folder, series_files, tmp_path, monkeypatch
):
    monkeypatch.setenv("CHRONOMOE_CACHE", "")
    words = ["--data", series_files["sales"], "--horizon", 8, "--context-length", 64, "--limit", 2]
    out = tmp_path / "e.jsonl"
    assert chronomoe("--cache", tmp_path / "cache", "evaluate", teacher_folder, *words, "--out", out)[0] == 0
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".arrow"]


def test_a_user_distils_composes_evaluates_and_predicts(chronomoe, teacher_folder, series_files, tmp_path):
    shape = ["--horizon", 16, "--context-length", 64]
    for name, file in series_files.items():
        words = ["--steps", 2, "--batch-size", 2, "--student", "half", "--out", tmp_path / name]
        status, out, _ = chronomoe("distil", teacher_folder, file, *shape, *words)
        assert (status, out) == (0, f"saved {tmp_path / name}\n")
    assert type(Chronos2Pipeline.from_pretrained(tmp_path / "power").model) is Chronos2Model
    data = [word for file in series_files.values() for word in ("--data", file)]
    students = [tmp_path / "power", f"shops={tmp_path / 'sales'}"]
    more = ["--windows", 8, "--freq", "D", "--known-covariate", "promo"]
    sales = ["--data", series_files["sales"], *shape, *more, "--out", tmp_path / "with-promo"]
    status, out, _ = chronomoe("compose", *students, *sales)
    assert (status, out) == (0, f"saved {tmp_path / 'with-promo'}\n")
    status, out, _ = chronomoe("compose", *students, *data, *shape, "--windows", 8, "--out", tmp_path / "moe")
    assert (status, out) == (0, f"saved {tmp_path / 'moe'}\n")
    assert ChronoMoEPipeline.from_pretrained(tmp_path / "moe").model.config.expert_names == ["power", "shops"]

    records = tmp_path / "new" / "evaluation.jsonl"
    models = [tmp_path / "moe", teacher_folder]
    status, out, _ = chronomoe("evaluate", *models, *data, *shape, "--limit", 2, "--out", records)
    assert status == 0
    assert "seasonal naive" in out
    found = [json.loads(line) for line in records.read_text().splitlines()]
    assert {record["model"] for record in found} == {*map(str, models), "seasonal naive"}

    out = tmp_path / "forecasts.parquet"
    status, _, _ = chronomoe("predict", tmp_path / "moe", series_files["power"], "--horizon", 3, "--out", out)
    assert (status, len(pd.read_parquet(out))) == (0, 9)


def test_a_user_upcycles_a_model_and_grows_a_student(chronomoe, teacher_folder, series_files, tmp_path):
    words = ["--num-experts", 4, "--top-k", 1, "--layers", "1", "--out", tmp_path / "moe"]
    status, out, _ = chronomoe("upcycle", teacher_folder, *words)
    assert status == 0
    assert re.fullmatch(rf"saved {tmp_path / 'moe'}: [\d,]+ parameters, [\d,]+ of them active per token\n", out)
    model = ChronoMoEPipeline.from_pretrained(tmp_path / "moe").model
    assert (list(model.moe_layers), model.moe_layers[1].config.num_experts) == ([1], 4)

    shape = ["--horizon", 16, "--context-length", 64, "--batch-size", 4]
    words = [*shape, "--steps", 3, "--probe-steps", 2, "--max-layers", 1, "--out", tmp_path / "grown"]
    status, out, err = chronomoe("expand", teacher_folder, *series_files.values(), *words)
    assert status == 0
    assert re.search(r"0 │ +0: 0\.\d+, 1: 0\.\d+ │", out)
    assert out.endswith(f"saved {tmp_path / 'grown'}\n")
    assert "✓ expansion" in err
    assert ChronoMoEPipeline.from_pretrained(tmp_path / "grown").model
    assert not (tmp_path / "grown.work").exists()


def test_run_prints_the_table_and_the_report_and_uses_its_options(chronomoe, recipe, tmp_path):
    mine, folder = recipe(budget={"steps": 50, "batch_size": 2, "windows": 4}), tmp_path / "run"
    status, out, err = chronomoe("run", mine, "--steps", 2, "--out", folder)
    assert status == 0
    assert out.endswith(f"report: {folder / 'report.html'}\n")
    assert "own single" in out
    assert "single/power" not in out
    assert re.search(r"^Deploy .+: it is the cheapest model whose validation error", out, re.M)
    assert re.search(r"^\d+ trainings, \d+ steps in all: about .* of memory and .* of disk", err)  # before it starts
    assert "✓ soft-targets" in err
    assert load_recipe(str(folder / "config.yaml")).budget.steps == 2
    facts = json.loads((folder / "run.json").read_text())
    assert facts["command"] == f"chronomoe run {mine} --steps 2 --out {folder}"
    assert yaml.safe_load((folder / "config.yaml").read_text())["teacher"]
    assert load_file(folder / "moe" / "model.safetensors")

    (folder / "report.md").unlink()
    status, out, _ = chronomoe("report", folder)
    assert (status, (folder / "report.md").is_file()) == (0, True)


@pytest.mark.parametrize(("width", "domains"), [(60, False), (200, True)])
def test_a_terminal_gets_the_figures_by_domain_where_they_fit(
    finished_run, chronomoe, recipe, monkeypatch, tmp_path, width, domains
):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    monkeypatch.setenv("COLUMNS", str(width))
    status, out, _ = chronomoe("run", recipe(), "--out", folder)
    heading = next(line for line in out.splitlines() if "MASE" in line)
    assert status == 0
    assert ("power" in heading and "sales" in heading) == domains
    assert "…" not in out
