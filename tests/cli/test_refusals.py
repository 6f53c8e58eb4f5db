"""Bad input: one clear line on stderr, status 2, nothing half-written."""

import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import transformers

from chronomoe import ChronoMoEPipeline
from chronomoe.models.sparse.config import MoEConfig
from chronomoe.models.sparse.upcycling import upcycle


@pytest.fixture
def predict(refused, teacher_folder, tmp_path):
    """Refuse to predict from a frame."""

    def call(frame, *words):
        frame.to_csv(tmp_path / "past.csv", index=False)
        return refused(
            "predict", teacher_folder, tmp_path / "past.csv", "--horizon", 4, "--out", tmp_path / "f.csv", *words
        )

    return call


def drop(column):
    return lambda frame: frame.drop(columns=column)


def put(row, column, value):
    def change(frame):
        frame[column] = frame[column].astype(object)
        frame.loc[row, column] = value
        return frame

    return change


BAD_FRAMES = {
    "no target": (drop("target"), "missing column 'target'"),
    "misnamed target": (lambda frame: frame.rename(columns={"target": "traget"}), "Did you mean 'traget'"),
    "misnamed item": (lambda frame: frame.rename(columns={"item_id": "id"}), "missing column 'item_id'.* 'id'"),
    "no timestamp": (drop("timestamp"), "missing column 'timestamp'"),
    "duplicated": (lambda frame: pd.concat([frame, frame.tail(1)]), "duplicated timestamp: .*s1"),
    "irregular": (lambda frame: frame.drop(index=[5, 17]), "irregular.*s0|s0.*irregular|regular"),
    "empty": (lambda frame: frame.head(0), "empty"),
    "all missing": (lambda frame: frame.assign(target=np.nan), "all 2 hold only missing values"),
    "infinite": (put(7, "target", np.inf), "finite .* got inf for .*'s0'.*2024-01-01 07:00"),
    "mixed": (put(7, "target", "seven"), "column 'target' mixes numbers and text: row 7 .*'seven'"),
    "text": (lambda frame: frame.assign(colour="red"), "column 'colour' must hold numbers, got 'red'"),
    "not times": (put(3, "timestamp", "soon"), "column 'timestamp' must hold dates or times .*'soon' in row 3"),
}


@pytest.mark.parametrize("kind", BAD_FRAMES)
def test_a_bad_frame_is_refused(predict, make_frame, kind):
    change, message = BAD_FRAMES[kind]
    assert re.search(message, predict(change(make_frame(2, 60))))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--levels", "low"], "numbers separated by commas"),
        (["--levels", "0.5,1.5"], "between 0 and 1"),
        (["--target", "traget"], "missing column 'traget'"),
        (["--horizon", "0"], "horizon must be at least 1 step, got 0"),
        (["--out", "f.txt"], "a .csv or .parquet file, got f.txt"),
        (["--future", "nowhere.csv"], "nowhere.csv"),
        (["--levels", "0.5,0.5"], "each given once, got [0.5, 0.5]"),
        (["--batch-size", "0"], "batch_size must be at least 1 row, got 0"),
        (["--freq", "D"], "irregular frequency: timestamps must follow 'D' (given)"),
    ],
)
def test_a_bad_option_of_predict_is_refused(predict, make_frame, words, message):
    assert message in predict(make_frame(2, 60), *words)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe": {"routing": {"top_k": 9}}}, "top_k must be from 1 to 3, the number of experts, got 9"),
        ({"domains": [{"data": "nowhere.csv"}]}, "nowhere.csv"),
        ({"domains": [{"data": "demo:trafic"}]}, "Did you mean 'traffic'"),
        ({"windows": {"context_length": 64, "horizon": 60}}, "no series of domain 'power' has a validation part"),
    ],
)
def test_a_bad_recipe_is_refused(refused, recipe, tmp_path, changes, message):
    assert message in refused("run", recipe(**changes), "--out", tmp_path / "run")


def test_an_output_folder_that_holds_something_else_is_refused(refused, recipe, tmp_path):
    mine = recipe()
    assert "holds something else" in refused("run", mine, "--out", tmp_path)
    assert "is a file" in refused("run", mine, "--out", mine)
    assert "is not empty" in refused("distil", "tiny", "demo:traffic", "--out", tmp_path)
    assert "is not empty" in refused("compose", "a=x", "--data", "demo:traffic", "--out", tmp_path)
    assert "is not empty" in refused("upcycle", "tiny", "--out", tmp_path)
    assert "is not empty" in refused("expand", "tiny", "demo:traffic", "--out", tmp_path)


