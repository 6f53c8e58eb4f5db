"""Checkpoints are written whole or not at all, wherever the folder lies."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from chronomoe.checkpoints.writing import check_parent, content, whole_folder, work_folder
from chronomoe.errors import InputError

FILES = ("README.md", "config.json", "model.safetensors")


def write(folder, text):
    with whole_folder(Path(folder)) as scratch:
        for name in FILES:
            (scratch / name).write_text(text)


def texts(folder):
    return {path.name: path.read_text() for path in Path(folder).iterdir()}


def whole(text):
    return dict.fromkeys(FILES, text)


@pytest.fixture
def saved(tmp_path):
    write(tmp_path / "saved", "old")
    return tmp_path / "saved"


@pytest.fixture
def mount():
    """Mount a folder, skipping where this process has no right to."""
    mounted = []

    def act(folder, *options):
        folder.mkdir(exist_ok=True)
        done = subprocess.run(["mount", *options, str(folder)], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("no right to mount")
        mounted.append(folder)
        return folder

    yield act
    for folder in reversed(mounted):
        subprocess.run(["umount", str(folder)], check=True)


def fail_at(monkeypatch, number, *, code=errno.EIO):
    """Let the ``number``-th rename of a path fail, once."""
    rename, calls = Path.rename, []

    def failing(self, target):
        calls.append(self)
        if len(calls) == number:
            raise OSError(code, "failed")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)


@pytest.mark.parametrize("number", [1, 2])
def test_a_rename_that_fails_leaves_the_former_checkpoint(saved, monkeypatch, number):
    fail_at(monkeypatch, number)
    with pytest.raises(OSError, match="failed"):
        write(saved, "new")
    assert texts(saved) == whole("old")
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize("number", range(1, 4))
def test_a_failure_in_the_current_folder_puts_the_former_files_back(saved, monkeypatch, number):
    monkeypatch.chdir(saved)
    fail_at(monkeypatch, number)
    with pytest.raises(OSError, match="failed"):
        write(".", "new")
    assert texts(saved) == whole("old")


def test_the_current_folder_stays_where_it_is(saved, monkeypatch):
    monkeypatch.chdir(saved)
    write(".", "new")
    assert Path.cwd() == saved
    assert texts(".") == whole("new")


def test_a_folder_that_the_system_does_not_rename_is_filled(saved, monkeypatch):
    fail_at(monkeypatch, 1, code=errno.EBUSY)
    write(saved, "new")
    assert texts(saved) == whole("new")
    assert list(saved.parent.iterdir()) == [saved]


def test_a_mounted_folder_is_written_to(mount, tmp_path):
    volume = mount(tmp_path / "volume", "-t", "tmpfs", "none")
    (volume / "lost+found").mkdir()
    for text in ("old", "new"):
        write(volume, text)
    (volume / "lost+found").rmdir()
    assert texts(volume) == whole("new")


def test_a_volume_below_a_read_only_folder_is_written_to(mount, tmp_path):
    root = mount(tmp_path / "root", "-t", "tmpfs", "none")
    volume = mount(root / "model", "-t", "tmpfs", "none")
    subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
    write(volume, "new")
    assert texts(volume) == whole("new")
    assert work_folder(volume) == volume / ".work"


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("~/saved", "new")
    assert texts(tmp_path / "saved") == whole("new")
    assert work_folder(Path("~/saved")) == tmp_path / "saved.work"


def test_the_work_for_the_current_folder_lies_beside_it(saved, monkeypatch):
    monkeypatch.chdir(saved)
    assert work_folder(Path(".")) == saved.with_name("saved.work")


def test_a_symlink_stays_one_and_its_folder_is_replaced(saved):
    link = saved.with_name("link")
    link.symlink_to(saved)
    write(link, "new")
    assert link.is_symlink()
    assert texts(saved) == whole("new")


def test_what_a_killed_save_left_inside_is_passed_over_and_cleared(saved, monkeypatch):
    (saved / ".partial-0123").mkdir()
    assert [path.name for path in content(saved)] == list(FILES)
    monkeypatch.chdir(saved)
    write(".", "new")
    assert texts(saved) == whole("new")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_without_the_right_to_write_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="no permission to write to"):
        check_parent(tmp_path / "new")
