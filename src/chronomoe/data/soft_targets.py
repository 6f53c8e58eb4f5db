"""Soft targets: a teacher's normalised quantiles for a batch, asked live or read from a store computed once."""

import functools
import hashlib
import itertools
import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from chronomoe.data.fingerprint import fingerprints
from chronomoe.data.windows import Batch, Window, collate, digest, model_inputs, to_device
from chronomoe.errors import InputError
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.models.folded import computing_in

BYTES = np.dtype(np.int64).itemsize
FORMAT = 1
"""Of a store's files."""
FILES = ("quantiles", "rows", "digests")
CHECKSUMS = "checksums"
"""CRC-32 of each window's soft targets; stores of earlier versions have none."""


@runtime_checkable
class SoftTargets(Protocol):
    """Where a trainer gets the teacher's quantiles of a batch from."""

    def __call__(self, batch: Batch) -> Float[Tensor, "row quantile horizon"]:
        """Return normalised quantiles for the rows of a batch that ``collate`` made."""
        ...


class LiveTeacher:
    """Asks the teacher for every batch."""

    def __init__(self, teacher: ExactChronos2Model) -> None:
        self.teacher = teacher.eval()

    @functools.cached_property
    def revision(self) -> str:
        """Short hash of the teacher's weights."""
        return revision(self.teacher)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Float[Tensor, "row quantile horizon"]:
        """Return normalised quantiles for the rows of a batch."""
        self.teacher.to(batch["context"].device)
        preds: Tensor = self.teacher(**model_inputs(batch)).normalized_preds
        return preds[..., : batch["future_target"].shape[1]].float()


