"""The file formats: tables (CSV, Parquet) as frames, GluonTS JSON lines as series."""

import gzip
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pandas.tseries.offsets import BaseOffset, Tick

from chronomoe.data.checks import check_finite, check_known, check_names, one_line, report_dropped
from chronomoe.data.frequency import Rows, alias_from, parse_freq
from chronomoe.data.series import ITEM_ID, TARGET, Series
from chronomoe.errors import InputError

CSV_SUFFIXES = (".csv", ".csv.gz")
PARQUET_SUFFIXES = (".parquet", ".pq")
JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
SUFFIXES = CSV_SUFFIXES + PARQUET_SUFFIXES + JSON_SUFFIXES
_OTHER_SEPARATORS = (";", "\t", "|")
METADATA = "metadata.json"
"""Where GluonTS writes the frequency, beside the data or in the folder ``metadata`` next to theirs."""


def suffix_of(path: Path) -> str:
    """Return which of ``SUFFIXES`` a path ends with, or an empty string."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")


def refuse_suffix(path: Path, accepted: Sequence[str]) -> InputError:
    """Return the error for a file of another format."""
    return InputError(f"the format of a file is told by its suffix ({', '.join(accepted)}), got {str(path)!r}")


def check_file(path: Path) -> None:
    """Check that a file or folder is there.

    Raises:
        InputError: it is not; the message names the nearest existing folder.
    """
    if not path.exists():
        parent = next(folder for folder in (*path.absolute().parents,) if folder.exists())
        raise InputError(f"no file or folder {str(path)!r}; the nearest folder that exists is {str(parent)!r}")


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
    raise refuse_suffix(path, CSV_SUFFIXES + PARQUET_SUFFIXES)


def _read_csv(path: Path) -> pd.DataFrame:
    """Read a CSV file whose first row names every column once.

    ``item_id`` stays text as written: "007" keeps its zeros and "NA" is a name.
    """
    header = pd.read_csv(path, header=None, nrows=1, dtype=str).iloc[0].dropna().tolist()
    if len(header) == 1 and (found := [sign for sign in _OTHER_SEPARATORS if sign in header[0]]):
        raise InputError(
            f"columns of a CSV file are separated by commas, {str(path)!r} seems to have {found[0]!r} instead; save it "
            f"again, for example pd.read_csv(path, sep={found[0]!r}).to_csv(path, index=False)"
        )
    check_names(header)
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            # Without index_col=False, rows that end in a comma would move every value one column to the left.
            frame = pd.read_csv(path, converters={ITEM_ID: str}, low_memory=False, index_col=False)
        except pd.errors.ParserWarning:
            raise InputError(
                f"every row of a CSV file must have as many values as the first one has names, {len(header)}; "
                f"a row of {str(path)!r} has more"
            ) from None
    return _without_row_numbers(frame)


def parquet_schema(path: Path) -> pa.Schema:
    """Return the columns of a Parquet file without reading their values.

    Raises:
        InputError: not a Parquet file.
    """
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{str(path)!r} cannot be read as .parquet: {one_line(error)}") from None


def read_json_lines(
    path: Path,
    *,
    target: str | Sequence[str] = TARGET,
    known_covariates: Sequence[str] = (),
    freq: str | None = None,
) -> list[Series]:
    """Read GluonTS JSON lines: one series a line, with ``start``, ``target`` and perhaps ``item_id`` (else its number).

    The rows of ``feat_dynamic_real`` become known covariates ``feat_dynamic_real_0``, ... (what they hold beyond the
    target is left out), those of ``past_feat_dynamic_real`` past-only ones; other fields are ignored. ``null`` and
    ``"NaN"`` are missing values. The step is ``freq``, or a field ``freq`` of the line, or that of GluonTS's
    ``metadata.json``.

    Args:
        path: The file, perhaps compressed with gzip.
        target: Must be ``target``, which is what GluonTS calls it.
        known_covariates: May repeat names of ``feat_dynamic_real``, which are known by definition.
        freq: Pandas alias of one step.

    Raises:
        InputError: the file is missing, empty or damaged, or a series is.
    """
    check_file(path)
    if target not in (TARGET, [TARGET], (TARGET,)):
        raise InputError(f"the target of GluonTS JSON lines is called {TARGET!r}, got target={target!r}")
    freq = freq or _metadata_freq(path)
    series, dropped, names = [], [], set()
    for number, fields in _json_objects(path):
        where = f"{str(path)!r} line {number}"
        item = _json_series(fields, where=where, item_id=str(fields.get(ITEM_ID, number - 1)), freq=freq)
        if item.item_id in names:
            raise InputError(f"{where}: every series needs an item_id of its own, got {item.item_id!r} again")
        names.add(item.item_id)
        check_known(known_covariates, item.known)
        if np.isnan(item.target).all():
            dropped.append(item.item_id)
        else:
            series.append(item)
    if not names:
        raise InputError(f"{str(path)!r} is empty")
    report_dropped(dropped, len(names))
    return series


def _json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number, counted from 1, and the object of each line."""
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    fields = json.loads(line)
                    if not isinstance(fields, dict):
                        raise InputError(
                            f"{str(path)!r} line {number} must be one JSON object with 'start' and 'target', "
                            f"got {line.strip()[:40]!r}"
                        )
                    yield number, fields
    except json.JSONDecodeError as error:
        raise InputError(f"{str(path)!r} line {number} is not a JSON object on one line: {error}") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{str(path)!r} cannot be read as JSON lines: {one_line(error)}") from None


