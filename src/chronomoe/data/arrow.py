"""Series in memory-mapped `datasets` tables of one row a series, the fev and Chronos layout."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import overload

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pandas.tseries.offsets import BaseOffset

from chronomoe.data.checks import (
    as_timestamps,
    check_columns,
    check_finite,
    check_increasing,
    check_known,
    listed,
    one_line,
    refuse_text,
    report_dropped,
    with_values,
)
from chronomoe.data.frequency import MIN_STEPS, Rows, alias_from, check_regular, infer_offset, parse_freq
from chronomoe.data.series import ITEM_ID, TARGET, TIMESTAMP, Series
from chronomoe.errors import InputError

ID = "id"
"""What fev and Chronos call ``item_id`` in their data sets."""
_BATCH_BYTES = 1 << 26


class ArrowSeries(Sequence[Series]):
    """The series of a `datasets.Dataset` with one row a series, each read when asked for.

    Columns: ``item_id`` or ``id`` (the row number without either); ``timestamp``, a list of times; the target, a list
    of numbers or, for several variates, a list of such lists; other lists of numbers are covariates. Columns that are
    not lists say nothing about time and are ignored.

    Everything is checked once, batch by batch, when the object is made.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        *,
        target: str | Sequence[str] = TARGET,
        known_covariates: Sequence[str] = (),
        freq: str | None = None,
    ) -> None:
        """Check a data set; the arguments are those of ``frame_to_series``.

        Raises:
            InputError: as ``frame_to_series``, and where the lists of a row differ in length.
        """
        self._dataset = dataset.with_format("arrow")
        self._targets = (target,) if isinstance(target, str) else tuple(target)
        schema = dataset.features.arrow_schema
        self._id = next((name for name in (ITEM_ID, ID) if name in schema.names), None)
        lists = [name for name in schema.names if is_list(schema.field(name).type) and name != self._id]
        check_columns([TIMESTAMP], lists)
        check_columns(self._targets, [name for name in lists if name != TIMESTAMP])
        self._covariates = [name for name in lists if name not in {TIMESTAMP, *self._targets}]
        check_known(known_covariates, self._covariates)
        self._known = tuple(known_covariates)
        for name in (*self._targets, *self._covariates):
            inner = schema.field(name).type.value_type
            if name in self._targets and len(self._targets) == 1 and is_list(inner):
                inner = inner.value_type
            check_number_type(name, inner)
        self._nested = len(self._targets) == 1 and is_list(schema.field(self._targets[0]).type.value_type)
        if len(dataset) == 0:
            raise InputError("the data set is empty, it has no rows")
        self._names = self._variate_names() if self._nested else self._targets
        self._offset = self._find_offset() if freq is None else parse_freq(freq)
        self._rows = self._check(given=freq is not None)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Series: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Series]: ...

    def __getitem__(self, index: int | slice) -> Series | Sequence[Series]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"series {index} of {len(self)}")
        row = int(self._rows[index])
        table = self._dataset[row : row + 1]
        start = as_timestamps(_flat(table, TIMESTAMP).slice(0, 1).to_pandas().rename(TIMESTAMP))[0]
        return Series(
            item_id=self._item_ids(table, row)[0],
            start=start,
            freq=alias_from(self._offset, start),
            target=self._target(table),
            target_names=self._names,
            covariates={name: _numbers(_flat(table, name)) for name in self._covariates},
            known=self._known,
        )

    def _batches(self) -> Iterator[tuple[int, pa.Table]]:
        """Yield the first row and the table of consecutive parts of the data set."""
        size = max(1, int(_BATCH_BYTES * len(self._dataset) / max(1, self._dataset.data.nbytes)))
        for first in range(0, len(self._dataset), size):
            yield first, self._dataset[first : first + size]

    def _item_ids(self, table: pa.Table, first: int) -> list[str]:
        if self._id is None:
            return [str(first + row) for row in range(len(table))]
        item_ids = table[self._id].to_pylist()
        if None in item_ids:
            raise InputError(
                f"column {self._id!r} must name an item in every row, row {first + item_ids.index(None)} is empty"
            )
        return [str(item_id) for item_id in item_ids]

    def _timestamps(self, first: int, table: pa.Table) -> Rows:
        bounds = np.concatenate([[0], np.cumsum(_lengths(table, TIMESTAMP))])
        times = _flat(table, TIMESTAMP).to_pandas().rename(TIMESTAMP)
        timestamps = as_timestamps(times) if len(times) else pd.DatetimeIndex([])
        return Rows(self._item_ids(table, first), timestamps, bounds)

    def _variate_names(self) -> tuple[str, ...]:
        """Name the variates of a target that is a list of lists, counting those of the first row."""
        name = self._targets[0]
        count = int(_lengths(self._dataset[:1], name)[0])
        return (name,) if count < 2 else tuple(f"{name}_{variate}" for variate in range(count))

    def _target(self, table: pa.Table) -> NDArray[np.float32]:
        """Return the target of all rows of a table, one after the other: ``(variate, time)``."""
        if not self._nested:
            return np.stack([_numbers(_flat(table, name)) for name in self._targets])
        values = _numbers(_flat(table, self._targets[0]).flatten())
        stops = np.cumsum(_lengths(table, TIMESTAMP)) * len(self._names)
        parts = [part.reshape(len(self._names), -1) for part in np.split(values, stops[:-1])]
        return np.concatenate(parts, axis=1)

    def _find_offset(self) -> BaseOffset:
        for first, table in self._batches():
            rows = self._timestamps(first, table)
            if np.diff(rows.bounds).max() >= MIN_STEPS:
                check_increasing(rows)
                return infer_offset(rows)
        return infer_offset(rows)

    def _check(self, *, given: bool) -> NDArray[np.int64]:
        """Check every row and return the numbers of those that have a target value."""
        kept, dropped = [], []
        names: set[str] = set()
        for first, table in self._batches():
            rows = self._timestamps(first, table)
            for item_id in rows.item_ids:
                if item_id in names:
                    raise InputError(f"every series needs an item id of its own, got {item_id!r} again")
                names.add(item_id)
            self._check_lengths(table, rows)
            target = self._target(table)
            check_increasing(rows)
            check_regular(rows, self._offset, given=given)
            for name, values in zip(self._names, target, strict=True):
                check_finite(name, values, rows)
            for name in self._covariates:
                check_finite(name, _numbers(_flat(table, name)), rows)
            observed = with_values(target, rows)
            kept.append(first + observed)
            dropped += [rows.item_ids[row] for row in np.setdiff1d(np.arange(len(table)), observed)]
        report_dropped(dropped, len(self._dataset))
        return np.concatenate(kept)

    def _check_lengths(self, table: pa.Table, rows: Rows) -> None:
        """Check that every list of a row is as long as its timestamps."""
        steps = np.diff(rows.bounds)
        for name in (*self._targets, *self._covariates):
            lengths, wanted, items = _lengths(table, name), steps, rows.item_ids
            if self._nested and name in self._targets:
                wrong = np.flatnonzero(lengths != len(self._names))
                if len(wrong):
                    raise InputError(
                        f"every row of {name!r} must have the first one's {len(self._names)} variates, "
                        f"got {lengths[wrong[0]]} for item {items[wrong[0]]!r}"
                    )
                items = [item_id for item_id in items for _ in self._names]
                wanted = np.repeat(steps, lengths)
                lengths = pc.fill_null(pc.list_value_length(_flat(table, name)), 0).to_numpy()
            wrong = np.flatnonzero(lengths != wanted)
            if len(wrong):
                raise InputError(
                    f"every list of a row must be as long as its {TIMESTAMP!r}, got {lengths[wrong[0]]} values of "
                    f"{name!r} for {wanted[wrong[0]]} times of item {items[wrong[0]]!r}"
                )


