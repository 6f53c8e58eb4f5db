"""Commands under torchrun: two real processes over gloo leave what one would, once."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from chronomoe import ChronoMoEPipeline
from chronomoe.run import RESULTS
from chronomoe.stages.workspace import MARKER

LATE = Path(__file__).with_name("late_process.py")
RUNS = Path(__file__).with_name("runs_in_processes.py")
FEW = {"steps": 4, "batch_size": 2, "windows": 8}


@pytest.fixture
def in_two_processes():
    """Run a command of ours in the processes that torchrun starts; return status and output."""

    def call(*words, program=("-m", "chronomoe")):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*torchrun, *program, *map(str, words)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
        return done.returncode, done.stdout + done.stderr

    return call


def test_two_processes_distil_one_student(in_two_processes, teacher_folder, series_files, tmp_path):
    words = ["--horizon", 16, "--context-length", 64, "--steps", 3, "--batch-size", 2, "--out", tmp_path / "student"]
    status, err = in_two_processes("distil", teacher_folder, series_files["power"], *words)
    assert status == 0, err
    assert err.count("✓ soft-targets") == err.count("✓ students/student") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    assert {path.name for path in (tmp_path / "student").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    ChronoMoEPipeline.from_pretrained(tmp_path / "student")


LAUNCHERS = {
    "torchrun": "torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d "
    "--rdzv-endpoint 127.0.0.1:PORT",
    "accelerate": "accelerate.commands.launch --multi_gpu --num_machines 2 --machine_rank RANK --num_processes 2 "
    "--main_process_ip 127.0.0.1 --main_process_port PORT",
}
"""How docs/tasks/scale.md starts several machines, each of one process here."""


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_machines_distil_one_student(launcher, teacher_folder, series_files, tmp_path):
    out = tmp_path / "student"
    words = ["--horizon", 16, "--context-length", 64, "--steps", 2, "--batch-size", 2, "--out", out]
    distil = ["-m", "chronomoe", "distil", *map(str, [teacher_folder, series_files["power"], *words])]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    lines = [LAUNCHERS[launcher].replace("PORT", port).replace("RANK", rank).split() for rank in "01"]
    machines = [
        subprocess.Popen(
            [sys.executable, "-m", *line, *distil], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for line in lines
    ]
    said = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert "".join(said).count("✓ students/student") == 1
    ChronoMoEPipeline.from_pretrained(out)


def test_two_processes_end_a_run_with_one_set_of_files(in_two_processes, recipe, tmp_path):
    joint = {"steps": 2}
    status, err = in_two_processes("run", recipe(budget=FEW, joint=joint), "--out", tmp_path / "run")
    assert status == 0, err
    assert err.count("report: ") == 1
    promised = {"report.html", "report.md", "config.yaml", "moe", "recommended", "run.json", "stages", *RESULTS}
    assert promised <= {path.name for path in (tmp_path / "run").iterdir()}
    assert not list((tmp_path / "run").rglob("*.partial"))
    assert len(ChronoMoEPipeline.from_pretrained(tmp_path / "run" / "moe").model.experts) == 3


def test_runs_of_one_launch_wait_for_their_own_stages(in_two_processes, tmp_path):
    status, err = in_two_processes(tmp_path, program=[RUNS])
    assert status == 0, err


def test_growing_in_two_processes_is_refused_before_anything_is_written(refused, monkeypatch, recipe, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    path = recipe(routes=["expand"])
    assert "the route 'expand' runs in one process, got 2" in refused("run", path, "--out", tmp_path / "run")


@pytest.fixture
def compose(in_two_processes, teacher_folder, series_files, tmp_path):
    """Make a mixture in two processes; return status and output."""

    def call(*options, **how):
        sizes = ["--horizon", 16, "--context-length", 64, "--windows", 8, "--top-k", 1]
        words = [f"a={teacher_folder}", f"b={teacher_folder}", "--data", series_files["power"], *sizes, *options]
        return in_two_processes("compose", *words, "--out", tmp_path / "moe", **how)

    return call


def test_a_process_that_starts_when_the_first_has_written_its_result_ends_too(compose, tmp_path):
    status, err = compose(program=[LATE])
    assert status == 0, err
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def test_what_an_earlier_launch_left_is_not_taken_for_this_one_s(compose, tmp_path):
    (tmp_path / "moe.work" / "stages" / "router.partial").mkdir(parents=True)
    (tmp_path / "moe.work" / MARKER).write_text("{}")
    (tmp_path / "moe.work" / "left-1").touch()
    status, err = compose()
    assert status == 0, err
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_what_each_process_would_do_alike_is_refused(refused, monkeypatch, series_files, tmp_path, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    data = ["--data", series_files["power"]] if command == "evaluate" else [series_files["power"]]
    said = refused(command, "tiny", *data, "--horizon", 16, "--out", tmp_path / "found.csv")
    assert f"{command} runs in one process, got 2; start it without torchrun" in said
