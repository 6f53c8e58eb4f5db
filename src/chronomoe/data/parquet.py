"""Parquet files in parts that memory can hold: streamed, or turned once into a memory-mapped table."""

import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from chronomoe.data.checks import one_line
from chronomoe.data.frames import frame_to_rows
from chronomoe.data.intake import Intake, Wish, dataset_to_series
from chronomoe.data.series import ITEM_ID, TIMESTAMP
from chronomoe.data.table import SeriesTable, is_list
from chronomoe.errors import InputError

SUFFIXES = (".parquet", ".pq")
FORMAT = 1
"""Of the tables kept in a cache: raised when rows are made of files in another way."""
BATCH_ROWS = 1 << 18
"""Rows of a long Parquet file, or their share of a file of lists, that are in memory at once."""


def layout_of_files(files: Sequence[Path]) -> Literal["lists", "long", None]:
    """Return how Parquet files can be read batch by batch: one row a series, long with real times, or not at all."""
    if any(file.suffix.lower() not in SUFFIXES or file.is_dir() for file in files):
        return None
    with _opened(files[0]) as opened:
        kinds = {field.name: field.type for field in opened.schema_arrow}
    time = kinds.get(TIMESTAMP, pa.null())
    if is_list(time):
        return "lists"
    return "long" if ITEM_ID in kinds and (pa.types.is_timestamp(time) or pa.types.is_date(time)) else None


def _opened(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file, pre_buffer=False)  # which keeps all that was read until the file is closed
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{str(file)!r} cannot be read as .parquet: {one_line(error)}") from None


def has_no_rows(file: Path) -> bool:
    """Whether a file is Parquet and empty, as parts of a table often are."""
    if file.suffix.lower() not in SUFFIXES or file.is_dir():
        return False
    with _opened(file) as opened:
        return int(opened.metadata.num_rows) == 0


def _scan(files: Sequence[Path], columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Yield about ``BATCH_ROWS`` steps at a time."""
    for file in files:
        with _opened(file) as opened:
            try:
                for batch in opened.iter_batches(batch_size=max(1, BATCH_ROWS // _steps(opened)), columns=columns):
                    yield pa.Table.from_batches([batch])
            except (OSError, pa.ArrowInvalid) as error:
                raise InputError(f"{str(file)!r} cannot be read as .parquet: {one_line(error)}") from None


def _steps(opened: pq.ParquetFile) -> int:
    """Return the values of a row, about: more than one where rows hold lists."""
    if opened.num_row_groups == 0:
        return 1
    group = opened.metadata.row_group(0)
    return max(group.column(place).num_values for place in range(group.num_columns)) // max(1, group.num_rows) or 1


def _runs(table: pa.Table) -> pa.Array:
    """Return the items of a long table, run-length encoded."""
    ids = table[ITEM_ID].combine_chunks()
    return pc.run_end_encode(ids.dictionary_decode() if pa.types.is_dictionary(ids.type) else ids)


def items_of(files: Sequence[Path]) -> Iterator[NDArray[Any]]:
    """Yield the items of long files, each once for all rows that follow each other."""
    last: object = None
    for table in _scan(files, [ITEM_ID]):
        items = _runs(table).values.to_numpy(zero_copy_only=False)
        yield items[int(items[0] == last) :]
        last = items[-1]


def scattered(files: Sequence[Path]) -> str | None:
    """Return the first item of Parquet files whose rows do not follow each other.

    Of each item eight bytes are in memory: two of millions would have to share a hash to be taken for one.
    """
    if layout_of_files(files) != "long":
        return None
    hashes = np.concatenate([np.empty(0, np.uint64), *map(pd.util.hash_array, items_of(files))])
    ordered = np.sort(hashes)
    if not (ordered[1:] == ordered[:-1]).any():
        return None
    order = np.argsort(hashes, kind="stable")
    again = order[1:][ordered[1:] == ordered[:-1]].min()
    return str(next(itertools.islice(itertools.chain.from_iterable(items_of(files)), again, None)))


def batches(files: Sequence[Path], wish: Wish) -> Iterator[pa.Table]:
    """Yield Parquet files as tables of one row a series that memory can hold.

    Of long files, whose items must not be scattered, the last item of a batch waits for the next one.
    """
    if layout_of_files(files) == "lists":
        yield from _scan(files)
        return
    waiting: list[pa.Table] = []
    for table in _scan(files):
        runs = _runs(table)
        if waiting and _runs(waiting[-1]).values[0] != runs.values[0]:
            yield _rows(waiting, wish)
            waiting = []
        if len(runs.values) > 1:
            last = runs.run_ends[-2].as_py()
            yield _rows([*waiting, table.slice(0, last)], wish)
            waiting = []
            table = table.slice(last)
        waiting.append(table)
    if waiting:
        yield _rows(waiting, wish)


def _rows(long: Sequence[pa.Table], wish: Wish) -> pa.Table:
    try:
        table = pa.concat_tables(long, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(f"every part of a table must have the types of the first one: {one_line(error)}") from None
    return frame_to_rows(table.to_pandas(ignore_metadata=True), wish)


def mapped(files: Sequence[Path], wish: Wish, cache: Path) -> SeriesTable:
    """Turn Parquet files into one memory-mapped table of one row a series, or take the one made before.

    Raises:
        InputError: a check fails, or the rows of an item do not stand together.
    """
    made = cache / f"{files[0].stem}-{content_key(files, FORMAT, wish.target, wish.known, BATCH_ROWS)}.arrow"
    if not made.exists():
        cache.mkdir(parents=True, exist_ok=True)
        if (item := scattered(files)) is not None:
            raise InputError(
                f"the rows of an item must stand together to be streamed, item {item!r} appears again after others; "
                f"sort the file by {ITEM_ID!r} and {TIMESTAMP!r}, or read it into memory, without a cache"
            )
        rows = batches(files, wish)
        first = next(rows, None)
        if first is None:
            raise InputError("the data set is empty, it has no rows")
        distinct = layout_of_files(files) == "long"  # as scattered has found
        intake = Intake(wish._replace(trusted=True), distinct=distinct)  # values are checked when it is opened
        part = made.with_suffix(f".{os.getpid()}.partial")
        try:
            with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, first.schema) as writer:
                for table in itertools.chain([first], rows):
                    intake.check(table)
                    writer.write_table(table.select(first.column_names).cast(first.schema))
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