def is_list(kind: pa.DataType) -> bool:
    """Return whether an Arrow type is a list of any kind."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def check_number_type(name: str, kind: pa.DataType) -> None:
    """Check that a column holds numbers.

    Raises:
        InputError: it does not.
    """
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    if not (number or pa.types.is_boolean(kind) or pa.types.is_null(kind)):
        raise refuse_text(name, f"values of type {kind}")


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


def load_parquet_rows(files: Sequence[Path], *, cache_dir: Path | None) -> datasets.Dataset:
    """Open Parquet files of one row a series, memory-mapped from the cache of `datasets` (or from ``cache_dir``).

    Raises:
        InputError: they cannot be read together.
    """
    try:
        return datasets.load_dataset(
            "parquet",
            data_files=[str(file) for file in files],
            split="train",
            cache_dir=None if cache_dir is None else str(cache_dir),
        )
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError, pa.ArrowInvalid) as error:
        raise InputError(
            f"{listed(str(file) for file in files)} cannot be read as one data set: {one_line(error)}"
        ) from None


def _lengths(table: pa.Table, name: str) -> NDArray[np.int64]:
    return np.asarray(pc.fill_null(pc.list_value_length(table[name]), 0).to_numpy(), dtype=np.int64)


def _flat(table: pa.Table, name: str) -> pa.Array:
    column = table[name].combine_chunks()
    return (column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column).flatten()


def _numbers(values: pa.Array) -> NDArray[np.float32]:
    return np.asarray(values.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False), dtype=np.float32)
