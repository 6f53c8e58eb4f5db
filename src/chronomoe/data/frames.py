"""Series from files: long and wide frames (CSV, Parquet), `datasets` folders, GluonTS JSON lines and folders of these.

The data layer's front door: what it takes to get from a path or a frame to series can be imported from here.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import overload

import pandas as pd

from chronomoe.data.arrow import ArrowSeries, is_list, load_parquet_rows, load_saved
from chronomoe.data.checks import listed
from chronomoe.data.conversion import frame_to_series, is_wide, to_long, wide_to_long
from chronomoe.data.readers import (
    JSON_SUFFIXES,
    METADATA,
    PARQUET_SUFFIXES,
    SUFFIXES,
    check_file,
    parquet_schema,
    read_json_lines,
    read_table,
    refuse_suffix,
    suffix_of,
)
from chronomoe.data.series import ITEM_ID, TARGET, TIMESTAMP, Series, series_to_frame
from chronomoe.data.streaming import long_parquet_to_rows
from chronomoe.errors import InputError

__all__ = [
    "ITEM_ID",
    "TARGET",
    "TIMESTAMP",
    "ArrowSeries",
    "Series",
    "frame_to_series",
    "is_wide",
    "read_frame",
    "read_series",
    "series_to_frame",
    "wide_to_long",
]

_SAVED = ("dataset_info.json", "dataset_dict.json")


def read_frame(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read a long or wide CSV (``.csv``, ``.csv.gz``) or Parquet file as a long frame.

    Returns:
        ``item_id``, ``timestamp`` and the other columns as they are; a wide file has ``target`` only. Values are
        checked by ``frame_to_series``.

    Raises:
        InputError: the file is missing, damaged or of another format, or its columns are misnamed.
    """
    path = Path(path)
    if _has_rows_of_lists(path):
        raise InputError(f"{str(path)!r} has one row a series; read it with read_series, then series_to_frame")
    return to_long(read_table(path))


def read_series(
    path: str | os.PathLike[str],
    *,
    target: str | Sequence[str] = TARGET,
    known_covariates: Sequence[str] = (),
    freq: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Sequence[Series]:
    """Read series from a file or folder in any format that we know.

    - a long or wide CSV or Parquet file (``frame_to_series`` says what it must hold);
    - a Parquet file, or a folder of them, with one row a series in the fev and Chronos layout (``ArrowSeries``), and a
      folder written by ``datasets.Dataset.save_to_disk``: memory-mapped, a series is read when asked for;
    - GluonTS JSON lines (``read_json_lines``);
    - a folder of these; item ids are then ``<file name without suffix>/<item_id>``.

    Args:
        path: File or folder.
        target: Column to forecast, or several for multivariate series.
        known_covariates: Columns whose future is known at forecast time.
        freq: Pandas alias of one step; inferred when None.
        cache_dir: Where a Parquet file that memory cannot hold is turned, batch by batch, into a memory-mapped one. A
            long Parquet file is read into memory when None, other formats always are.

    Raises:
        InputError: nothing readable is there, or what is there breaks a rule; the message names it.
    """
    path = Path(path)
    cache = None if cache_dir is None else Path(cache_dir)
    check_file(path)
    if path.is_dir() and not _is_saved(path):
        files = _entries(path)
        if not all(map(_has_rows_of_lists, files)):
            parts = {
                _stem(file): read_series(
                    file, target=target, known_covariates=known_covariates, freq=freq, cache_dir=cache_dir
                )
                for file in files
            }
            if len(parts) < len(files):
                raise InputError(
                    f"files of a folder must differ in more than their suffix, got {listed(map(str, files))}"
                )
            return next(iter(parts.values())) if len(parts) == 1 else JoinedSeries(parts)
        dataset = load_parquet_rows(files, cache_dir=cache)
    elif path.is_dir():
        dataset = load_saved(path)
    elif suffix_of(path) in JSON_SUFFIXES:
        return read_json_lines(path, target=target, known_covariates=known_covariates, freq=freq)
    elif _has_rows_of_lists(path):
        dataset = load_parquet_rows([path], cache_dir=cache)
    elif cache and suffix_of(path) in PARQUET_SUFFIXES and ITEM_ID in parquet_schema(path).names:
        dataset = long_parquet_to_rows(path, cache_dir=cache)
    elif suffix_of(path):
        return frame_to_series(read_table(path), target=target, known_covariates=known_covariates, freq=freq)
    else:
        raise refuse_suffix(path, SUFFIXES)
    return ArrowSeries(dataset, target=target, known_covariates=known_covariates, freq=freq)


class JoinedSeries(Sequence[Series]):
    """The series of several files, one file after the other; item ids are ``<name>/<item_id>``."""

    def __init__(self, parts: dict[str, Sequence[Series]]) -> None:
        self._names, self._parts = list(parts), list(parts.values())

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    @overload
    def __getitem__(self, index: int) -> Series: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Series]: ...

    def __getitem__(self, index: int | slice) -> Series | Sequence[Series]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        for name, part in zip(self._names, self._parts, strict=True):
            if 0 <= position < len(part):
                series = part[position]
                return replace(series, item_id=f"{name}/{series.item_id}")
            position -= len(part)
        raise IndexError(f"series {index} of {len(self)}")


def _is_saved(folder: Path) -> bool:
    return folder.is_dir() and any((folder / name).is_file() for name in _SAVED)


def _has_rows_of_lists(path: Path) -> bool:
    """Return whether a file is Parquet with one row a series."""
    if not path.is_file() or suffix_of(path) not in PARQUET_SUFFIXES:
        return False
    schema = parquet_schema(path)
    return TIMESTAMP in schema.names and is_list(schema.field(TIMESTAMP).type)


def _stem(path: Path) -> str:
    return path.name[: len(path.name) - len(suffix_of(path))]


def _entries(folder: Path) -> list[Path]:
    """Return the readable files and `datasets` folders of a folder, in order of name."""
    inside = sorted(folder.iterdir())
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
