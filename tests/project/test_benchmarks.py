"""Every benchmark runs, at a size that says nothing about speed, and ends in one JSON line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "bench"
SMALL = {
    "batch_invariance": ["--series", "6"],
    "router": ["--windows", "64", "--epochs", "2"],
    "group_attention": ["--rows", "4", "--layers", "1", "--repeats", "1"],
    "dispatch": [
        *("--experts", "2", "--tokens", "8", "--top-k", "1", "--d-model", "8", "--width", "8"),
        *("--d-ff", "16", "--layer", "2", "1", "--layer-tokens", "8", "--repeats", "1"),
    ],
    "pretraining": [
        *("--rows", "4", "--context-length", "128", "--horizon", "32"),
        *("--d-model", "64", "--layers", "1", "--repeats", "1"),
    ],
    "throughput": [
        *("--context-length", "64", "--horizon", "16", "--batch-sizes", "1", "2"),
        *("--num-experts", "2", "--repeats", "1", "--layers", "1"),
    ],
    "routing": ["--layers", "1", "--batch-sizes", "1", "--repeats", "1"],
    "peak": ["--layers", "1", "--batch-size", "2", "--product", "64", "--repeats", "1"],
    "labelling": ["--windows", "4", "--context-length", "64", "--layers", "1", "--repeats", "1"],
    "experts": [
        *("--experts", "2", "--rows", "4", "--tokens", "3", "--d-model", "8", "--d-ff", "8", "--repeats", "1"),
    ],
    "cost": ["--layers", "1", "--vary", "--repeats", "1"],
    "predict": [
        *("--series", "5", "--steps", "20", "--freqs", "B", "--layers", "1"),
        *("--memory-series", "2", "4", "--memory-steps", "20"),
    ],
    "startup": ["--repeats", "1"],
    "onnx_runtime": [
        *("--context-length", "64", "--horizon", "16", "--batch-sizes", "2", "--num-experts", "2"),
        *("--layers", "1", "--repeats", "1"),
    ],
    "serve": ["--layers", "1", "--seconds", "0.3", "--restarts", "1", "--clients", "2", "--bulk", "3"],
    "scale_out": ["--parts", "3", "--series", "4", "--steps", "40", "--layers", "1"],
    "low_rank": [
        *("--experts", "2", "--timed", "2", "--rank", "1", "--layers", "1", "--batch-sizes", "2", "--repeats", "1"),
    ],
}


@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_says_its_question_and_ends_in_one_json_line(name):
    if name == "onnx_runtime":
        pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    if name == "scale_out":
        pytest.importorskip("ray", reason="needs the extra ray")
    if name == "serve":
        pytest.importorskip("fastapi_offline", reason="needs the extra serve")
    command = [sys.executable, str(FOLDER / f"{name}.py"), *SMALL[name]]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["question"]


def test_no_benchmark_is_left_out():
    assert {path.stem for path in FOLDER.glob("*.py")} == {*SMALL, "answer"}
