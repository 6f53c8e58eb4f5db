"""A file in, forecasts out, in a stream."""

import itertools
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

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


def predict_file(
    model: str,
    file: Path,
    *,
    horizon: int,
    out: Path,
    future: Path | None = None,
    target: Sequence[str] | None = None,
    freq: str | None = None,
    levels: Sequence[float] = (0.1, 0.5, 0.9),
    batch_size: int = 256,
    device: str = "auto",
    dtype: str = "float32",
    experts: bool = False,
    console: Console | None = None,
) -> int:
    """Forecast every series of a file, write a CSV or Parquet file and return its number of rows.

    Series are read, forecast and written part by part, so that a Parquet file may be larger than memory; while one part
    is forecast, the next one is read and the one before it is written. Finished parts lie in ``<out>.parts`` until all
    are there: after a kill, the same call goes on with the first one that is missing.

    Args:
        model: hub id, folder, s3:// URL or "tiny".
        file: past values in any format that ``read_series`` reads.
        horizon: steps to forecast.
        out: ``.csv`` or ``.parquet``; there whole or not at all.
        future: future values of known covariates, long, with the same item ids; in memory at once.
        target: column to forecast, or several.
        freq: pandas alias of one step; inferred when None.
        levels: quantile levels.
        batch_size: rows forecast at once.
        device: see ``choose_device``.
        dtype: what the model computes in: "float32", "bfloat16", or "auto", which is bfloat16 where a trial says that
            this processor is faster in it.
        experts: add the column ``expert``, which names the one with the largest gate.
        console: where progress is shown, if it is a terminal; stderr by default.

    Raises:
        InputError: a file cannot be read or written, or what is in it breaks a rule of ``frame_to_series``.
    """
    if out.suffix not in (".csv", ".parquet"):
        raise InputError(f"forecasts are written to a .csv or .parquet file, got {out}")
    check_one_process("predict")
    choose_device(device)  # refuse one that is not there before anything is read
    check_asked(horizon, levels)
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1 row, got {batch_size}")
    files = [file] if future is None else [file, future]
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    check_file_out(out, inputs=files)
    ahead = None if future is None else read_table(future)
    series = stream_series(
        file,
        target=list(target) if target else TARGET,
        known_covariates=() if ahead is None else known_names(ahead),
        freq=freq,
    )
    first = next(series, None)
    if first is None:
        raise InputError(f"{str(file)!r} has no series with a value")
    if ahead is not None:
        ahead = read_future(ahead, only=str(first.facts.item_ids[0]) if len(first) == 1 else None)
        values_ahead(ahead, first, horizon=horizon)  # refuse before the model is loaded
    first.horizon(horizon)
    pipeline = ChronoMoEPipeline.from_pretrained(model, dtype="auto" if dtype == "auto" else "float32")
    if dtype == "bfloat16" and not isinstance(pipeline.model, torch.nn.Module):
        raise InputError(f"the type of an exported model was settled by its export, got {dtype}; use float32 or auto")
    place_model(pipeline.model, device)
    scratch = out.with_name(f"{out.name}.parts")
    bands = getattr(pipeline.model, "bands", None)
    made_by = (revision(pipeline.model), None if bands is None else bands.factor.tolist(), dtype, experts)
    key = content_key(files, FORMAT, made_by, horizon, target, freq, list(levels))
    parts: list[Path] = []
    with room(out.parent, out.name):
        mark = scratch / "key"
        if not mark.exists() or mark.read_text() != key:  # unless the same forecast was interrupted
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            mark.write_text(key)
        with _progress(console) as progress:
            task = progress.add_task("series forecast", total=None)
            try:
                with ThreadPoolExecutor(1) as writer:
                    written = writer.submit(lambda: None)
                    for number, table in enumerate(_read_ahead(itertools.chain([first], series))):
                        part = scratch / f"{number:06d}.parquet"
                        parts.append(part)
                        if not part.exists():
                            with computing_in(torch.bfloat16 if dtype == "bfloat16" else torch.float32):
                                found = forecast(
                                    pipeline.predict_quantiles,
                                    table,
                                    horizon=horizon,
                                    levels=levels,
                                    ahead=None if ahead is None else values_ahead(ahead, table, horizon=horizon),
                                    context_length=pipeline.model_context_length,
                                    routing=pipeline.routing if experts else None,
                                    batch_size=batch_size,
                                )
                            written.result()
                            written = writer.submit(_write, found, part)
                        progress.advance(task, len(table))
                    written.result()
            except InputError:  # the caller will change the file, or the options, and with them the key
                shutil.rmtree(scratch)
                raise
    with whole_file(out) as writing:
        rows = _join(parts, writing)
    shutil.rmtree(scratch)
    return rows


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


def _progress(console: Console | None) -> Progress:
    console = console or Console(stderr=True)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _join(parts: Sequence[Path], out: Path) -> int:
    """Write parts as one file, one of them in memory at once, and return its number of rows."""
    rows = 0
    if out.suffix == ".csv":
        for part in parts:
            frame = pd.read_parquet(part)
            frame.to_csv(out, index=False, mode="a" if rows else "w", header=not rows, float_format="%.10g")
            rows += len(frame)
        return rows
    schema: pa.Schema = pq.read_schema(parts[0])
    with pq.ParquetWriter(out, schema) as writer:
        for part in parts:
            table = pq.read_table(part).cast(schema)
            writer.write_table(table)
            rows += len(table)
    return rows
