"""What can stop the work in a folder, each in one line that says what to do; what was finished stays."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from chronomoe.errors import InputError

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_ROOM_WORDS = ("no space left", "file too large", "file write failed", "unexpected pos")
"""How safetensors and ``torch.save`` say it."""
NO_RIGHT = {errno.EACCES, errno.EPERM, errno.EROFS}
NO_MEMORY_WORDS = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")
"""How torch says it of a processor's memory."""
LOCK = ".lock"


@contextmanager
def room(folder: Path, what: str) -> Iterator[None]:
    """Turn a full or closed disk and a lack of memory, in whatever words a library reports it, into one clear error.

    Args:
        folder: that is written to.
        what: is made, such as ``stage 'router'``.

    Raises:
        InputError: one of these happened.
    """
    try:
        yield
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
        reason = _reason(error, folder)
        if reason is None:
            raise
        raise InputError(f"{what} {reason}") from error


def _reason(error: BaseException, folder: Path) -> str | None:
    number, words = getattr(error, "errno", None), str(error).lower()
    if number in NO_ROOM or any(sign in words for sign in NO_ROOM_WORDS):
        return (
            f"could not be written, the disk that holds {folder} is full; what was finished stays: "
            "free some room and run the same command again"
        )
    if number in NO_RIGHT and _lies_in(getattr(error, "filename", None), folder):
        return (
            f"could not be written, there is no right to write in {folder}; what was finished stays: "
            "make it writable and run the same command again, or choose another folder"
        )
    if out_of_memory(error):
        return (
            "ran out of memory; what was finished stays: free some and run the same command again, "
            "or lower batch_size, context_length or the size of the student"
        )
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error, in whatever words a library reports it, is a lack of memory."""
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    return memory or (isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in NO_MEMORY_WORDS))


def _lies_in(path: str | None, folder: Path) -> bool:
    """Whether an error is about something in ``folder``, or says of nothing what it is about."""
    return path is None or Path(path).absolute().is_relative_to(folder.absolute())


def keep_for_itself(folder: Path) -> FileLock:
    """Keep other processes out of a folder as long as what is returned lives; a kill ends it, too.

    Raises:
        InputError: another process is at work there.
    """
    lock = FileLock(folder / LOCK, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"another run is at work in {folder}; wait for its end, or choose another output folder"
        ) from None
    return lock
