"""Series from files and folders: CSV, Parquet, `datasets` folders, GluonTS JSON lines, tables in part files."""

import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa

from chronomoe.data import parquet
from chronomoe.data.checks import check_names, listed, one_line
from chronomoe.data.frames import frame_to_rows
from chronomoe.data.intake import Intake, Wish, dataset_to_series, take_in
from chronomoe.data.json_lines import METADATA, json_lines_to_rows
from chronomoe.data.parquet import batches, layout_of_files, mapped, scattered
from chronomoe.data.series import ITEM_ID, TARGET
from chronomoe.data.table import SeriesTable
from chronomoe.errors import InputError

CSV_SUFFIXES = (".csv", ".csv.gz")
JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
SUFFIXES = CSV_SUFFIXES + parquet.SUFFIXES + JSON_SUFFIXES
_OTHER_SEPARATORS = (";", "\t", "|")
_SAVED = ("dataset_info.json", "dataset_dict.json")
_TABLE_MARKS = ("_SUCCESS", "_metadata", "_common_metadata")
_PART = r"(part|chunk)[-._]?\d+.*|\d+|.*-\d+-of-\d+"


def suffix_of(path: Path) -> str:
    """Return which of ``SUFFIXES`` a path ends with, or an empty string."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")


def check_file(path: Path) -> None:
    """Refuse a file or folder that is not there; the message names the nearest folder that is."""
    if not path.exists():
        parent = next(folder for folder in path.absolute().parents if folder.exists())
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
    """Yield the series of a file or folder in parts of about ``parquet.BATCH_ROWS`` steps, always the same ones.

    Parquet files whose items have their rows together are read part by part; all others are read into memory first.

    Raises:
        InputError: as ``read_series``.
    """
    wish = Wish.of(target, known_covariates, freq)
    tables = list(_tables(path).values())
    if len(tables) == 1 and layout_of_files(tables[0]) and scattered(tables[0]) is None:
        intake = Intake(wish, distinct=layout_of_files(tables[0]) == "long")
        for rows in batches(tables[0], wish):
            facts = intake.check(rows)
            if len(facts.item_ids) and intake.layout is not None:
                yield SeriesTable([rows], facts, intake.layout)
        intake.report()
        return
    whole = read_series(path, target=target, known_covariates=known_covariates, freq=freq)
    part = np.cumsum(whole.facts.lengths) // parquet.BATCH_ROWS
    for number in np.unique(part):
        yield whole.take(np.flatnonzero(part == number))


def _tables(path: Path) -> dict[str, list[Path]]:
    """Return the files of each table that a path holds, by the name that its item ids begin with beside others."""
    check_file(path)
    if not path.is_dir() and not suffix_of(path):
        raise _refuse_suffix(path, SUFFIXES)
    if not path.is_dir() or _is_saved(path):
        return {path.name: [path]}
    files = _entries(path)
    if len(files) == 1 or _is_table(path, files):
        return {path.name: files}
    return {name: [file] for name, file in _named(files).items()}


def parts_of(folder: Path) -> dict[str, Path]:
    """Return the files of a folder, in order, by their names without suffix.

    Raises:
        InputError: there is no such folder, or it holds no files that ``read_series`` reads.
    """
    check_file(folder)
    if not folder.is_dir():
        raise InputError(f"parts lie in a folder, got the file {str(folder)!r}")
    return _named(_entries(folder))


def _named(files: Sequence[Path]) -> dict[str, Path]:
    parts = {file.name.removesuffix(suffix_of(file)): file for file in files}
    if len(parts) < len(files):
        raise InputError(f"files of a folder must differ in more than their suffix, got {listed(map(str, files))}")
    return parts


def _read(files: Sequence[Path], wish: Wish, cache: str | os.PathLike[str] | None) -> SeriesTable:
    """Read files of one format as one table."""
    if _is_saved(files[0]):
        return dataset_to_series(_load_saved(files[0]), target=wish.target, known_covariates=wish.known, freq=wish.freq)
    if suffix_of(files[0]) in JSON_SUFFIXES:
        found = [json_lines_to_rows(file, wish) for file in files]
        return take_in([table for table, _ in found], found[0][1])
    layout = layout_of_files(files)
    if cache is not None and layout:
        return mapped(files, wish, Path(cache))
    if layout == "lists":
        return take_in(batches(files, wish), wish)
    frames = [read_table(file) for file in files]
    for file, frame in zip(files, frames, strict=True):
        if set(frame.columns) != set(frames[0].columns):
            raise InputError(
                "every part of a table must have the columns of the first one, which are "
                f"{listed(frames[0].columns)}, got {listed(frame.columns)} in {str(file)!r}"
            )
    return take_in([frame_to_rows(frames[0] if len(frames) == 1 else pd.concat(frames), wish)], wish)


def read_table(path: Path) -> pd.DataFrame:
    """Read a CSV or Parquet file as it is.

    Raises:
        InputError: the file is missing, empty, damaged or of another format.
    """
    check_file(path)
    suffix = suffix_of(path)
    if suffix not in CSV_SUFFIXES + parquet.SUFFIXES:
        raise _refuse_suffix(path, CSV_SUFFIXES + parquet.SUFFIXES)
    try:
        return _read_csv(path) if suffix in CSV_SUFFIXES else pd.read_parquet(path)
    except pd.errors.EmptyDataError:
        raise InputError(f"{str(path)!r} is empty") from None
    except (UnicodeDecodeError, pd.errors.ParserError, EOFError, OSError, pa.ArrowInvalid) as error:
        remedy = "; save it in UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise InputError(f"{str(path)!r} cannot be read as {suffix}: {one_line(error)}{remedy}") from None


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


def _load_saved(folder: Path) -> datasets.Dataset:
    """Open a folder that ``Dataset.save_to_disk`` wrote."""
    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, pa.ArrowInvalid) as error:
        raise InputError(f"{str(folder)!r} cannot be read as a `datasets` folder: {one_line(error)}") from None
    return only_split(found, str(folder)) if isinstance(found, datasets.DatasetDict) else found


def only_split(found: Mapping[str, datasets.Dataset], name: str) -> datasets.Dataset:
    """Return the split ``train``, or the only one; refuse others."""
    if "train" in found:
        return found["train"]
    if len(found) == 1:
        return next(iter(found.values()))
    raise InputError(f"{name!r} must have a split 'train' or only one, got {listed(found)}")


def _refuse_suffix(path: Path, accepted: Sequence[str]) -> InputError:
    return InputError(f"the format of a file is told by its suffix ({', '.join(accepted)}), got {str(path)!r}")


def _is_saved(folder: Path) -> bool:
    return folder.is_dir() and any((folder / name).is_file() for name in _SAVED)


def _is_table(folder: Path, files: Sequence[Path]) -> bool:
    """Return whether the files of a folder are the parts of one table, rather than data sets of their own."""
    if len({suffix_of(file) for file in files}) > 1 or not suffix_of(files[0]):
        return False
    marked = suffix_of(folder) or any((folder / mark).exists() for mark in _TABLE_MARKS)
    stems = [file.name.removesuffix(suffix_of(file)) for file in files]
    return bool(marked or layout_of_files(files) == "lists" or all(re.fullmatch(_PART, stem) for stem in stems))


def _entries(folder: Path) -> list[Path]:
    """Return the readable files and `datasets` folders of a folder, in order of name, numbers by value."""
    inside = sorted(folder.iterdir(), key=lambda entry: re.sub(r"\d+", lambda number: number[0].zfill(20), entry.name))
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
