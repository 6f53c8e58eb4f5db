"""Soft targets: a teacher's normalised quantiles for a batch, asked live or read from a store computed once."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from chronomoe.data.windows import Batch, Window, collate, digest, model_inputs, to_device
from chronomoe.errors import InputError
from chronomoe.models.chronos2 import ExactChronos2Model

WRITTEN_AT_ONCE = 1 << 24  # bytes


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


@dataclass(frozen=True, kw_only=True)
class StoreKey:
    """What the numbers in a store depend on besides the windows themselves."""

    teacher: str
    """Revision of the teacher's weights."""
    dtype: str
    """Type that the teacher computed in."""
    windows: int
    """Number of windows."""
    horizon: int
    """Steps of each."""


class SoftTargetStore:
    """Soft targets of a set of windows in one memory-mapped bf16 file, so that training needs no teacher in memory.

    Every window is stored with a digest of its context, covariates and group composition; a batch whose windows have
    other digests is refused, so a store is never read for windows it was not computed from.
    """

    def __init__(self, folder: Path) -> None:
        manifest = folder / "store.json"
        if not manifest.exists():
            raise InputError(f"{folder} holds no soft-target store; make one with SoftTargetStore.build")
        self.folder = folder
        self.meta = json.loads(manifest.read_text())
        self.first = np.load(folder / "first.npy", mmap_mode="r")
        self.digests = np.load(folder / "digest.npy", mmap_mode="r")
        self.values = np.load(folder / "quantiles.npy", mmap_mode="r")

    def __call__(self, batch: Batch) -> Float[Tensor, "row quantile horizon"]:
        """Return normalised quantiles for the rows of a batch.

        Raises:
            InputError: a window is not the one that was stored under its number.
        """
        windows = batch["window"].cpu().numpy()
        if windows.max() >= len(self.digests) or (self.digests[windows] != batch["digest"].cpu().numpy()).any():
            raise InputError(
                f"the soft-target store {self.folder} was computed from other windows (series, cutoffs, covariates or "
                "grouping differ); build it again"
            )
        rows = np.concatenate([np.arange(self.first[window], self.first[window + 1]) for window in windows])
        stored = torch.from_numpy(self.values[rows].astype(np.int16)).view(torch.bfloat16)
        return stored.float().to(batch["context"].device)

    @classmethod
    def build(
        cls,
        folder: Path,
        teacher: ExactChronos2Model,
        windows: Dataset[Window],
        *,
        batch_size: int = 128,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> "SoftTargetStore":
        """Ask the teacher, where it is, once for all windows, in their order, one batch in memory at a time.

        An interrupted build continues where it was; a finished one is reused.

        Raises:
            InputError: ``folder`` holds soft targets of another teacher or of other windows.
        """
        count, example = len(windows), windows[0]  # type: ignore[arg-type]
        horizon = example.target.shape[1]
        key = StoreKey(teacher=revision(teacher), dtype=str(teacher.dtype), windows=count, horizon=horizon)
        wanted = {**vars(key), "first_digest": digest(example)}
        if (folder / "store.json").exists():
            store = cls(folder)
            if store.meta != wanted:
                raise InputError(f"{folder} holds soft targets of another teacher or of other windows; delete it")
            return store
        scratch = folder.with_name(folder.name + ".partial")
        started = scratch / "started.json"
        if not started.exists() or started.read_text() != json.dumps(wanted):
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            sizes = [len(windows[index].context) for index in range(count)]
            first = np.concatenate([[0], np.cumsum(sizes)])
            np.save(scratch / "first.npy", first)
            shape = (int(first[-1]), teacher.num_quantiles, horizon)
            _write_zeros(scratch / "quantiles.npy", dtype=np.dtype(np.int16), shape=shape)
            _write_zeros(scratch / "digest.npy", dtype=np.dtype(np.int64), shape=(count,))
            (scratch / "done").write_text("0")
            started.write_text(json.dumps(wanted))
        first = np.load(scratch / "first.npy")
        values = np.load(scratch / "quantiles.npy", mmap_mode="r+")
        digests = np.load(scratch / "digest.npy", mmap_mode="r+")
        live = LiveTeacher(teacher)
        patch_size = teacher.chronos_config.output_patch_size
        for start in range(int((scratch / "done").read_text() or 0), count, batch_size):
            stop = min(start + batch_size, count)
            batch = collate([windows[index] for index in range(start, stop)], patch_size=patch_size)
            quantiles = live(to_device(batch, teacher.device)).to(torch.bfloat16).cpu()
            values[first[start] : first[stop]] = quantiles.view(torch.int16).numpy()
            digests[start:stop] = batch["digest"].numpy()
            values.flush()
            digests.flush()
            (scratch / "done").write_text(str(stop))
            progress(stop, count)
        (scratch / "store.json").write_text(json.dumps(wanted))
        scratch.rename(folder)
        return cls(folder)


def _write_zeros(path: Path, *, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Write every block now: where the disk is full, writing to a memory-mapped hole would end the process."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    left = math.prod(shape) * dtype.itemsize
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        while left > 0:
            left -= file.write(bytes(min(left, WRITTEN_AT_ONCE)))