def test_a_teacher_without_weights_or_of_another_kind_is_refused(refused, recipe, teacher_folder, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((teacher_folder / "config.json").read_bytes())
    assert "has no weights" in refused("run", recipe(teacher=str(tmp_path / "bare")), "--out", tmp_path / "run")
    core = transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=9)
    transformers.T5EncoderModel(core).save_pretrained(tmp_path / "t5")
    assert "not a Chronos-2 checkpoint" in refused("run", recipe(), "--teacher", tmp_path / "t5", "--out", "run")
    assert "there is no folder" in refused("run", recipe(), "--teacher", "./nowhere", "--out", tmp_path / "run")


def test_series_that_are_all_too_short_are_refused(refused, teacher_folder, make_frame, tmp_path):
    make_frame(2, 40).to_csv(tmp_path / "data.csv", index=False)
    words = [tmp_path / "data.csv", "--horizon", 16, "--context-length", 64, "--out", tmp_path / "x"]
    assert "no series of domain 'data' has a" in refused("distil", teacher_folder, *words)
    assert "no series of domain 'data' has a" in refused("evaluate", teacher_folder, "--data", *words)


def test_top_k_beyond_the_experts_is_refused(refused, finished_run, tmp_path):
    student = finished_run / "stages" / "students" / "expert-power" / "model"
    words = ["--data", "demo:traffic", "--top-k", 3, "--out", tmp_path / "moe"]
    assert "top_k must be from 1 to 2" in refused("compose", f"a={student}", f"b={student}", *words)
    assert "top_k must be at least 1" in refused("compose", f"a={student}", *words, "--top-k", 0)
    assert "needs a name of its own" in refused("compose", student, student, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top-k", 9], "top_k must be from 1 to 8, the number of experts, got 9"),
        (["--num-experts", 0, "--top-k", 0], "num_experts must be at least 1, got 0"),
        (["--granularity", 3], "num_experts must be a multiple of granularity 3"),
        (["--granularity", 64, "--num-experts", 64, "--top-k", 64], "granularity must divide the 96 hidden units"),
        (["--layers", "0,2"], "layers must be from 0 to 1, the model's encoder blocks, got 2"),
        (["--layers", "first"], "layers must be encoder blocks separated by commas, such as 0,2; got 'first'"),
        (["--noise", -1], "noise must be at least 0, got -1"),
    ],
)
def test_a_bad_option_of_upcycle_is_refused(refused, teacher_folder, tmp_path, words, message):
    assert message in refused("upcycle", teacher_folder, "--out", tmp_path / "moe", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top-k", 9], "top_k must be from 1 to 4, the number of experts, got 9"),
        (["--candidates", "0,2"], "candidates must be from 0 to 1, the model's encoder blocks, got 2"),
        (["--candidates", "0;1"], "candidates must be encoder blocks separated by commas, such as 0,2; got '0;1'"),
        (["--max-layers", 0], "max_layers must be at least 1, got 0"),
        (["--min-gain", 5], "min_gain must be below 1, got 5"),
        (["--steps", 0], "steps must be at least 1, got 0"),
        (["--horizon", 65], "horizons of at most 64 steps, got 65"),
        (["--teacher", "./nowhere"], "there is no folder"),
    ],
)
def test_a_bad_option_of_expand_is_refused(refused, teacher_folder, series_files, tmp_path, words, message):
    shape = ["--horizon", 16, "--context-length", 64, "--out", tmp_path / "grown"]
    assert message in refused("expand", teacher_folder, series_files["power"], *shape, *words)


def test_a_model_with_moe_layers_is_neither_upcycled_nor_expanded(refused, teacher_folder, series_files, tmp_path):
    dense = ChronoMoEPipeline.from_pretrained(teacher_folder).model
    ChronoMoEPipeline(upcycle(dense, MoEConfig())).save_pretrained(tmp_path / "moe")
    words = ["--horizon", 16, "--context-length", 64, "--out", tmp_path / "out"]
    assert "which has MoE layers" in refused("upcycle", tmp_path / "moe", "--out", tmp_path / "out")
    assert "which has MoE layers" in refused("expand", tmp_path / "moe", series_files["power"], *words)


def test_experts_of_other_quantile_levels_are_refused(refused, finished_run, make_teacher, tmp_path):
    student = finished_run / "stages" / "students" / "expert-power" / "model"
    ChronoMoEPipeline(make_teacher(forecasting={"quantiles": [0.1, 0.5, 0.9]})).save_pretrained(tmp_path / "odd")
    words = ["--data", "demo:traffic", "--out", tmp_path / "moe"]
    assert "quantiles" in refused("compose", f"a={student}", tmp_path / "odd", *words)


