"""Series from files and folders: CSV, Parquet, `datasets` folders, GluonTS JSON lines, tables in part files."""

import hashlib
import itertools
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from chronomoe.data.checks import check_names, listed, one_line
from chronomoe.data.intake import (
    Intake,
    Wish,
    dataset_to_series,
    frame_to_rows,
    take_in,
)
from chronomoe.data.json_lines import METADATA, json_lines_to_rows
from chronomoe.data.series import ITEM_ID, TARGET, TIMESTAMP
from chronomoe.data.table import SeriesTable, is_list
from chronomoe.errors import InputError

CSV_SUFFIXES = (".csv", ".csv.gz")
PARQUET_SUFFIXES = (".parquet", ".pq")
JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
SUFFIXES = CSV_SUFFIXES + PARQUET_SUFFIXES + JSON_SUFFIXES
BATCH_ROWS = 1 << 18
"""Rows of a long Parquet file, or their share of a file of lists, that are in memory at once."""
_OTHER_SEPARATORS = (";", "\t", "|")
_SAVED = ("dataset_info.json", "dataset_dict.json")
_TABLE_MARKS = ("_SUCCESS", "_metadata", "_common_metadata")
_PART = r"(part|chunk)[-._]?\d+.*|\d+|.*-\d+-of-\d+"


