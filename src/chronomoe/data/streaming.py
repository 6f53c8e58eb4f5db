"""Long Parquet files larger than memory, turned into memory-mapped tables of one row a series."""

import hashlib
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from chronomoe.data.arrow import check_number_type
from chronomoe.data.checks import check_columns
from chronomoe.data.series import ITEM_ID, TIMESTAMP
from chronomoe.errors import InputError

_BATCH_ROWS = 1 << 18


def long_parquet_to_rows(path: Path, *, cache_dir: Path) -> datasets.Dataset:
    """Turn a long Parquet file into a memory-mapped table of one row a series, one batch at a time.

    The rows of an item must stand together. The file made is kept in ``cache_dir`` and used again while ``path`` stays
    as it is. Memory: a batch and the longest series.

    Raises:
        InputError: columns are missing, hold text, or an item's rows do not stand together.
    """
    state = path.stat()
    key = hashlib.sha256(f"{path.resolve()}|{state.st_size}|{state.st_mtime_ns}".encode()).hexdigest()[:16]
    made = cache_dir / f"{path.stem}-{key}.arrow"
    if not made.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        part = made.with_suffix(f".{os.getpid()}.partial")
        try:
            _write_rows(path, part)
            part.replace(made)
        finally:
            part.unlink(missing_ok=True)
    return datasets.Dataset.from_file(str(made))


def _write_rows(path: Path, out: Path) -> None:
    with pq.ParquetFile(path) as file:
        names = [field.name for field in file.schema_arrow if not field.name.startswith("__index_level_")]
        check_columns([ITEM_ID, TIMESTAMP], names)
        kind = file.schema_arrow.field(TIMESTAMP).type
        if not pa.types.is_timestamp(kind) and not pa.types.is_date(kind):
            raise InputError(f"column {TIMESTAMP!r} must hold times to be streamed, got {kind}; pass cache_dir=None")
        values = [name for name in names if name not in {ITEM_ID, TIMESTAMP}]
        for name in values:
            check_number_type(name, file.schema_arrow.field(name).type)
        row = pa.schema(
            [(ITEM_ID, pa.string()), (TIMESTAMP, pa.timestamp("ns"))] + [(name, pa.float32()) for name in values]
        )
        rows = pa.schema([(f.name, f.type if f.name == ITEM_ID else pa.list_(f.type)) for f in row])
        finished: set[str] = set()
        waiting: list[pa.Table] = []  # rows of the item at the end of the last batch
        with pa.OSFile(str(out), "wb") as sink, pa.ipc.new_stream(sink, rows) as writer:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=names):
                table = pa.Table.from_batches([batch]).select(row.names)
                if table[ITEM_ID].null_count:
                    raise InputError(f"column {ITEM_ID!r} must name an item in every row, got an empty one")
                table = table.cast(row, safe=False)
                item_id = table[ITEM_ID].to_numpy()
                if waiting and waiting[0][ITEM_ID][0].as_py() != item_id[0]:
                    _write_items(pa.concat_tables(waiting), writer, finished)
                    waiting = []
                last = int(np.flatnonzero(item_id != item_id[-1])[-1]) + 1 if (item_id != item_id[-1]).any() else 0
                if last:
                    _write_items(pa.concat_tables([*waiting, table.slice(0, last)]), writer, finished)
                    waiting = []
                waiting.append(table.slice(last))
            if waiting:
                _write_items(pa.concat_tables(waiting), writer, finished)


def _write_items(table: pa.Table, writer: pa.ipc.RecordBatchStreamWriter, finished: set[str]) -> None:
    """Write whole items, one row each."""
    item_id = table[ITEM_ID].to_numpy()
    bounds = np.concatenate([[0], np.flatnonzero(item_id[1:] != item_id[:-1]) + 1, [len(item_id)]])
    for name in item_id[bounds[:-1]]:
        if name in finished:
            raise InputError(
                f"the rows of an item must stand together to be streamed, item {name!r} appears again after others; "
                f"sort the file by {ITEM_ID!r} and {TIMESTAMP!r}, or pass cache_dir=None to read it into memory"
            )
        finished.add(name)
    offsets = pa.array(bounds, type=pa.int32())
    columns = [pa.array(item_id[bounds[:-1]], type=pa.string())]
    for name in table.column_names[1:]:
        columns.append(pa.ListArray.from_arrays(offsets, table[name].combine_chunks()))
    writer.write_table(pa.table(columns, names=table.column_names))