def revision(model: torch.nn.Module) -> str:
    """Return a short hash of a model's weights."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(name.encode())
        total.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


@dataclass(frozen=True)
class Labelling:
    """Asks a teacher, where it is, about one batch after the other; may be pickled, to do so elsewhere."""

    teacher: ExactChronos2Model
    compute_dtype: torch.dtype

    def prepare(self) -> None:
        """Do nothing: the teacher is there."""

    def __call__(self, batch: Batch) -> tuple[bytes, ...]:
        """Return what the files of a store hold of a batch that ``collate`` made, in the order of ``FILES``."""
        with computing_in(self.compute_dtype):
            quantiles = LiveTeacher(self.teacher)(to_device(batch, self.teacher.device)).to(torch.bfloat16).cpu()
        rows = torch.bincount(batch["group_ids"])
        return tuple(part.numpy().tobytes() for part in (quantiles.view(torch.int16), rows, batch["digest"]))


class _Batches(Sequence[Batch]):
    """Windows in batches, each cut when it is asked for."""

    def __init__(self, windows: Dataset[Window], start: int, stop: int, *, size: int, patch_size: int) -> None:
        self.windows, self.patch_size = windows, patch_size
        self.parts = [range(first, min(first + size, stop)) for first in range(start, stop, size)]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: Any) -> Any:
        return collate([self.windows[place] for place in self.parts[index]], patch_size=self.patch_size)


class SoftTargetStore:
    """Soft targets of a set of windows in one memory-mapped bf16 file, so that training needs no teacher in memory.

    Every window is stored with a digest of its context, covariates and group composition; a batch whose windows have
    other digests is refused, so a store is never read for windows it was not computed from. What was stored of a window
    has a checksum, so that bits which changed on disk are not learned from.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "quantiles").exists():
            raise InputError(
                f"{folder} holds no soft-target store; make one with SoftTargetStore.build in a new folder"
            )
        self.folder = folder
        try:
            self.meta = json.loads((folder / "store.json").read_text())
            self._check_format()
            self.first = np.cumsum([0, *np.fromfile(folder / "rows", dtype=np.int64)])
            self.digests = np.fromfile(folder / "digests", dtype=np.int64)
            self.checksums = np.fromfile(sums, dtype=np.uint32) if (sums := folder / CHECKSUMS).exists() else None
            stored = np.memmap(folder / "quantiles", dtype=np.int16, mode="r")
            self.values = stored.reshape(int(self.first[-1]), self.meta["levels"], self.meta["horizon"])
            whole = len(self.digests) == len(self.first) - 1 == self.meta["windows"]
            whole &= self.checksums is None or len(self.checksums) == len(self.digests)
        except InputError:
            raise
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise self._damaged(" ".join(str(error).split())) from error
        if not whole:
            raise self._damaged("it holds fewer windows than it says")

    def _check_format(self) -> None:
        found = self.meta.get("format")
        if found != FORMAT:
            newer = isinstance(found, int) and found > FORMAT
            remedy = "pip install -U chronomoe" if newer else "delete it and build it again"
            raise InputError(
                f"the soft-target store {self.folder} is of format {found!r}, this version reads {FORMAT}; {remedy}"
            )

    def _damaged(self, reason: str) -> InputError:
        return InputError(f"the soft-target store {self.folder} is damaged: {reason}; delete it and build it again")

    @property
    def revision(self) -> str:
        """Short hash of the teacher's weights."""
        return str(self.meta["teacher"])

    def __call__(self, batch: Batch) -> Float[Tensor, "row quantile horizon"]:
        """Return normalised quantiles for the rows of a batch.

        Raises:
            InputError: a window is not the one that was stored under its number, or what was stored has changed.
        """
        windows = batch["window"].cpu().numpy()
        if windows.max() >= len(self.digests) or (self.digests[windows] != batch["digest"].cpu().numpy()).any():
            raise InputError(
                f"the soft-target store {self.folder} was computed from other windows (series, cutoffs, covariates or "
                "grouping differ); build it again"
            )
        stored = [self.values[self.first[window] : self.first[window + 1]] for window in windows]
        if self.checksums is not None:
            for window, values in zip(windows.tolist(), stored, strict=True):
                if zlib.crc32(values.tobytes()) != self.checksums[window]:
                    raise self._damaged(f"the soft targets of window {window} are not what was written")
        return torch.from_numpy(np.concatenate(stored)).view(torch.bfloat16).float().to(batch["context"].device)

    @classmethod
    def build(
        cls,
        folder: Path,
        teacher: ExactChronos2Model,
        windows: Dataset[Window],
        *,
        batch_size: int = 128,
        compute_dtype: torch.dtype = torch.float32,
        progress: Callable[[int, int], None] = lambda done, total: None,
        engine: Callable[[Labelling, Sequence[Batch]], Iterable[tuple[bytes, ...]]] = map,
    ) -> "SoftTargetStore":
        """Ask the teacher, where it is, once for all windows, in their order, one batch in memory at a time.

        ``engine`` does what ``map`` does, elsewhere perhaps; the store is the same.

        An interrupted build continues where it was; a finished one is reused. The teacher's products are
        taken in ``compute_dtype`` (see :func:`chronomoe.models.folded.computing_in`), which a store records.

        Raises:
            InputError: ``folder`` holds soft targets of another teacher or type, or of other windows.
        """
        count, example = len(windows), windows[0]  # type: ignore[arg-type]
        wanted = {
            "format": FORMAT,
            "teacher": revision(teacher),
            "dtype": str(teacher.dtype),
            "compute_dtype": str(compute_dtype),
            "levels": teacher.num_quantiles,
            "data": fingerprints(windows),
            "windows": count,
            "horizon": example.target.shape[1],
            "first_digest": digest(example),
        }
        if (folder / "store.json").exists():
            store = cls(folder)
            store.meta.setdefault("compute_dtype", str(torch.float32))  # of stores that do not say
            if store.meta != wanted:
                other = [name for name, value in wanted.items() if store.meta.get(name) != value]
                raise InputError(
                    f"{folder} holds soft targets of another teacher or of other windows: "
                    + ", ".join(f"{name} is {store.meta.get(name)!r}, not {wanted[name]!r}" for name in other)
                    + "; delete it, or build in a new folder"
                )
            return store
        scratch = folder.with_name(folder.name + ".partial")
        started = scratch / "started.json"
        if not started.exists() or started.read_text() != json.dumps(wanted):
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            started.write_text(json.dumps(wanted))
        # Written one after the other, not through memory maps, which end the process where the disk is full.
        with ExitStack() as files:
            values, rows, digests = (files.enter_context((scratch / name).open("ab")) for name in FILES)
            size = teacher.num_quantiles * example.target.shape[1] * torch.bfloat16.itemsize  # of one row
            stops = size * np.cumsum([0, *np.fromfile(rows.name, dtype=np.int64)[: digests.tell() // BYTES]])
            done = int(np.searchsorted(stops, values.tell(), side="right")) - 1  # windows that are there whole
            done -= done % batch_size  # the same batches as without an interruption
            for file, end in ((values, int(stops[done])), (rows, done * BYTES), (digests, done * BYTES)):
                file.truncate(end)
            asked = _Batches(windows, done, count, size=batch_size, patch_size=teacher.chronos_config.output_patch_size)
            for part, found in zip(asked.parts, engine(Labelling(teacher, compute_dtype), asked), strict=True):
                for file, content in zip((values, rows, digests), found, strict=True):
                    file.write(content)
                for file in (values, rows, digests):
                    file.flush()
                progress(part.stop, count)
        stored = np.memmap(scratch / "quantiles", dtype=np.uint8, mode="r")
        ends = size * np.cumsum([0, *np.fromfile(scratch / "rows", dtype=np.int64)])
        sums = [zlib.crc32(stored[start:end].tobytes()) for start, end in itertools.pairwise(ends)]
        (scratch / CHECKSUMS).write_bytes(np.array(sums, dtype=np.uint32).tobytes())
        (scratch / "store.json").write_text(json.dumps(wanted))
        scratch.rename(folder)
        return cls(folder)
