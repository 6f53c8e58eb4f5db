"""Stages: folders that appear whole or not at all, and are skipped when their inputs have not changed."""

import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from chronomoe.checkpoints.writing import SCRATCH, check_parent, content, whole_folder, work_folder
from chronomoe.errors import InputError
from chronomoe.stages.faults import keep_for_itself, room
from chronomoe.stages.processes import first_process, hear, meet, tell

Report = Callable[[int, int], None]
MARKER = "chronomoe-run.json"
MADE = "made"
"""What the first process says of a stage that it makes, and does not skip."""
FORMAT = 4
"""Of what stages leave; part of their keys, as the package's version is: an upgrade makes them again."""
_NUMBERS = itertools.count()


class Workspace:
    """The folder of a run and the stages in it.

    A stage is made in ``<name>.partial`` and renamed when it is complete, so a kill at any moment leaves either
    nothing, a partial folder that the stage itself can continue from, or the finished stage. Its key is a hash of its
    inputs, those of earlier stages included: it is made again when they change and skipped when they do not.

    Raises:
        InputError: the folder holds something else, cannot be written to, or another run is at work in it.
    """

    def __init__(self, root: Path, *, console: Console | None = None) -> None:
        check_folder(root)
        self.root = root
        self.console = console or Console(stderr=True)
        self.seconds: dict[str, float] = {}
        self.name = f"{next(_NUMBERS)}/{root.name}"
        """Of this launch alone: all processes make the same workspaces, and stages in them, in the same order."""
        self._number = 0
        if not first_process():
            self.console = Console(quiet=True)
            return
        with room(root, "the run"):
            root.mkdir(parents=True, exist_ok=True)
            (root / MARKER).write_text(json.dumps({"format": 1}))  # first: a kill must not leave a foreign folder
            self._lock = keep_for_itself(root)
            (root / "stages").mkdir(exist_ok=True)

    def stage(self, name: str, inputs: Any, make: Callable[[Path, Report], None], *, together: bool = False) -> Path:
        """Return the folder of a stage, calling ``make(folder, report)`` unless it is finished already.

        Of several processes the first makes the stage and the others wait for it.

        Args:
            name: of the stage; slashes make subfolders.
            inputs: everything it depends on, as JSON.
            make: fills the folder it is given, which may hold what an interrupted attempt with the same inputs left.
            together: whether all processes make it, as trainings do; only the first may then write.

        Raises:
            InputError: the disk is full or closed, or memory is; finished stages stay.
        """
        key = _key_of(inputs)
        folder = self.root / "stages" / name
        partial = folder.with_name(folder.name + ".partial")
        self._number += 1
        signal = f"{self.name}/{self._number}"
        if not first_process():
            if hear(f"{signal}/begun") == MADE and together:
                make(partial, lambda done, total: None)
            hear(f"{signal}/done")
            return folder
        if _key(partial / "stage.json") == key:  # killed between the last write and the rename
            _move(partial, folder)
        if _key(folder / "stage.json") == key:
            self.seconds[name] = json.loads((folder / "stage.json").read_text())["seconds"]
            self.console.print(f"[dim]✓ {name}: unchanged, skipped[/dim]")
            tell(f"{signal}/begun")
            tell(f"{signal}/done")
            return folder
        if _key(partial / "started.json") != key:
            shutil.rmtree(partial, ignore_errors=True)
        for left in [*partial.rglob(f".*{SCRATCH}*")]:  # by killed saves
            shutil.rmtree(left)
        with room(self.root, f"stage {name!r}"):
            partial.mkdir(parents=True, exist_ok=True)
            (partial / "started.json").write_text(json.dumps({"key": key}))
            tell(f"{signal}/begun", MADE)
            begin = time.monotonic()
            with self._progress(name) as report:
                make(partial, report)
            seconds = time.monotonic() - begin
            (partial / "stage.json").write_text(json.dumps({"key": key, "seconds": seconds}))
            _move(partial, folder)
        tell(f"{signal}/done")
        self.seconds[name] = seconds
        self.console.print(f"[green]✓[/green] {name}: {seconds:.1f} s")
        return folder

    def publish(self, made: Path, out: Path) -> None:
        """Copy what a stage made to where the caller wants it; only the first process does."""
        if first_process():
            copy_folder(made, out)
            for left in out.parent.glob(f".{out.name}{SCRATCH}*"):  # by killed copies
                shutil.rmtree(left)

    @contextmanager
    def _progress(self, name: str) -> Iterator[Report]:
        if not self.console.is_terminal:  # where every redraw would be one more line of a log
            yield lambda done, total: None
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("time left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(name, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def check_folder(root: Path) -> None:
    """Refuse an output folder that holds something other than a run."""
    if root.exists() and not root.is_dir():
        raise InputError(f"the output folder {root} is a file; choose another name")
    if root.is_dir() and any(root.iterdir()) and not (root / MARKER).exists():
        raise InputError(f"the output folder {root} holds something else; choose an empty or a new one")


def stage_key(folder: Path | None) -> str | None:
    """Return the key of a finished stage, for the inputs of a later one; None where there is no stage."""
    return None if folder is None else str(json.loads((folder / "stage.json").read_text())["key"])


def write_atomically(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    with whole_file(path) as scratch:
        scratch.write_text(text)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path to write to, which becomes ``path`` when the block ends well and vanishes otherwise.

    Raises:
        InputError: ``path`` is a folder, or the disk is full.
    """
    check_file_out(path)
    scratch = path.with_name(f"{path.stem}.partial{path.suffix}")
    with room(path.parent, path.name):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield scratch
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder's files whole or not at all; ``whole_folder`` says what may be replaced."""
    with room(target.parent, target.name), whole_folder(target) as scratch:
        ignored = shutil.ignore_patterns("stage.json", "started.json")
        shutil.copytree(source, scratch, ignore=ignored, dirs_exist_ok=True)


def _key_of(inputs: Any) -> str:
    made_by = {"inputs": inputs, "format": FORMAT, "version": version("chronomoe")}
    return hashlib.sha256(json.dumps(made_by, sort_keys=True, default=str).encode()).hexdigest()


def _key(path: Path) -> str | None:
    if not path.exists():
        return None
    try:
        return str(json.loads(path.read_text())["key"])
    except (json.JSONDecodeError, KeyError):  # cut short by a kill
        return None


def _move(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    source.rename(target)


@contextmanager
def folder_for(out: Path, *, console: Console | None = None) -> Iterator[Workspace]:
    """Give a command the workspace in which it makes ``out``; after a failure it stays, to be resumed."""
    work = Workspace(work_folder(out), console=console)
    yield work
    meet(f"{work.name}/left")
    if first_process():
        shutil.rmtree(work.root)


def check_file_out(out: Path, *, inputs: Sequence[str | Path] = ()) -> None:
    """Refuse an output file that is an input or a folder, or whose folder cannot be written to."""
    if out.is_dir():
        raise InputError(f"{out} is a folder; name a file to write")
    check_parent(out)
    if out.exists() and any(out.samefile(path) for path in inputs if Path(path).exists()):
        raise InputError(f"{out} is also read; name another file to write")


def check_new(out: Path) -> None:
    """Refuse an output folder that is not empty, or cannot be written to.

    The first of several processes asks: when another starts, the result may be there already.
    """
    check_parent(out)
    if first_process() and out.expanduser().exists() and content(out.expanduser()):
        raise InputError(f"the output folder {out} is not empty; choose a new one")
