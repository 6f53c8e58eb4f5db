"""Whatever stops a run: what was finished stays, one line says what to do, the same command ends as one left alone."""

import errno
import json
import os
import shutil
import signal
import time
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from chronomoe.errors import InputError
from chronomoe.run import run
from chronomoe.stages.faults import room
from chronomoe.stages.workspace import Workspace

RESULTS = ("evaluation.jsonl", "recommendation.json", "routing.json", "forecasts.json")


def quiet():
    return Console(file=StringIO())


def same_results(folder, other):
    files = (*RESULTS, "moe/model.safetensors", "recommended/model.safetensors")
    return all((folder / name).read_bytes() == (other / name).read_bytes() for name in files)


def finished(folder):
    return {path.parent for path in (folder / "stages").rglob("stage.json") if ".partial" not in str(path)}


FAULTS = (
    (OSError(errno.ENOSPC, "No space left on device"), "the disk that holds .* is full; .* free some room"),
    (OSError(errno.EROFS, "Read-only file system"), "no right to write in .*; .* make it writable"),
    (MemoryError(), "ran out of memory; .* free some and run the same command again, or lower batch_size"),
)


def test_a_fault_at_the_end_of_every_stage_costs_that_stage_alone(finished_run, make_recipe, tmp_path, monkeypatch):
    """Each stage in turn meets one of the faults just before it appears."""
    folder, rename, met = tmp_path / "run", Path.rename, []

    def failing(path, target):
        is_stage = target.is_relative_to(folder / "stages") and ".partial" not in str(target)
        if is_stage and target not in met:
            met.append(target)
            raise FAULTS[len(met) % len(FAULTS)][0]
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    count = len(finished(finished_run))
    for number in range(1, count + 1):
        before = finished(folder)
        with pytest.raises(InputError, match=FAULTS[number % len(FAULTS)][1]) as refused:
            run(make_recipe(), folder, console=quiet())
        stage = str(met[-1].relative_to(folder / "stages"))
        assert f"stage {stage!r}" in str(refused.value)
        assert "what was finished stays" in str(refused.value)
        assert before <= finished(folder)
    run(make_recipe(), folder, console=quiet())
    assert len(met) == count
    assert same_results(folder, finished_run)


def test_memory_that_runs_out_in_the_middle_of_one_expert_costs_no_other(
    finished_run, make_recipe, tmp_path, monkeypatch
):
    from chronomoe.training.trainer import Chronos2DistillationTrainer

    folder, step, taken = tmp_path / "run", Chronos2DistillationTrainer.training_step, []

    def failing(self, *args, **kwargs):
        if "expert-sales" in self.args.output_dir and len(taken) < 5:
            taken.append(self.state.global_step)
            if len(taken) == 5:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Chronos2DistillationTrainer, "training_step", failing)
    with pytest.raises(InputError, match="stage 'students/expert-sales' ran out of memory; what was finished stays"):
        run(make_recipe(), folder, console=quiet())
    assert folder / "stages/students/expert-power" in finished(folder)
    run(make_recipe(), folder, console=quiet())
    assert same_results(folder, finished_run)


@pytest.mark.parametrize("name", ["store.json", "quantiles"])
def test_a_store_that_was_damaged_is_made_again_and_nothing_else_is(finished_run, make_recipe, tmp_path, name):
    folder, console = shutil.copytree(finished_run, tmp_path / finished_run.name), quiet()
    os.truncate(folder / "stages/soft-targets/store" / name, 8)
    run(make_recipe(), folder, console=console)
    made = [line for line in console.file.getvalue().splitlines() if "skipped" not in line]
    assert "is damaged" in " ".join(made)
    assert [line.split(":")[0] for line in made if line.startswith("✓")] == ["✓ soft-targets"]
    assert (folder / "stages/soft-targets/store/quantiles").read_bytes() == (
        finished_run / "stages/soft-targets/store/quantiles"
    ).read_bytes()
    assert same_results(folder, finished_run)


@pytest.mark.parametrize("words", ["DefaultCPUAllocator: can't allocate memory: you tried", "CUDA out of memory."])
def test_torch_says_in_several_ways_that_there_is_no_memory(tmp_path, words):
    with pytest.raises(InputError, match="stage 'x' ran out of memory"), room(tmp_path, "stage 'x'"):
        raise RuntimeError(words)


def test_a_file_elsewhere_that_may_not_be_read_is_no_closed_folder(tmp_path):
    error = PermissionError(errno.EACCES, "Permission denied", "/etc/shadow")
    with pytest.raises(PermissionError), room(tmp_path, "stage 'x'"):
        raise error
    error = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "x"))
    with pytest.raises(InputError, match="no right to write in"), room(tmp_path, "stage 'x'"):
        raise error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_the_right_to_write_is_refused_at_once(tmp_path, make_recipe):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="no right to write in"):
        run(make_recipe(), tmp_path / "run", console=quiet())


def work_on(folder):
    workspace = Workspace(folder, console=quiet())
    workspace.stage("long", {}, lambda place, report: ((place / "begun").touch(), time.sleep(600)))


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(tmp_path, processes):
    folder = tmp_path / "run"
    first = processes.Process(target=work_on, args=(folder,))
    first.start()
    while not (folder / "stages/long.partial/begun").exists():
        time.sleep(0.01)
    with pytest.raises(InputError, match="another run is at work in .*; wait for its end, or choose another output"):
        Workspace(folder, console=quiet())
    assert (folder / "stages/long.partial/begun").exists()
    first.kill()  # the lock goes with the process
    first.join()
    Workspace(folder, console=quiet()).stage("long", {}, lambda place, report: None)


def run_until_it_renames(recipe, folder, renamed):
    """Run, and kill this process just before it gives something a name that is not in the file ``renamed``."""
    before = json.loads(renamed.read_text())

    def guard(call):
        def renaming(source, target, *args, **kwargs):
            name = os.path.relpath(target, folder)
            aside = any(mark in name for mark in ("..", ".partial-", ".former-"))
            if not aside and name not in before:
                renamed.write_text(json.dumps([*before, name]))
                os.kill(os.getpid(), signal.SIGKILL)
            return call(source, target, *args, **kwargs)

        return renaming

    os.rename, os.replace = guard(os.rename), guard(os.replace)
    run(recipe, folder, console=quiet())


def test_a_run_killed_before_it_names_anything_ends_as_one_left_alone(finished_run, make_recipe, processes, tmp_path):
    """Everything that a run leaves is written aside and renamed: there a kill loses most."""
    folder, renamed = tmp_path / "run", tmp_path / "renamed.json"
    renamed.write_text("[]")
    while True:
        process = processes.Process(target=run_until_it_renames, args=(make_recipe(), folder, renamed))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    names = json.loads(renamed.read_text())
    assert {"stages/router", "stages/evaluation", "moe", "recommended", "report.html"} <= set(names)
    assert same_results(folder, finished_run)
    assert not list(folder.rglob("*.partial*"))  # nor what a killed copy left
