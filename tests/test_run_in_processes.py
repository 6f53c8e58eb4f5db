"""Commands under torchrun: two real processes over gloo leave what one would, once."""

import os
import subprocess
import sys

import pytest

from chronomoe import ChronoMoEPipeline
from chronomoe.run import RESULTS

FEW = {"steps": 4, "batch_size": 2, "windows": 8}


@pytest.fixture
def in_two_processes():
    """Run a command of ours in the processes that torchrun starts; return status and stderr."""

    def call(*words):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*torchrun, "-m", "chronomoe", *map(str, words)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
        return done.returncode, done.stderr

    return call


def test_two_processes_distil_one_student(in_two_processes, teacher_folder, series_files, tmp_path):
    words = ["--horizon", 16, "--context-length", 64, "--steps", 3, "--batch-size", 2, "--out", tmp_path / "student"]
    status, err = in_two_processes("distil", teacher_folder, series_files["power"], *words)
    assert status == 0, err
    assert err.count("✓ soft-targets") == err.count("✓ students/student") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    assert {path.name for path in (tmp_path / "student").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    ChronoMoEPipeline.from_pretrained(tmp_path / "student")


def test_two_processes_end_a_run_with_one_set_of_files(in_two_processes, recipe, tmp_path):
    joint = {"steps": 2}
    status, err = in_two_processes("run", recipe(budget=FEW, joint=joint), "--out", tmp_path / "run")
    assert status == 0, err
    promised = {"report.html", "report.md", "config.yaml", "moe", "recommended", "run.json", "stages", *RESULTS}
    assert promised <= {path.name for path in (tmp_path / "run").iterdir()}
    assert not list((tmp_path / "run").rglob("*.partial"))
    assert len(ChronoMoEPipeline.from_pretrained(tmp_path / "run" / "moe").model.experts) == 3


def test_growing_in_two_processes_is_refused_before_anything_is_written(refused, monkeypatch, recipe, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    path = recipe(routes=["expand"])
    assert "the route 'expand' runs in one process, got 2" in refused("run", path, "--out", tmp_path / "run")
