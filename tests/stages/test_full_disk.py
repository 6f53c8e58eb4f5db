"""What happens when the disk fills up, to whichever library writes at that moment."""

import io
import json
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from chronomoe.data.soft_targets import SoftTargetStore
from chronomoe.data.windows import Window
from chronomoe.errors import InputError
from chronomoe.pipeline import load_teacher
from chronomoe.stages.workspace import MARKER, Workspace


def workspace(folder):
    return Workspace(folder / "run", console=Console(file=io.StringIO()))


def make(folder, report):
    (folder / "result").write_text("made")


def write_plain(folder):
    (folder / "x").write_bytes(bytes(4 << 20))


def write_torch(folder):
    torch.save({"x": torch.zeros(1 << 20)}, folder / "x.pt")


def write_safetensors(folder):
    save_file({"x": torch.zeros(1 << 20)}, folder / "x.safetensors")


WRITERS = {"plain": write_plain, "torch": write_torch, "safetensors": write_safetensors}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_disk_quota_is_one_clear_error_and_what_was_finished_stays(tmp_path, kind):
    """A limit on file sizes stands for a full disk where nothing can be mounted."""
    work = workspace(tmp_path)
    finished = work.stage("a", {}, make)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(InputError, match="stage 'b' could not be written, the disk .* is full; .* stays"):
            work.stage("b", {}, lambda folder, report: WRITERS[kind](folder))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert (finished / "result").exists()
    assert not (work.root / "stages" / "b").exists()
    assert work.stage("b", {}, make).exists()


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        done = False
    if not done:
        pytest.skip("mounting a small disk needs rights that this process lacks")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_one_clear_error_and_what_was_finished_stays(small_disk, kind):
    work = workspace(small_disk)
    finished = work.stage("a", {}, make)
    with pytest.raises(InputError, match="is full"):
        work.stage("b", {}, lambda folder, report: WRITERS[kind](folder))
    assert (finished / "result").exists()
    (work.root / "stages" / "b.partial").joinpath("x").unlink(missing_ok=True)
    assert json.loads((work.root / MARKER).read_text()) == {"format": 1}


def fill(disk, teacher_folder):
    row = np.arange(64, dtype=np.float32)[None]
    windows = [Window(row, row[:, :64], np.full((1, 64), np.nan, np.float32), index) for index in range(3000)]
    teacher = load_teacher(teacher_folder)
    work = workspace(disk)
    try:
        work.stage("soft", {}, lambda folder, report: SoftTargetStore.build(folder / "store", teacher, windows))
    except InputError as error:
        sys.exit(2 if "is full" in str(error) else 3)


def test_soft_targets_on_a_full_disk_are_refused_and_do_not_crash(small_disk, teacher_folder, processes):
    process = processes.Process(target=fill, args=(small_disk, teacher_folder))
    process.start()
    process.join()
    assert process.exitcode == 2  # not -SIGBUS, as for a memory-mapped file whose blocks are missing