def _json_series(fields: dict[str, Any], *, where: str, item_id: str, freq: str | None) -> Series:
    for name in ("start", TARGET):
        if name not in fields:
            raise InputError(f"{where}: missing field {name!r}; the fields are {sorted(fields)}")
    alias = freq or fields.get("freq")
    if not isinstance(alias, str):
        raise InputError(f"{where} states only when the series starts; pass freq=, for example freq='h'")
    offset = parse_freq(alias)
    try:
        start = pd.Timestamp(fields["start"])
    except (ValueError, TypeError):
        raise InputError(f"{where}: start must be a date or time, got {fields['start']!r}") from None
    start = _on_offset(start.tz_convert("UTC").tz_localize(None) if start.tz else start, offset)

    target = np.atleast_2d(_json_numbers(fields[TARGET], name=TARGET, where=where))
    covariates = {}
    for name in ("feat_dynamic_real", "past_feat_dynamic_real"):
        for index, row in enumerate(fields.get(name) or []):
            values = _json_numbers(row, name=f"{name}_{index}", where=where)
            if values.ndim != 1 or len(values) < target.shape[1]:
                raise InputError(
                    f"{where}: {name} must have a value for each of the target's {target.shape[1]} steps, "
                    f"got {values.size} in row {index}"
                )
            covariates[f"{name}_{index}"] = values[: target.shape[1]]
    names = (TARGET,) if len(target) == 1 else tuple(f"{TARGET}_{variate}" for variate in range(len(target)))
    item = Series(
        item_id=item_id,
        start=start,
        freq=alias_from(offset, start),
        target=target,
        target_names=names,
        covariates=covariates,
        known=tuple(name for name in covariates if name.startswith("feat_")),
    )
    rows = Rows([item_id], item.timestamps(), np.array([0, len(item)]))
    for name, values in {**dict(zip(names, target, strict=True)), **covariates}.items():
        check_finite(name, values, rows)
    return item


def _json_numbers(values: Any, *, name: str, where: str) -> NDArray[np.float32]:
    try:
        with np.errstate(over="ignore"):
            numbers = np.array(values, dtype=np.float64).astype(np.float32)
    except (ValueError, TypeError) as error:
        raise InputError(f"{where}: {name} must be a list of numbers, null where missing: {error}") from None
    if numbers.ndim not in (1, 2):
        raise InputError(f"{where}: {name} must be a list of numbers, got {str(values)[:40]!r}")
    return numbers


def _on_offset(start: pd.Timestamp, offset: BaseOffset) -> pd.Timestamp:
    """Return the stamp of the calendar period that ``start`` lies in; GluonTS writes any time within it."""
    if isinstance(offset, Tick | pd.offsets.Week) or offset.is_on_offset(start):
        return start
    return offset.rollback(start) if "S" in offset.name.split("-")[0] else offset.rollforward(start)


def _metadata_freq(path: Path) -> str | None:
    for place in (path.with_name(METADATA), path.parent.parent / "metadata" / METADATA):
        if place.is_file():
            try:
                freq = json.loads(place.read_text(encoding="utf-8")).get("freq")
            except (ValueError, AttributeError):
                raise InputError(
                    f"{str(place)!r} must be a JSON object; mend it, or move it away and pass freq="
                ) from None
            if isinstance(freq, str):
                return freq
    return None


def _without_row_numbers(frame: pd.DataFrame) -> pd.DataFrame:
    """Drop the nameless column of row numbers that ``DataFrame.to_csv`` writes first by default."""
    first = frame.columns[0]
    if str(first) == "Unnamed: 0" and np.array_equal(frame[first].to_numpy(), np.arange(len(frame))):
        return frame.drop(columns=first)
    return frame