def suffix_of(path: Path) -> str:
    """Return which of ``SUFFIXES`` a path ends with, or an empty string."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")


def check_file(path: Path) -> None:
    """Check that a file or folder is there.

    Raises:
        InputError: it is not; the message names the nearest existing folder.
    """
    if not path.exists():
        parent = next(folder for folder in (*path.absolute().parents,) if folder.exists())
        raise InputError(f"no file or folder {str(path)!r}; the nearest folder that exists is {str(parent)!r}")


def read_series(
    path: str | os.PathLike[str],
    *,
    target: str | Sequence[str] = TARGET,
    known_covariates: Sequence[str] = (),
    freq: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> SeriesTable:
    """Read series from a file or folder in any format that we know.

    - a long or wide CSV or Parquet file (``frame_to_series`` says what it must hold);
    - a Parquet file with one row a series in the fev and Chronos layout (``Intake``), and a folder written by
      ``datasets.Dataset.save_to_disk``, which is memory-mapped: a series is read when asked for;
    - GluonTS JSON lines (``json_lines_to_rows``);
    - a folder that is one table in part files (``part-00000.parquet``), as Spark, Dask and Arrow write them;
    - a folder of any of these; item ids are then ``<file name without suffix>/<item_id>``.

    Args:
        path: File or folder.
        target: Column to forecast, or several for multivariate series.
        known_covariates: Columns whose future is known at forecast time.
        freq: Pandas alias of one step; inferred when None.
        cache_dir: Where Parquet files that memory cannot hold are turned, batch by batch, into a memory-mapped one,
            which is used again while their content stays the same. By default the folder that the environment
            variable CHRONOMOE_CACHE names; without either, all but `datasets` folders is read into memory.

    Raises:
        InputError: nothing readable is there, or what is there breaks a rule; the message names it.
    """
    path, wish = Path(path), Wish.of(target, known_covariates, freq)
    cache = cache_dir or os.environ.get("CHRONOMOE_CACHE")
    tables = _tables(path)
    parts = {name: _read(files, wish, cache) for name, files in tables.items()}
    return next(iter(parts.values())) if len(parts) == 1 else SeriesTable.join(parts)


def stream_series(
    path: Path, *, target: str | Sequence[str] = TARGET, known_covariates: Sequence[str] = (), freq: str | None = None
) -> Iterator[SeriesTable]:
    """Yield the series of a file or folder in parts of about ``BATCH_ROWS`` steps, always the same ones.

    Parquet files whose items have their rows together are read part by part; all others are read into memory first.

    Raises:
        InputError: as ``read_series``.
    """
    wish = Wish.of(target, known_covariates, freq)
    tables = list(_tables(path).values())
    if len(tables) == 1 and can_stream(tables[0]) and _stands_together(tables[0]):
        intake = Intake(wish)
        for batch in batches(tables[0]):
            rows = batch_to_rows(batch, wish)
            facts = intake.check(rows)
            if len(facts.item_ids) and intake.layout is not None:
                yield SeriesTable([rows], facts, intake.layout)
        intake.report()
        return
    whole = read_series(path, target=target, known_covariates=known_covariates, freq=freq)
    steps = np.cumsum(whole.lengths)
    first = 0
    while first < len(whole):
        before = int(steps[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(steps, before + BATCH_ROWS, side="right")))
        yield whole[first:last]
        first = last


def _stands_together(files: Sequence[Path]) -> bool:
    """Return whether the rows of every item of Parquet files follow each other."""
    if _has_lists(files):
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


def _tables(path: Path) -> dict[str, list[Path]]:
    """Return the files of each table that a path holds, by the name that item ids begin with where there are several.

    Raises:
        InputError: there is none.
    """
    check_file(path)
    if not path.is_dir() and not suffix_of(path):
        raise _refuse_suffix(path, SUFFIXES)
    if not path.is_dir() or _is_saved(path):
        return {path.name: [path]}
    files = _entries(path)
    if len(files) == 1 or _is_table(path, files):
        return {path.name: files}
    parts = {file.name.removesuffix(suffix_of(file)): [file] for file in files}
    if len(parts) < len(files):
        raise InputError(f"files of a folder must differ in more than their suffix, got {listed(map(str, files))}")
    return parts


def _read(files: Sequence[Path], wish: Wish, cache: str | os.PathLike[str] | None) -> SeriesTable:
    """Read files of one format as one table."""
    if _is_saved(files[0]):
        return dataset_to_series(load_saved(files[0]), target=wish.target, known_covariates=wish.known, freq=wish.freq)
    if suffix_of(files[0]) in JSON_SUFFIXES:
        found = [json_lines_to_rows(file, wish) for file in files]
        return take_in([table for table, _ in found], found[0][1])
    if cache is not None and can_stream(files):
        return _mapped(files, wish, Path(cache))
    if _has_lists(files):
        return take_in(batches(files), wish)
    frames = [read_table(file) for file in files]
    return take_in([frame_to_rows(frames[0] if len(frames) == 1 else pd.concat(frames), wish)], wish)


def can_stream(files: Sequence[Path]) -> bool:
    """Return whether files can be read batch by batch: Parquet, long with real times or one row a series."""
    if any(suffix_of(file) not in PARQUET_SUFFIXES for file in files):
        return False
    schema = parquet_schema(files[0])
    if not {ITEM_ID, TIMESTAMP} <= set(schema.names):
        return _has_lists(files)
    kind = schema.field(TIMESTAMP).type
    return bool(is_list(kind) or pa.types.is_timestamp(kind) or pa.types.is_date(kind))


def batches(files: Sequence[Path]) -> Iterator[pa.Table]:
    """Yield Parquet files in parts that memory can hold: long ones as whole items, the last one of a batch kept back.

    Raises:
        InputError: a file is damaged.
    """
    lists = _has_lists(files)
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


def _mapped(files: Sequence[Path], wish: Wish, cache: Path) -> SeriesTable:
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


def read_table(path: Path) -> pd.DataFrame:
    """Read a CSV or Parquet file as it is.

    Raises:
        InputError: the file is missing, empty, damaged or of another format.
    """
    check_file(path)
    suffix = suffix_of(path)
    try:
        if suffix in CSV_SUFFIXES:
            return _read_csv(path)
        if suffix in PARQUET_SUFFIXES:
            return pd.read_parquet(path)
    except pd.errors.EmptyDataError:
        raise InputError(f"{str(path)!r} is empty") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r} cannot be read as {suffix}: {one_line(error)}; save it in UTF-8") from None
    except (pd.errors.ParserError, EOFError, OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{str(path)!r} cannot be read as {suffix}: {one_line(error)}") from None
    raise _refuse_suffix(path, CSV_SUFFIXES + PARQUET_SUFFIXES)


def _read_csv(path: Path) -> pd.DataFrame:
    """Read a CSV file whose first row names every column once.

    ``item_id`` stays text as written: "007" keeps its zeros and "NA" is a name.
    """
    header = pd.read_csv(path, header=None, nrows=1, dtype=str).iloc[0].dropna().tolist()
    if len(header) == 1 and (found := [sign for sign in _OTHER_SEPARATORS if sign in header[0]]):
        raise InputError(
            f"columns of a CSV file are separated by commas, {str(path)!r} seems to have {found[0]!r} instead; save it "
            f"again, for example pd.read_csv(path, sep={found[0]!r}, decimal=',').to_csv(path, index=False), without "
            "decimal=',' where its numbers have a point"
        )
    check_names(header)
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            # Without index_col=False, rows that end in a comma would move every value one column to the left.
            return pd.read_csv(path, converters={ITEM_ID: str}, low_memory=False, index_col=False)
        except pd.errors.ParserWarning:
            raise InputError(
                f"every row of a CSV file must have as many values as the first one has names, {len(header)}; "
                f"a row of {str(path)!r} has more"
            ) from None


def parquet_schema(path: Path) -> pa.Schema:
    """Return the columns of a Parquet file without reading their values.

    Raises:
        InputError: not a Parquet file.
    """
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{str(path)!r} cannot be read as .parquet: {one_line(error)}") from None


def load_saved(folder: Path) -> datasets.Dataset:
    """Open a folder that ``Dataset.save_to_disk`` wrote; of several splits, the one named ``train`` or the only one.

    Raises:
        InputError: it holds several splits and none is ``train``, or it is damaged.
    """
    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, pa.ArrowInvalid) as error:
        raise InputError(f"{str(folder)!r} cannot be read as a `datasets` folder: {one_line(error)}") from None
    return only_split(found, str(folder)) if isinstance(found, datasets.DatasetDict) else found


def only_split(found: Mapping[str, datasets.Dataset], name: str) -> datasets.Dataset:
    """Return the split ``train``, or the only one.

    Raises:
        InputError: there are several and none is ``train``.
    """
    if "train" in found:
        return found["train"]
    if len(found) == 1:
        return next(iter(found.values()))
    raise InputError(f"{name!r} must have a split 'train' or only one, got {listed(found)}")


def _refuse_suffix(path: Path, accepted: Sequence[str]) -> InputError:
    return InputError(f"the format of a file is told by its suffix ({', '.join(accepted)}), got {str(path)!r}")


def _is_saved(folder: Path) -> bool:
    return folder.is_dir() and any((folder / name).is_file() for name in _SAVED)


def _has_lists(files: Sequence[Path]) -> bool:
    """Return whether files are Parquet with one row a series."""
    if any(not path.is_file() or suffix_of(path) not in PARQUET_SUFFIXES for path in files):
        return False
    schema = parquet_schema(files[0])
    return TIMESTAMP in schema.names and is_list(schema.field(TIMESTAMP).type)


def _is_table(folder: Path, files: Sequence[Path]) -> bool:
    """Return whether the files of a folder are the parts of one table, rather than data sets of their own."""
    if len({suffix_of(file) for file in files}) > 1 or not suffix_of(files[0]):
        return False
    marked = suffix_of(folder) or any((folder / mark).exists() for mark in _TABLE_MARKS)
    stems = [file.name.removesuffix(suffix_of(file)) for file in files]
    return bool(marked or _has_lists(files) or all(re.fullmatch(_PART, stem) for stem in stems))


def _entries(folder: Path) -> list[Path]:
    """Return the readable files and `datasets` folders of a folder, in order of name, numbers by value."""
    inside = sorted(
        folder.iterdir(),
        key=lambda entry: [
            (len(word), word) if word.isdigit() else (0, word) for word in re.split(r"(\d+)", entry.name)
        ],
    )
    files = [
        entry
        for entry in inside
        if not entry.name.startswith((".", "_"))
        and ((entry.is_file() and suffix_of(entry) and entry.name != METADATA) or _is_saved(entry))
    ]
    if not files:
        raise InputError(
            f"folder {str(folder)!r} must hold files in a format that we know ({', '.join(SUFFIXES)}), "
            f"got {listed(entry.name for entry in inside) or 'nothing'}"
        )
    return files
