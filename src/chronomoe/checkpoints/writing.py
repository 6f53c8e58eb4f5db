"""Writing a checkpoint whole or not at all, and uploading it."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import PreTrainedModel

from chronomoe.checkpoints.bands import write_bands
from chronomoe.checkpoints.card import model_card
from chronomoe.checkpoints.checking import FORMAT
from chronomoe.checkpoints.finding import GRAPH
from chronomoe.errors import InputError
from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.models.sparse.upcycling import SparseChronos2Model

CHECKPOINT_FILES = (
    "*.safetensors",
    f"{GRAPH}*",
    "pytorch_model*.bin",
    "adapter_model.bin",
    "*.index.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "README.md",
    "LICENSE*",
)
"""All that a checkpoint's folder may hold to be replaced."""
PUSH_OPTIONS = (
    "push_to_hub",
    "repo_id",
    "token",
    "private",
    "revision",
    "create_pr",
    "commit_message",
    "commit_description",
)
"""Arguments of ``save_pretrained`` that are for the hub."""
OF_THE_VOLUME = "lost+found"
SCRATCH, FORMER, WORK = ".partial-", ".former-", ".work"
CANNOT_BE_RENAMED = {errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS}


def check_parent(path: Path) -> None:
    """Check that a file or folder can be created, or written to if it exists.

    Raises:
        InputError: what it would lie in is a file, or may not be written to.
    """
    path = path.expanduser().absolute()
    place = path if path.is_dir() else next(folder for folder in path.parents if folder.exists())
    if not place.is_dir():
        raise InputError(f"nothing can be written to {str(path)!r}: {str(place)!r} is a file; choose another place")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"nothing can be written to {str(path)!r}: no permission to write to {str(place)!r}")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write to, which becomes ``folder`` when the block ends well and vanishes otherwise.

    A checkpoint that was there is replaced; if that fails, it is put back. A reader sees the old one or the new one,
    but for folders that cannot be renamed (a mount point, the current folder, one whose parent is read-only): there
    the files are replaced one by one.

    Raises:
        InputError: ``folder`` is a file, holds anything but a checkpoint, or may not be written to.
    """
    folder = folder.expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"a checkpoint is saved to a folder, {str(folder)!r} is a file; choose another name")
    for path in content(folder):
        if path.is_dir() or not any(fnmatch(path.name, pattern) for pattern in CHECKPOINT_FILES):
            raise InputError(
                f"{str(folder)!r} holds something other than a checkpoint: {path.name}; choose a new folder"
            )
    check_parent(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    name = uuid.uuid4().hex[:8]
    inside = _must_stay(folder)
    scratch = folder / f"{SCRATCH}{name}" if inside else folder.with_name(f".{folder.name}{SCRATCH}{name}")
    scratch.mkdir()
    try:
        yield scratch
        if inside or not _put_in_place(scratch, folder):
            _replace_content(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_checkpoint(
    model: PreTrainedModel, folder: Path, *args: Any, sections: Mapping[str, str] | None = None, **kwargs: Any
) -> None:
    """Save weights, configuration and card whole or not at all: see ``ChronoMoEPipeline.save_pretrained``."""
    if isinstance(model, DistilledMoE | SparseChronos2Model):
        model.config.chronomoe_format = FORMAT
    with whole_folder(folder) as scratch:
        model.save_pretrained(scratch, *args, **kwargs)
        write_bands(model, scratch)
        (scratch / "README.md").write_text(model_card(model, name=folder.name, sections=sections), encoding="utf-8")


def content(folder: Path) -> list[Path]:
    """List what a folder holds, except the volume's own folder and what a killed save left."""
    passed_over = (OF_THE_VOLUME, f"{SCRATCH}*", f"{FORMER}*", WORK)
    if folder.is_file():
        return [folder]
    found = sorted(folder.iterdir()) if folder.exists() else []
    return [path for path in found if not any(fnmatch(path.name, pattern) for pattern in passed_over)]


def _must_stay(folder: Path) -> bool:
    """Whether a folder cannot be renamed, or must not be, because this process works in it."""
    if not folder.exists():
        return False
    return os.path.ismount(folder) or _works_in(folder) or not os.access(folder.parent, os.W_OK | os.X_OK)


def work_folder(folder: Path) -> Path:
    """Return the folder for intermediate work: beside ``folder``, or inside it if its parent is read-only."""
    folder = folder.expanduser().resolve()
    open_parent = not folder.exists() or os.access(folder.parent, os.W_OK | os.X_OK)
    return folder.with_name(f"{folder.name}{WORK}") if open_parent else folder / WORK


def _works_in(folder: Path) -> bool:
    try:
        return Path.cwd().is_relative_to(folder)
    except FileNotFoundError:  # the current folder was deleted
        return False


def _put_in_place(scratch: Path, folder: Path) -> bool:
    """Rename ``scratch`` to ``folder``, whose former content is deleted; False where ``folder`` cannot be renamed."""
    former = scratch.with_name(scratch.name.replace(SCRATCH, FORMER))
    with ExitStack() as undo:
        if folder.exists():
            try:
                folder.rename(former)
            except OSError as error:  # a bind mount looks like any other folder
                if error.errno not in CANNOT_BE_RENAMED:
                    raise
                return False
            undo.callback(former.rename, folder)
        scratch.rename(folder)
        undo.pop_all()
    shutil.rmtree(former, ignore_errors=True)
    return True


def _replace_content(scratch: Path, folder: Path) -> None:
    """Replace the files of ``folder``, which stays where it is; put them back if that fails."""
    former = folder / f"{FORMER}{scratch.name.rpartition('-')[2]}"
    former.mkdir()
    with ExitStack() as undo:
        undo.callback(former.rmdir)
        for path in content(folder):
            path.rename(former / path.name)
            undo.callback((former / path.name).rename, path)
        for path in sorted(scratch.iterdir(), reverse=True):  # the configuration after the weights
            undo.callback((folder / path.name).unlink, missing_ok=True)
            shutil.move(path, folder / path.name)
        undo.pop_all()
    for left in (*folder.glob(f"{SCRATCH}*"), *folder.glob(f"{FORMER}*")):  # of killed saves, too
        shutil.rmtree(left, ignore_errors=True)


def push_folder(
    folder: Path,
    *,
    repo_id: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    **commit: Any,
) -> None:
    """Upload a finished checkpoint to the hub in one commit, to a new repository if need be.

    Args:
        folder: the checkpoint.
        repo_id: ``owner/name`` or a name in one's own namespace; that of the folder when None.
        token: of the hub; the one that is logged in when None.
        private: whether a new repository is.
        revision: branch.
        **commit: ``create_pr``, ``commit_message`` and ``commit_description``, as in ``HfApi.upload_folder``.
    """
    api = HfApi(token=token)
    repo = api.create_repo(repo_id or folder.name, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    message = {"commit_message": f"Upload {folder.name}"} | {key: value for key, value in commit.items() if value}
    api.upload_folder(
        repo_id=repo, folder_path=folder, revision=revision, allow_patterns=list(CHECKPOINT_FILES), **message
    )
