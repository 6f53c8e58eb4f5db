"""Parquet files in parts that memory can hold: streamed, or turned once into a memory-mapped table."""

import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from chronomoe.data.checks import one_line
from chronomoe.data.frames import frame_to_rows
from chronomoe.data.intake import Intake, Wish, dataset_to_series
from chronomoe.data.series import ITEM_ID, TIMESTAMP
from chronomoe.data.table import SeriesTable, is_list
from chronomoe.errors import InputError

SUFFIXES = (".parquet", ".pq")
BATCH_ROWS = 1 << 18
"""Rows of a long Parquet file, or their share of a file of lists, that are in memory at once."""


def parquet_schema(path: Path) -> pa.Schema:
    """Return the columns of a Parquet file without reading their values.

    Raises:
        InputError: not a Parquet file.
    """
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{str(path)!r} cannot be read as .parquet: {one_line(error)}") from None


def has_lists(files: Sequence[Path]) -> bool:
    """Return whether files are Parquet with one row a series."""
    kind = _time_type(files)
    return kind is not None and is_list(kind)


def can_stream(files: Sequence[Path]) -> bool:
    """Return whether files can be read batch by batch: Parquet, long with real times or one row a series."""
    kind = _time_type(files)
    if kind is None or is_list(kind):
        return kind is not None
    return ITEM_ID in parquet_schema(files[0]).names and (pa.types.is_timestamp(kind) or pa.types.is_date(kind))


def _time_type(files: Sequence[Path]) -> pa.DataType | None:
    if any(file.suffix.lower() not in SUFFIXES or file.is_dir() for file in files):
        return None
    schema = parquet_schema(files[0])
    return schema.field(TIMESTAMP).type if TIMESTAMP in schema.names else None


def stands_together(files: Sequence[Path]) -> bool:
    """Return whether the rows of every item of Parquet files follow each other."""
    if has_lists(files):
        return True
    seen: set[int] = set()
    current: object = None
    for file in files:
        with pq.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=BATCH_ROWS, columns=[ITEM_ID]):
                ids = _plain(pa.Table.from_batches([batch])[ITEM_ID])
                runs = pc.run_end_encode(ids.combine_chunks()).values.to_pylist()
                for item_id in runs[1:] if runs and runs[0] == current else runs:
                    if hash(item_id) in seen:
                        return False
                    seen.add(hash(item_id))
                current = runs[-1] if runs else current
    return True


def batches(files: Sequence[Path]) -> Iterator[pa.Table]:
    """Yield Parquet files in parts that memory can hold: long ones as whole items, the last one of a batch kept back.

    Raises:
        InputError: a file is damaged.
    """
    lists = has_lists(files)
    waiting: list[pa.Table] = []
    for file in files:
        try:
            with pq.ParquetFile(file) as opened:
                for batch in opened.iter_batches(batch_size=max(1, BATCH_ROWS // _steps(opened.metadata))):
                    table = pa.Table.from_batches([batch])
                    if lists:
                        yield table
                        continue
                    ids = _plain(table[ITEM_ID])
                    if waiting and _plain(waiting[-1][ITEM_ID])[-1].as_py() != ids[0].as_py():
                        yield pa.concat_tables(waiting)
                        waiting = []
                    other = np.flatnonzero(ids.to_numpy() != ids[-1].as_py())
                    last = int(other[-1]) + 1 if len(other) else 0
                    if last:
                        yield pa.concat_tables([*waiting, table.slice(0, last)])
                        waiting = []
                    waiting.append(table.slice(last))
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError(f"{str(file)!r} cannot be read as .parquet: {one_line(error)}") from None
    if waiting:
        yield pa.concat_tables(waiting)


def _steps(meta: pq.FileMetaData) -> int:
    """Return the values of a row, about: more than one where rows hold lists."""
    if meta.num_row_groups == 0:
        return 1
    group = meta.row_group(0)
    return max(group.column(place).num_values for place in range(group.num_columns)) // max(1, group.num_rows) or 1


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def batch_to_rows(table: pa.Table, wish: Wish) -> pa.Table:
    """Return a batch as a table of one row a series, which it may be already."""
    kind = table.schema.field(TIMESTAMP).type
    return table if is_list(kind) else frame_to_rows(table.to_pandas(ignore_metadata=True), wish)


def mapped(files: Sequence[Path], wish: Wish, cache: Path) -> SeriesTable:
    """Turn Parquet files into one memory-mapped table of one row a series, or take the one made before.

    Raises:
        InputError: a check fails, or the rows of an item do not stand together.
    """
    key = content_key(files, wish.target, wish.known, BATCH_ROWS)
    made = cache / f"{files[0].stem}-{key}.arrow"
    if not made.exists():
        cache.mkdir(parents=True, exist_ok=True)
        part = made.with_suffix(f".{os.getpid()}.partial")
        intake = Intake(
            wish._replace(trusted=True),  # checked when it is opened
            again="the rows of an item must stand together to be streamed, item {!r} appears again after others; sort "
            f"the file by {ITEM_ID!r} and {TIMESTAMP!r}, or read it into memory, without a cache",
        )
        try:
            rows = (batch_to_rows(table, wish) for table in batches(files))
            first = next(rows, None)
            if first is None:
                raise InputError("the data set is empty, it has no rows")
            with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, first.schema) as writer:
                for table in itertools.chain([first], rows):
                    intake.check(table)
                    writer.write_table(table.cast(first.schema))
            part.replace(made)
        finally:
            part.unlink(missing_ok=True)
    return dataset_to_series(
        datasets.Dataset.from_file(str(made)), target=wish.target, known_covariates=wish.known, freq=wish.freq
    )


def content_key(files: Sequence[Path], *facts: object) -> str:
    """Return a hash of what files hold, whatever their names and times, and of further facts."""
    key = hashlib.blake2b(repr(facts).encode(), digest_size=12)
    for file in files:
        for inside in sorted(file.rglob("*")) if file.is_dir() else [file]:
            if inside.is_file():
                with inside.open("rb") as opened:
                    while block := opened.read(1 << 22):
                        key.update(block)
    return key.hexdigest()
