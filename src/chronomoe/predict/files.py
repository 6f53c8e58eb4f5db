"""A file in, forecasts out, in a stream."""

import functools
import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from chronomoe.data.files import read_table, stream_series
from chronomoe.data.forecasts import check_asked, forecast, known_names, read_future, values_ahead
from chronomoe.data.parquet import content_key
from chronomoe.data.series import TARGET
from chronomoe.data.soft_targets import revision
from chronomoe.data.table import SeriesTable
from chronomoe.errors import InputError
from chronomoe.models.folded import computing_in
from chronomoe.models.precision import Precision
from chronomoe.pipeline import ChronoMoEPipeline
from chronomoe.stages.faults import room
from chronomoe.stages.processes import check_one_process, choose_device, place_model
from chronomoe.stages.workspace import FORMAT, check_file_out, whole_file

DTYPES = get_args(Precision)
_OF_A_PLACE = ("_name_or_path", "transformers_version")
"""What the configuration of one model may differ in between machines."""
KEY = b"chronomoe"
"""Of the metadata of a Parquet file of forecasts: what they were made of, hashed."""


@dataclass(frozen=True)
class Forecaster:
    """A model and what is asked of it.

    The model is loaded once, when the first file has been found readable.

    Raises:
        InputError: an option is not one of those accepted.
    """

    model: str
    """Hub id, folder, s3:// URL or "tiny"."""
    _: KW_ONLY
    horizon: int
    """Steps to forecast."""
    future: Path | None = None
    """Future values of known covariates, long, with the same item ids; in memory at once. Of a folder, the file that is
    called like the one of past values."""
    target: Sequence[str] | None = None
    """Column to forecast, or several."""
    freq: str | None = None
    """Pandas alias of one step; inferred when None."""
    levels: Sequence[float] = (0.1, 0.5, 0.9)
    """Quantile levels."""
    batch_size: int = 256
    """Rows forecast at once."""
    device: str = "auto"
    """See ``choose_device``."""
    dtype: str = "float32"
    """What the model computes in: "float32", "bfloat16", or "auto", which is bfloat16 where a trial says that this
    processor is faster in it."""
    experts: bool = False
    """Add the column ``expert``, which names the one with the largest gate."""

    def __post_init__(self) -> None:
        check_one_process("predict")
        check_asked(self.horizon, self.levels)
        if self.batch_size < 1:
            raise InputError(f"batch_size must be at least 1 row, got {self.batch_size}")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    @functools.cached_property
    def pipeline(self) -> ChronoMoEPipeline:
        """The model, where it computes."""
        found = ChronoMoEPipeline.from_pretrained(self.model, dtype="auto" if self.dtype == "auto" else "float32")
        if self.dtype == "bfloat16" and not isinstance(found.model, torch.nn.Module):
            raise InputError(
                f"the type of an exported model was settled by its export, got {self.dtype}; use float32 or auto"
            )
        place_model(found.model, self.device)
        return found

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """What forecasts depend on besides the files, as JSON."""
        model = self.pipeline.model
        bands = getattr(model, "bands", None)
        config = {name: value for name, value in model.config.to_dict().items() if name not in _OF_A_PLACE}
        return {
            "format": FORMAT,
            "model": revision(model),
            "config": content_key([], json.dumps(config, sort_keys=True, default=str)),  # routing is in no weight
            "bands": None if bands is None else bands.factor.tolist(),
            "dtype": self.dtype,
            "experts": self.experts,
            "horizon": self.horizon,
            "target": None if self.target is None else list(self.target),
            "freq": self.freq,
            "levels": list(self.levels),
        }

    def key(self, file: Path) -> str:
        """Return a hash of all that the forecasts of a file depend on."""
        return content_key(self._inputs(file), self.facts)

    def _inputs(self, file: Path) -> list[Path]:
        future = self.future
        if future is None:
            return [file]
        return [file, future / file.name if future.is_dir() else future]

    def write(self, file: Path, out: Path, *, console: Console | None = None) -> int:
        """Forecast every series of a file, write a CSV or Parquet file and return its number of rows.

        Series are read, forecast and written part by part, so that a Parquet file may be larger than memory; while one
        part is forecast, the next one is read and the one before it is written. Finished parts lie in ``<out>.parts``
        until all are there: after a kill, the same call goes on with the first one that is missing.

        Args:
            file: past values in any format that ``read_series`` reads.
            out: ``.csv`` or ``.parquet``; there whole or not at all.
            console: where progress is shown, if it is a terminal; stderr by default.

        Raises:
            InputError: a file cannot be read or written, or what is in it breaks a rule of ``frame_to_series``.
        """
        if out.suffix not in (".csv", ".parquet"):
            raise InputError(f"forecasts are written to a .csv or .parquet file, got {out}")
        choose_device(self.device)  # refuse one that is not there before anything is read
        check_file_out(out, inputs=self._inputs(file))
        ahead = None if self.future is None else read_table(self._inputs(file)[1])
        series = stream_series(
            file,
            target=list(self.target) if self.target else TARGET,
            known_covariates=() if ahead is None else known_names(ahead),
            freq=self.freq,
        )
        first = next(series, None)
        if first is None:
            raise InputError(f"{str(file)!r} has no series with a value")
        if ahead is not None:
            ahead = read_future(ahead, only=str(first.facts.item_ids[0]) if len(first) == 1 else None)
            values_ahead(ahead, first, horizon=self.horizon)  # refuse before the model is loaded
        first.horizon(self.horizon)
        scratch, key = out.with_name(f"{out.name}.parts"), self.key(file)
        parts: list[Path] = []
        with room(out.parent, out.name):
            mark = scratch / "key"
            if not mark.exists() or mark.read_text() != key:  # unless the same forecast was interrupted
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir(parents=True)
                mark.write_text(key)
            with progress_of("series forecast", console) as progress:
                try:
                    with ThreadPoolExecutor(1) as writer:
                        written = writer.submit(lambda: None)
                        for number, table in enumerate(_read_ahead(itertools.chain([first], series))):
                            part = scratch / f"{number:06d}.parquet"
                            parts.append(part)
                            if not part.exists():
                                found = self._forecast(table, ahead)
                                written.result()
                                written = writer.submit(_write, found, part)
                            progress.advance(progress.task_ids[0], len(table))
                        written.result()
                except InputError:  # the caller will change the file, or the options, and with them the key
                    shutil.rmtree(scratch)
                    raise
        with whole_file(out) as writing:
            rows = _join(parts, writing, key)
        shutil.rmtree(scratch)
        return rows

    def _forecast(self, table: SeriesTable, ahead: pd.DataFrame | None) -> pd.DataFrame:
        with computing_in(torch.bfloat16 if self.dtype == "bfloat16" else torch.float32):
            return forecast(
                self.pipeline.predict_quantiles,
                table,
                horizon=self.horizon,
                levels=self.levels,
                ahead=None if ahead is None else values_ahead(ahead, table, horizon=self.horizon),
                context_length=self.pipeline.model_context_length,
                routing=self.pipeline.routing if self.experts else None,
                batch_size=self.batch_size,
            )


