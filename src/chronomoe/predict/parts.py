"""A folder of parts in, a folder of forecasts out: here, or by the workers of a Ray cluster."""

import io
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Generator, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console

from chronomoe.checkpoints.writing import check_parent
from chronomoe.data.checks import listed
from chronomoe.data.files import parts_of
from chronomoe.data.parquet import has_no_rows, items_of
from chronomoe.errors import InputError
from chronomoe.predict.files import Forecaster, key_of, progress_of
from chronomoe.stages.cluster import check_engine, spread
from chronomoe.stages.faults import keep_for_itself, room
from chronomoe.stages.workspace import write_atomically

MANIFEST = "_chronomoe.json"
"""What all parts of a folder were made with; readers of tables pass over names that begin so."""
UNFINISHED = "_unfinished"
DONE = "_SUCCESS"


class _Made(NamedTuple):
    """A part that is finished."""

    name: str
    rows: int
    items: NDArray[np.uint64]
    """Of each series, a hash of its id."""


@dataclass(frozen=True)
class _Part:
    """Forecasts one part at a time: what a worker is given, see ``stages.cluster.Task``."""

    forecaster: Forecaster
    parts: dict[str, Path]
    facts: dict[str, Any]
    """What the forecasts of every worker must depend on."""
    out: Path

    def prepare(self) -> None:
        """Load the model, and refuse another one than that of the others."""
        if self.forecaster.facts != self.facts:
            raise InputError(
                f"every worker must load the same model, {self.forecaster.model!r} on {socket.gethostname()} has other "
                "weights than where the command was started; give all machines one folder, or one revision"
            )

    def __call__(self, name: str) -> _Made:
        """Forecast a part, unless it is finished; it is written under a name of its own and then renamed."""
        file, made = self.parts[name], self.out / f"{name}.parquet"
        try:
            if has_no_rows(file):
                made.unlink(missing_ok=True)
                return _Made(name, 0, np.empty(0, np.uint64))
            if key_of(made) != self.forecaster.key(file):
                self._make(file, made)
        except InputError as error:
            raise InputError(f"part {name!r}: {error}") from None
        return _Made(name, pq.read_metadata(made).num_rows, np.concatenate(_hashes(made)))

    def _make(self, file: Path, made: Path) -> None:
        prefix = f"{made.stem}.{socket.gethostname()}.{os.getpid()}."
        own = Path(tempfile.mkdtemp(prefix=prefix, dir=self.out / UNFINISHED))
        try:
            self.forecaster.write(file, own / made.name, console=Console(file=io.StringIO()))
            (own / made.name).replace(made)
        finally:
            shutil.rmtree(own, ignore_errors=True)


def predict_parts(
    forecaster: Forecaster,
    folder: Path,
    out: Path,
    *,
    engine: str = "local",
    workers: int | None = None,
    console: Console | None = None,
) -> int:
    """Forecast every file of a folder on its own, and return the number of rows of all.

    Each that has rows becomes ``<name>.parquet`` in ``out``, whole or not at all. It carries a hash of its input, the
    model and the options, so that the same call continues after a kill, and makes again only what has changed.

    Args:
        forecaster: the model and what is asked of it.
        folder: parts in any format that ``read_series`` reads; all rows of a series lie in one of them.
        out: a new folder, or one of an earlier call with the same model and options. ``_SUCCESS`` lies there when all
            parts do.
        engine: "local", one part after the other in this process, or "ray", see ``stages.cluster.spread``.
        workers: of Ray, each with one core and the model; one a core of the cluster when None.
        console: where progress is shown, if it is a terminal; stderr by default.

    Raises:
        InputError: ``out`` holds something else, a series has rows in several parts, a part breaks a rule of
            ``Forecaster.write``, or the cluster one of ``spread``.
    """
    check_engine(engine, workers)
    folder, out = folder.absolute(), out.absolute()
    parts = parts_of(folder)
    _check_out(out, folder, parts)
    gpu = engine == "ray" and forecaster.device.startswith("cuda")
    if engine == "ray":  # workers have another current folder, and load the model themselves
        facts = (replace(forecaster, device="cpu") if gpu else forecaster).facts
        model, future = Path(forecaster.model), forecaster.future
        forecaster = replace(
            forecaster,
            model=str(model.absolute()) if model.is_dir() else forecaster.model,
            future=None if future is None else future.absolute(),
        )
    else:
        facts = forecaster.facts
    task = _Part(forecaster, parts, facts, out)
    found: Iterable[tuple[int, _Made]] = enumerate(map(task, parts))
    if engine == "ray":
        found = spread(task, list(parts), workers=workers, gpu=gpu)
    with room(out, out.name), ExitStack() as held:
        out.mkdir(parents=True, exist_ok=True)
        held.callback(keep_for_itself(out).release)
        _keep_facts(out / MANIFEST, facts)
        (out / DONE).unlink(missing_ok=True)
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)  # of a killed call
        (out / UNFINISHED).mkdir(exist_ok=True)
        held.callback(shutil.rmtree, out / UNFINISHED, ignore_errors=True)
        progress = held.enter_context(progress_of("parts forecast", console, total=len(parts)))
        if isinstance(found, Generator):
            held.enter_context(closing(found))  # ends the workers
        seen, rows = _Seen(out), 0
        for _, made in found:
            seen.add(made)
            rows += made.rows
            progress.advance(progress.task_ids[0])
        seen.check()
        (out / DONE).touch()
    return rows