def test_a_report_of_a_folder_without_a_run_is_refused(refused, tmp_path):
    refused("report", tmp_path)


def test_an_input_is_not_overwritten_and_nothing_is_written_below_a_file(refused, teacher_folder, make_frame, tmp_path):
    file = tmp_path / "past.csv"
    make_frame(2, 300).to_csv(file, index=False)
    shape = ["--horizon", 16, "--context-length", 64]
    predict = ["predict", teacher_folder, file, "--horizon", 4, "--out"]
    evaluate = ["evaluate", teacher_folder, "--data", file, *shape, "--out"]
    for words in (predict, evaluate):
        assert "is also read; name another file" in refused(*words, file)
    distil = ["distil", teacher_folder, file, *shape, "--out"]
    compose = ["compose", f"a={teacher_folder}", f"b={teacher_folder}", "--data", file, *shape, "--out"]
    for words in (predict, evaluate, distil, compose, ["run", "ci", "--out"], ["pretrain", "tiny-teacher", "--out"]):
        assert "past.csv' is a file; choose another place" in refused(*words, file / "below.csv")


def test_contexts_may_be_shorter_than_usual_but_not_empty(refused, chronomoe, teacher_folder, series_files, tmp_path):
    words = ["distil", teacher_folder, series_files["power"], "--horizon", 16, "--steps", 1, "--batch-size", 2]
    assert "context_length must be at least 1" in refused(*words, "--context-length", 0, "--out", tmp_path / "x")
    assert chronomoe(*words, "--context-length", 16, "--out", tmp_path / "x")[0] == 0


def test_series_of_one_step_are_forecast_where_the_frequency_is_stated(refused, chronomoe, teacher_folder, tmp_path):
    (tmp_path / "past.csv").write_text("item_id,timestamp,target\na,2024-01-01,1\n")
    words = ["predict", teacher_folder, tmp_path / "past.csv", "--horizon", 2, "--out", tmp_path / "f.csv"]
    assert "a frequency shows only in a series of at least 3 rows" in refused(*words)
    assert chronomoe(*words, "--freq", "MS")[0] == 0
    assert pd.read_csv(tmp_path / "f.csv").timestamp.tolist() == ["2024-02-01", "2024-03-01"]


@pytest.mark.parametrize(
    ("seed", "message"),
    [(-1, "seed must be at least 0, got -1"), (2**32, "seed must be at most 4294967295, got 4294967296")],
)
def test_a_seed_that_no_generator_takes_is_refused(refused, teacher_folder, series_files, tmp_path, seed, message):
    words = [series_files["power"], "--horizon", 16, "--context-length", 64, "--seed", seed, "--out", tmp_path / "x"]
    assert message in refused("distil", teacher_folder, *words)
    experts = [f"a={teacher_folder}", f"b={teacher_folder}", "--data"]
    assert message in refused("compose", *experts, *words)


def test_a_type_that_nothing_is_trained_in_is_refused(refused, teacher_folder, series_files, tmp_path):
    words = [series_files["power"], "--horizon", 16, "--context-length", 64, "--out", tmp_path / "x"]
    message = "dtype must be one of auto, float32, bfloat16, got 'int8'"
    assert message in refused("distil", teacher_folder, *words, "--dtype", "int8")


def test_series_without_values_are_left_out_with_one_line(make_frame, teacher_folder, tmp_path):
    frame = make_frame(2, 60)
    frame.loc[frame["item_id"] == "s1", "target"] = np.nan
    frame.to_csv(tmp_path / "past.csv", index=False)
    words = ["predict", teacher_folder, tmp_path / "past.csv", "--horizon", "4", "--out", tmp_path / "f.csv"]
    done = subprocess.run(
        [sys.executable, "-m", "chronomoe", *map(str, words)], capture_output=True, text=True, check=True
    )
    lines = [line for line in done.stderr.splitlines() if "dropped" in line]
    assert lines == ["chronomoe: dropped 1 of 2 series, their target holds only missing values: 's1'"]


def test_a_run_that_labels_on_a_cluster_needs_ray(refused, monkeypatch, recipe, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'chronomoe[ray]'" in refused("run", recipe(label_engine="ray"), "--out", tmp_path / "run")


def test_labels_come_from_an_engine_that_exists(refused, series_files, tmp_path):
    words = ["tiny", series_files["power"], "--engine", "spark", "--out", tmp_path / "student"]
    assert "engine must be one of local, ray, got 'spark'" in refused("distil", *words)