def _read_ahead(parts: Iterator[SeriesTable]) -> Iterator[SeriesTable]:
    """Yield parts; the next one is read while the caller works on the one before."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, parts, None)
        while (part := coming.result()) is not None:
            coming = reader.submit(next, parts, None)
            yield part
            del part  # or it would be in memory while the one after next is read


def _write(found: pd.DataFrame, part: Path) -> None:
    found.to_parquet(part.with_suffix(".writing"), index=False)
    part.with_suffix(".writing").replace(part)


def progress_of(what: str, console: Console | None = None, *, total: int | None = None) -> Progress:
    """Return a bar of one task, shown if ``console``, stderr by default, is a terminal."""
    console = console or Console(stderr=True)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    progress.add_task(what, total=total)
    return progress


def key_of(made: Path) -> str | None:
    """Return the key that a Parquet file of forecasts was written with; None where there is no whole one."""
    try:
        return str((pq.read_schema(made).metadata or {}).get(KEY, b"").decode())
    except (OSError, pa.ArrowInvalid):
        return None


def _join(parts: Sequence[Path], out: Path, key: str) -> int:
    """Write parts as one file, one of them in memory at once, and return its number of rows."""
    rows = 0
    if out.suffix == ".csv":
        for part in parts:
            frame = pd.read_parquet(part)
            frame.to_csv(out, index=False, mode="a" if rows else "w", header=not rows, float_format="%.10g")
            rows += len(frame)
        return rows
    schema: pa.Schema = pq.read_schema(parts[0])
    with pq.ParquetWriter(out, schema.with_metadata({**(schema.metadata or {}), KEY: key})) as writer:
        for part in parts:
            table = pq.read_table(part).cast(schema)
            writer.write_table(table)
            rows += len(table)
    return rows