def _check_out(out: Path, folder: Path, parts: dict[str, Path]) -> None:
    if out.is_file() or out.suffix in (".csv", ".parquet"):
        raise InputError(f"forecasts of parts are written to a folder, got the file {str(out)!r}; name a folder")
    if out.exists() and out.samefile(folder):
        raise InputError(f"{str(out)!r} is also read; name another folder to write")
    check_parent(out)
    if not out.exists():
        return
    there = [entry.name for entry in out.iterdir() if not entry.name.startswith(("_", "."))]
    if there and not (out / MANIFEST).exists():
        raise InputError(f"the output folder {out} holds something else; choose an empty or a new one")
    if strange := sorted({*there} - {f"{name}.parquet" for name in parts}):
        raise InputError(
            f"the output folder {out} holds forecasts of parts that {folder} has not: {listed(strange)}; "
            "delete them, or choose a new folder"
        )


def _keep_facts(manifest: Path, facts: dict[str, Any]) -> None:
    """Write down what parts are made with, or refuse another model and other options than those before."""
    try:
        before = json.loads(manifest.read_text()) if manifest.exists() else None
    except json.JSONDecodeError:
        before = {}
    if before is None:
        write_atomically(manifest, json.dumps(facts))
    elif before != facts:
        other = [name for name, value in facts.items() if before.get(name) != value]
        raise InputError(
            f"{manifest.parent} holds forecasts of another model or with other options: "
            + ", ".join(f"{name} is {before.get(name)!r}, not {facts[name]!r}" for name in other)
            + "; delete it, or choose a new folder"
        )


def _hashes(made: Path) -> list[NDArray[np.uint64]]:
    return [np.empty(0, np.uint64), *map(pd.util.hash_array, items_of([made]))]


class _Seen:
    """Finds a series whose rows lie in several parts: forecast from a share of its past, it would be wrong.

    Of each series eight bytes are in memory. They are sorted when they have doubled, so that parts cut by time are
    found after two of them, at the cost of a few sorts in all.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.known = np.empty(0, np.uint64)
        self.pending: list[_Made] = []
        self.names: list[str] = []

    def add(self, made: _Made) -> None:
        self.pending.append(made)
        self.names += [made.name] if made.rows else []
        if sum(len(part.items) for part in self.pending) >= len(self.known):
            self.check()

    def check(self) -> None:
        self.known = np.sort(np.concatenate([self.known, *(part.items for part in self.pending)]))
        self.pending = []
        for twice in self.known[1:][self.known[1:] == self.known[:-1]]:
            holding = [name for name in self.names if twice in np.concatenate(_hashes(self.out / f"{name}.parquet"))]
            shared = set.intersection(*(self._items(name) for name in holding))
            if len(holding) > 1 and shared:  # and not two ids of one hash
                raise InputError(
                    f"all rows of a series must lie in one part, those of item {min(shared)!r} lie in "
                    f"{listed(holding)}; write the parts anew, split by item_id and not by time, or give different "
                    "series different ids"
                )

    def _items(self, name: str) -> set[str]:
        return {str(item) for items in items_of([self.out / f"{name}.parquet"]) for item in items}
