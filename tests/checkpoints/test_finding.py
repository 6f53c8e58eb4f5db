"""Saving, finding and refusing checkpoints. A cache folder stands for the hub, a local server for S3."""

import http.server
import json
import shutil
import subprocess
import sys
import threading
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from chronos import BaseChronosPipeline, Chronos2Pipeline
from transformers import BertConfig, BertModel

from chronomoe import ChronoMoEPipeline, InputError, StudentConfig, create_student_model, load_model, load_teacher
from chronomoe.models.chronos2 import ExactChronos2Model


@pytest.fixture
def plain(make_teacher):
    return make_teacher(num_layers=2)


@pytest.fixture
def mixture(make_mixture):
    return make_mixture()


@pytest.fixture(params=["plain", "mixture"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def pipeline(model):
    return ChronoMoEPipeline(model)


@pytest.fixture
def saved(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def series(make_context):
    """Three variates of each of four series."""
    return make_context(12, 80).view(4, 3, 80)


def forecast(pipeline, inputs, horizon=20):
    return torch.stack(pipeline.predict(inputs, prediction_length=horizon))


def assert_close(actual, expected):
    """Equal but for the order of sums: other kernels run for memory-mapped weights."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


STOCK = """
import logging, random, sys, chronos, torch

def forecast(folder, kind="Chronos2Pipeline"):
    for entry in (chronos.Chronos2Pipeline, chronos.BaseChronosPipeline):
        loaded = entry.from_pretrained(folder)
        assert type(loaded).__name__ == kind, type(loaded)
    return torch.stack(loaded.predict(torch.load(sys.argv[1]), prediction_length=8))

def settings_of_others():
    return torch.initial_seed(), random.getstate(), torch.get_num_threads(), logging.root.handlers[:]

student = forecast(sys.argv[2])
assert not any(name.startswith("chronomoe") for name in sys.modules)
before = settings_of_others()
import chronomoe
chronomoe.checkpoints.registration.register()  # a second time
assert settings_of_others() == before
assert torch.equal(forecast(sys.argv[2]), student)  # stock still, to the bit
torch.save((student, forecast(sys.argv[3], "ChronoMoEPipeline")), sys.argv[4])
"""


@pytest.mark.parametrize("options", [{}, {"dtype": "auto"}])
def test_stock_entry_points_ask_for_no_trial_of_types(mixture, tmp_path, options):
    ChronoMoEPipeline(mixture).save_pretrained(tmp_path / "moe")
    for entry in (BaseChronosPipeline, Chronos2Pipeline):
        loaded = entry.from_pretrained(tmp_path / "moe", **options)
        assert isinstance(loaded, ChronoMoEPipeline)
        assert loaded.trials is None, "its numbers would depend on a clock"


def test_stock_loads_a_student_without_us_and_a_mixture_once_we_are_imported(plain, mixture, series, tmp_path):
    student = ChronoMoEPipeline(create_student_model(plain, StudentConfig(num_layers=1)))
    student.save_pretrained(tmp_path / "student")
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["architectures"] == ["Chronos2Model"]
    assert config["chronos_pipeline_class"] == "Chronos2Pipeline"
    moe = ChronoMoEPipeline(mixture)
    moe.save_pretrained(tmp_path / "moe")
    torch.save(series, tmp_path / "series.pt")
    paths = [str(tmp_path / name) for name in ("series.pt", "student", "moe", "forecasts.pt")]
    done = subprocess.run([sys.executable, "-c", STOCK, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for stock, ours in zip(torch.load(tmp_path / "forecasts.pt"), (student, moe), strict=True):
        assert_close(stock.sort(dim=2).values, forecast(ours, series, 8))


def test_weights_are_loaded_in_float32_unless_another_dtype_is_asked_for(model, series, tmp_path):
    ChronoMoEPipeline(model.to(torch.bfloat16)).save_pretrained(tmp_path / "half")
    assert load_model(tmp_path / "half").dtype == torch.float32
    assert (
        load_model(tmp_path / "half", dtype="auto").dtype == torch.float32
    )  # of the weights: products may be narrower
    for dtype in ("bfloat16", torch.bfloat16):
        pipeline = ChronoMoEPipeline.from_pretrained(tmp_path / "half", dtype=dtype)
        assert pipeline.model.dtype == torch.bfloat16
        assert forecast(pipeline, series).isfinite().all()


def test_the_model_card_says_what_the_checkpoint_is_and_how_to_load_it(mixture, tmp_path):
    ChronoMoEPipeline(mixture).save_pretrained(tmp_path / "moe", sections={"Data": "Four domains."})
    card = (tmp_path / "moe" / "README.md").read_text()
    total = sum(parameter.numel() for parameter in mixture.parameters())
    for part in (
        "---\nlibrary_name: chronomoe\npipeline_tag: time-series-forecasting\nlicense: apache-2.0\n",
        "- mixture-of-experts",
        f"{total:,}",
        f"{mixture.active_parameters():,}",
        "| 4, 2 |",
        "0.1, 0.2, 0.3",
        "128 steps",
        "64 steps",
        *(f"| {name} | " for name in mixture.config.expert_names),
        'ChronoMoEPipeline.from_pretrained("moe")',
        "## Data\n\nFour domains.",
    ):
        assert part in card


def test_the_model_card_of_a_plain_model_says_that_stock_chronos_loads_it(plain, tmp_path):
    ChronoMoEPipeline(plain).save_pretrained(tmp_path / "student")
    card = (tmp_path / "student" / "README.md").read_text()
    assert "`Chronos2Pipeline` of `chronos-forecasting` loads it too." in card
    assert "experts" not in card


def test_saving_again_replaces_the_checkpoint_and_leaves_nothing_beside_it(saved, mixture):
    ChronoMoEPipeline(mixture).save_pretrained(saved)
    assert isinstance(load_model(saved), type(mixture))
    assert [path.name for path in saved.parent.iterdir() if path.name.startswith(".")] == []


def test_a_failed_save_leaves_the_former_checkpoint(pipeline, saved, unchecked):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(AttributeError):
        pipeline.save_pretrained(saved, sections={"Data": None})  # the card is written after the weights
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir() if path.name.startswith(".")] == []


def test_a_teacher_is_a_plain_model_with_the_exact_forward(plain, mixture, tmp_path):
    plain.save_pretrained(tmp_path / "plain")
    ChronoMoEPipeline(mixture).save_pretrained(tmp_path / "moe")
    assert type(load_teacher(tmp_path / "plain")) is ExactChronos2Model
    with pytest.raises(InputError, match="a teacher must be one Chronos-2 model, .*moe' holds a DistilledMoE"):
        load_teacher(tmp_path / "moe")


@pytest.mark.skipif(not (files("chronomoe") / "assets" / "tiny").is_dir(), reason="no teacher is shipped yet")
def test_the_shipped_teacher_loads_by_its_name_in_float32(series):
    teacher = load_teacher("tiny")
    assert teacher.dtype == torch.float32
    assert forecast(ChronoMoEPipeline(teacher), series).isfinite().all()


def test_a_hub_id_is_found_in_the_local_cache(saved, series, tmp_path):
    repository = tmp_path / "cache" / "models--someone--model"
    shutil.copytree(saved, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    loaded = ChronoMoEPipeline.from_pretrained("someone/model", cache_dir=tmp_path / "cache", local_files_only=True)
    expected = forecast(ChronoMoEPipeline.from_pretrained(saved), series, 8)
    assert_close(forecast(loaded, series, 8), expected)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """Serve a folder as S3 does, as far as ``boto3`` asks for, and point ``boto3`` and the cache at it."""
    pytest.importorskip("boto3")
    root = tmp_path / "s3"
    (root / "bucket").mkdir(parents=True)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(root))

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "XDG_CACHE_HOME": str(tmp_path / "xdg"),
    }.items():
        monkeypatch.setenv(name, value)
    yield root / "bucket"
    server.shutdown()
    server.server_close()


def test_an_s3_url_loads_as_our_pipeline(saved, series, bucket):
    shutil.copytree(saved, bucket / "models" / "ours")
    expected = forecast(ChronoMoEPipeline.from_pretrained(saved), series, 8)
    loaded = ChronoMoEPipeline.from_pretrained("s3://bucket/models/ours")
    assert type(loaded) is ChronoMoEPipeline
    assert_close(forecast(loaded, series, 8), expected)


def test_an_s3_url_of_nothing_is_refused(bucket):
    with pytest.raises(InputError, match="no checkpoint at 's3://bucket/nothing'"):
        ChronoMoEPipeline.from_pretrained("s3://bucket/nothing")
    with pytest.raises(InputError, match="an S3 checkpoint is s3://bucket/folder, got 's3://bucket'"):
        ChronoMoEPipeline.from_pretrained("s3://bucket")


def test_a_missing_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in (tmp_path / "gone", str(tmp_path / "gone"), "./gone", "a/b/gone", "runs/gone", Path("gone")):
        with pytest.raises(InputError, match="there is no folder .*gone; accepted are a hub id .*, a folder"):
            ChronoMoEPipeline.from_pretrained(name)


def test_a_misspelt_name_is_refused_without_asking_the_hub():
    with pytest.raises(InputError, match="no checkpoint 'Tiny': a hub id has an owner; .* Did you mean 'tiny'"):
        ChronoMoEPipeline.from_pretrained("Tiny")


def test_a_hub_id_that_cannot_be_reached_is_refused(tmp_path):
    with pytest.raises(
        InputError, match="cannot load 'someone/nothing'; accepted are a hub id .*, a folder, an s3:// URL"
    ):
        ChronoMoEPipeline.from_pretrained("someone/nothing", cache_dir=tmp_path, local_files_only=True)


def test_damaged_checkpoints_are_refused_with_what_is_wrong(saved, tmp_path):
    def spoiled(name, spoil):
        shutil.copytree(saved, tmp_path / name)
        spoil(tmp_path / name)
        return tmp_path / name

    def other_depth(folder):
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace('"num_layers": ', '"num_layers": 1'))

    def other(**changes):
        def spoil(folder):
            config = json.loads((folder / "config.json").read_text())
            for core in config.get("experts", [config]):
                core.update(changes)
            (folder / "config.json").write_text(json.dumps(config))

        return spoil

    def without_levels(folder):
        config = json.loads((folder / "config.json").read_text())
        for core in (config, *config.get("experts", [])):
            del core["chronos_config"]["quantiles"]
        (folder / "config.json").write_text(json.dumps(config))

    for name, spoil, message in (
        ("file", lambda folder: (shutil.rmtree(folder), folder.write_text("")), "is a folder, .* is a file"),
        ("config", lambda folder: (folder / "config.json").unlink(), "the folder has no config.json"),
        ("weights", lambda folder: (folder / "model.safetensors").unlink(), "has no weights: .* no model.safetensors"),
        ("json", lambda folder: (folder / "config.json").write_text("{"), "cannot load .*not a valid JSON"),
        ("cut", lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "cannot load .*[Hh]eader"),
        ("depth", other_depth, "weights in .* are not those of its config.json: .* are missing"),
        ("shape", other(d_ff=32), "are not those of its config.json: .* are of another shape, such as"),
        ("shallow", other(num_layers=0), "does not fit: num_layers must be at least 1, got 0"),
        ("levels", without_levels, "the config.json of .* does not fit: chronos_config.quantiles is required"),
    ):
        with pytest.raises(InputError, match=message):
            ChronoMoEPipeline.from_pretrained(spoiled(name, spoil))


def test_other_architectures_are_refused(saved, tmp_path):
    tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8)
    BertModel(tiny).save_pretrained(tmp_path / "bert")
    with pytest.raises(
        InputError, match="not a Chronos-2 checkpoint: unknown architecture 'BertModel'. Available: Chr"
    ):
        ChronoMoEPipeline.from_pretrained(tmp_path / "bert")
    for key, value, message in (
        ("architectures", ["Chronos2Modell"], "unknown architecture 'Chronos2Modell'.*Did you mean 'Chronos2Model'"),
        ("architectures", None, "its config.json names no architecture"),
        ("chronos_config", None, "its config.json has no chronos_config"),
    ):
        config = json.loads((saved / "config.json").read_text())
        config = {name: old for name, old in config.items() if name != key} | ({key: value} if value else {})
        shutil.copytree(saved, tmp_path / "changed", dirs_exist_ok=True)
        (tmp_path / "changed" / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=message):
            ChronoMoEPipeline.from_pretrained(tmp_path / "changed")


def test_an_unknown_dtype_is_refused(saved):
    with pytest.raises(InputError, match="dtype must be 'auto' or one of float32, bfloat16, float16, got 'int8'"):
        ChronoMoEPipeline.from_pretrained(saved, dtype="int8")


def test_a_folder_that_holds_something_else_is_not_overwritten(pipeline, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("Once")
    (tmp_path / "note").write_text("a file")
    with pytest.raises(InputError, match="holds something other than a checkpoint: chapter.tex; choose a new folder"):
        pipeline.save_pretrained(tmp_path / "thesis")
    with pytest.raises(InputError, match="is saved to a folder, .* is a file"):
        pipeline.save_pretrained(tmp_path / "note")
    with pytest.raises(InputError, match="nothing can be written to .*note' is a file; choose another place"):
        pipeline.save_pretrained(tmp_path / "note" / "below" / "moe")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["chapter.tex", "note", "thesis"]
