import dataclasses
import json

import pytest
import typer

from chronomoe import ChronoMoEPipeline
from chronomoe.cli.app import app
from chronomoe.models.sparse.config import MoEConfig
from chronomoe.training.growing import ExpansionConfig

COMMANDS = typer.main.get_command(app).commands
DERIVED = {"expert_width"}  # of a copied block: what granularity and shared_width leave
OF_COPIES = {"granularity", "noise", "reinit", "layers", "capacity_factor", "z_weight"}
SHAPE = ["--horizon", 16, "--context-length", 64, "--batch-size", 4]


def options(command):
    return {parameter.name: parameter for parameter in COMMANDS[command].params}


def defaults(config):
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def test_every_setting_of_an_upcycled_layer_is_an_option_with_the_same_default():
    expected = {name: value for name, value in defaults(MoEConfig()).items() if name not in DERIVED}
    assert {name: options("upcycle")[name].default for name in expected} == expected


def test_settings_of_an_expansion_are_options_with_the_same_defaults():
    config = ExpansionConfig()
    layer = {name: value for name, value in defaults(config.layer).items() if name not in OF_COPIES}
    own = {name: value for name, value in defaults(config).items() if name not in ("layer", "training")}
    training = {name: getattr(config.training, name) for name in ("steps", "batch_size", "learning_rate", "seed")}
    expected = own | layer | training
    assert {name: options("expand")[name].default for name in expected} == expected


def test_upcycle_makes_the_layers_that_its_options_name(chronomoe, teacher_folder, tmp_path):
    settings = {
        "num_experts": 4,
        "top_k": 2,
        "granularity": 2,
        "shared_width": 32,
        "noise": 0.1,
        "reinit": 0.25,
        "gating": "top_k_then_softmax",
        "balance": "l2",
        "z_weight": 0.01,
        "bias_rate": 0.001,
        "capacity_factor": 2.0,
        "seed": 3,
    }
    words = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]
    status, out, _ = chronomoe("upcycle", teacher_folder, "--layers", "1", *words, "--out", tmp_path / "moe")
    assert status == 0, out
    model = ChronoMoEPipeline.from_pretrained(tmp_path / "moe").model
    assert MoEConfig(**model.config.moe) == MoEConfig(**settings, layers=(1,))
    assert model.moe_layers[1].wi.shape[:2] == (4, 32)


def test_expand_inserts_the_layers_that_its_options_name(chronomoe, teacher_folder, series_files, tmp_path):
    settings = {"expert_width": 8, "shared_width": 4, "gating": "top_k_then_softmax", "top_k": 2, "bias_rate": 0.01}
    words = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]
    words += ["--steps", 3, "--candidates", "1", "--max-layers", 1, "--tune-earlier", "--aux-weight", 0.1]
    status, out, _ = chronomoe("expand", teacher_folder, *series_files.values(), *SHAPE, *words, "-o", tmp_path / "g")
    assert status == 0, out
    model = ChronoMoEPipeline.from_pretrained(tmp_path / "g").model
    assert json.loads((tmp_path / "g" / "config.json").read_text())["insertion"]["after"] == [1]
    assert model.insertion.layer == MoEConfig(num_experts=4, **settings)
    assert model.moe_layers[0].wi.shape[:2] == (4, 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shared-width", 96], "shared_width must be below 96, the hidden units of the dense block, got 96"),
        (["--reinit", 2], "reinit must be at most 1, got 2"),
        (["--capacity-factor", 0], "capacity_factor must be above 0, got 0"),
        (["--bias-rate", -1], "bias_rate must be at least 0, got -1"),
    ],
)
def test_bad_options_of_upcycle_are_refused(refused, teacher_folder, tmp_path, words, message):
    assert message in refused("upcycle", teacher_folder, "--out", tmp_path / "moe", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--expert-width", 0], "expert_width must be at least 1, got 0"),
        (["--aux-weight", -1], "aux_weight must be at least 0, got -1"),
    ],
)
def test_bad_options_of_expand_are_refused(refused, teacher_folder, series_files, tmp_path, words, message):
    assert message in refused("expand", teacher_folder, series_files["power"], *SHAPE, *words, "-o", tmp_path / "g")


def test_expand_reads_contexts_shorter_than_usual(chronomoe, teacher_folder, series_files, tmp_path):
    words = ["--horizon", 8, "--context-length", 16, "--batch-size", 4, "--steps", 1, "--probe-steps", 1]
    words += ["--candidates", "1", "--max-layers", 1, "-o", tmp_path / "g"]
    status, _, err = chronomoe("expand", teacher_folder, series_files["power"], *words)
    assert status == 0, err


@pytest.mark.parametrize("command", ["upcycle", "expand"])
def test_a_command_that_runs_in_one_process_refuses_several(
    refused, monkeypatch, teacher_folder, series_files, tmp_path, command
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    data = [series_files["power"]] if command == "expand" else []
    message = refused(command, teacher_folder, *data, "--out", tmp_path / "moe")
    assert f"{command} runs in one process, got 2; start it without torchrun" in message


def test_an_unknown_way_of_gating_is_wrong_usage(chronomoe, tmp_path):
    status, _, err = chronomoe("upcycle", "tiny", "--gating", "sigmoid", "--out", tmp_path / "moe")
    assert status == 2
    assert "softmax_then_top_k" in err
