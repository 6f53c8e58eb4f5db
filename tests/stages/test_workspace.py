import errno
import io

import pytest
from rich.console import Console

from chronomoe.errors import InputError
from chronomoe.stages.workspace import (
    MARKER,
    Workspace,
    check_folder,
    copy_folder,
    stage_key,
    whole_file,
    write_atomically,
)


class Killed(BaseException):
    """Stands for a kill: nothing in the code under test may catch it."""


@pytest.fixture
def work(tmp_path):
    return Workspace(tmp_path / "run", console=Console(file=io.StringIO()))


@pytest.fixture
def calls():
    return []


@pytest.fixture
def make(calls):
    """Fill a stage and note what lay in its folder before."""

    def make(folder, report):
        calls.append(sorted(path.name for path in folder.iterdir()))
        report(1, 1)
        (folder / "result").write_text(f"made {len(calls)} times")

    return make


def interrupt(work, name, inputs):
    """Leave the folder of a stage that was killed after its first file."""

    def make(folder, report):
        (folder / "half").write_text("a")
        raise Killed

    with pytest.raises(Killed):
        work.stage(name, inputs, make)


def test_a_stage_is_skipped_while_its_inputs_stay(work, make, calls):
    first = work.stage("a", {"x": 1}, make)
    again = work.stage("a", {"x": 1}, make)
    assert first == again
    assert len(calls) == 1
    assert "a: unchanged, skipped" in work.console.file.getvalue()


def test_a_stage_is_made_again_when_its_inputs_change(work, make, calls):
    key = stage_key(work.stage("a", {"x": 1}, make))
    folder = work.stage("a", {"x": 2}, make)
    assert (folder / "result").read_text() == "made 2 times"
    assert stage_key(folder) != key


def test_the_order_of_inputs_does_not_matter(work, make, calls):
    work.stage("a", {"x": 1, "y": 2}, make)
    work.stage("a", {"y": 2, "x": 1}, make)
    assert len(calls) == 1


def test_another_process_finds_the_finished_stage(work, make, calls):
    work.stage("deep/a", {"x": 1}, make)
    Workspace(work.root, console=work.console).stage("deep/a", {"x": 1}, make)
    assert len(calls) == 1


def test_a_failing_stage_leaves_the_finished_ones(work, make):
    finished = work.stage("a", {}, make)
    interrupt(work, "b", {})
    assert (finished / "result").exists()
    assert not (work.root / "stages" / "b").exists()


def test_a_partial_folder_is_handed_back_to_the_same_inputs(work, make, calls):
    interrupt(work, "a", {"x": 1})
    folder = work.stage("a", {"x": 1}, make)
    assert "half" in calls[0]
    assert not folder.with_name("a.partial").exists()


def test_a_partial_folder_is_wiped_for_other_inputs(work, make, calls):
    interrupt(work, "a", {"x": 1})
    work.stage("a", {"x": 2}, make)
    assert "half" not in calls[0]


@pytest.mark.parametrize("text", ["", '{"key', "{}"])
def test_a_partial_folder_whose_start_was_cut_short_is_wiped(work, make, calls, text):
    interrupt(work, "a", {"x": 1})
    (work.root / "stages" / "a.partial" / "started.json").write_text(text)
    work.stage("a", {"x": 1}, make)
    assert "half" not in calls[0]


def test_the_old_stage_stays_until_the_new_one_is_complete(work, make):
    work.stage("a", {"x": 1}, make)
    interrupt(work, "a", {"x": 2})
    assert (work.root / "stages" / "a" / "result").exists()


def test_a_stage_killed_just_before_its_rename_is_picked_up(work, make, calls):
    folder = work.stage("a", {"x": 1}, make)
    folder.rename(folder.with_name("a.partial"))
    assert (work.stage("a", {"x": 1}, make) / "result").exists()
    assert len(calls) == 1


def test_a_stage_whose_end_was_cut_short_is_continued(work, make, calls):
    folder = work.stage("a", {"x": 1}, make)
    partial = folder.rename(folder.with_name("a.partial"))
    (partial / "stage.json").write_text('{"key": "')
    work.stage("a", {"x": 1}, make)
    assert "result" in calls[1]


def test_a_folder_that_holds_something_else_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="holds something else; choose an empty or a new one"):
        Workspace(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_refused_as_output_folder(tmp_path):
    (tmp_path / "out").write_text("precious")
    with pytest.raises(InputError, match="is a file; choose another name"):
        check_folder(tmp_path / "out")


def test_a_run_killed_while_it_made_its_folder_is_not_foreign_to_itself(tmp_path, monkeypatch):
    def killed(*args, **kwargs):
        raise Killed

    monkeypatch.setattr("pathlib.Path.write_text", killed)
    with pytest.raises(Killed):
        Workspace(tmp_path / "run")
    monkeypatch.undo()
    Workspace(tmp_path / "run")
    assert (tmp_path / "run" / MARKER).exists()


def test_a_copy_replaces_what_was_there_and_leaves_the_bookkeeping_out(work, make, tmp_path):
    source, target = work.stage("a", {}, make), tmp_path / "copy"
    target.mkdir()
    (target / "README.md").touch()
    copy_folder(source, target)
    assert [path.name for path in target.iterdir()] == ["result"]


def write_half(path):
    with whole_file(path) as scratch:
        scratch.write_text("sec")
        raise Killed


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "new" / "table.csv"
    write_atomically(path, "first")
    with pytest.raises(Killed):
        write_half(path)
    assert [(found.name, found.read_text()) for found in path.parent.iterdir()] == [("table.csv", "first")]


def test_a_folder_is_refused_where_a_file_is_written(tmp_path):
    with pytest.raises(InputError, match="is a folder; name a file"):
        write_atomically(tmp_path, "text")


def test_other_errors_of_the_system_are_not_called_a_full_disk(work):
    def fail(folder, report):
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        work.stage("a", {}, fail)


def test_a_copy_is_refused_where_it_would_replace_what_no_run_wrote(work, make, tmp_path):
    source, target = work.stage("a", {}, make), tmp_path / "copy"
    target.mkdir()
    (target / "notes.txt").touch()
    with pytest.raises(InputError, match="holds something other than a checkpoint: notes.txt"):
        copy_folder(source, target)
    assert [path.name for path in target.iterdir()] == ["notes.txt"]


def test_another_version_of_the_package_makes_stages_again(work, make, calls, monkeypatch):
    work.stage("a", {}, make)
    monkeypatch.setattr("chronomoe.stages.workspace.version", lambda package: "99.0")
    work.stage("a", {}, make)
    assert len(calls) == 2


def test_a_log_gets_one_plain_line_for_a_finished_stage(work, make):
    work.stage("a", {}, make)
    work.stage("b", {}, make)
    assert [line.split(":")[0] for line in work.console.file.getvalue().splitlines()] == ["✓ a", "✓ b"]
