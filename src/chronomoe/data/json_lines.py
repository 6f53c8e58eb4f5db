"""GluonTS JSON lines as an Arrow table of one row a series."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray
from pandas.tseries.offsets import BaseOffset, Tick

from chronomoe.data.checks import one_line
from chronomoe.data.frequency import parse_freq
from chronomoe.data.intake import FREQ, START, Wish
from chronomoe.data.series import ITEM_ID, TARGET
from chronomoe.errors import InputError

METADATA = "metadata.json"
"""Where GluonTS writes the frequency, beside the data or in the folder ``metadata`` next to theirs."""
KNOWN, PAST_ONLY = "feat_dynamic_real", "past_feat_dynamic_real"


def json_lines_to_rows(path: Path, wish: Wish) -> tuple[pa.Table, Wish]:
    """Read GluonTS JSON lines: one series a line, with ``start``, ``target`` and perhaps ``item_id`` (else its number).

    The rows of ``feat_dynamic_real`` become known covariates ``feat_dynamic_real_0``, ... (what they hold beyond the
    target is left out), those of ``past_feat_dynamic_real`` past-only ones; other fields are ignored. ``null`` and
    ``"NaN"`` are missing values. The step is the one asked for, or a field ``freq`` of the line, or that of GluonTS's
    ``metadata.json``.

    Returns:
        The table, and what to ask of it: the variates and the known covariates by the names they got.

    Raises:
        InputError: the file is missing, empty or damaged, a series is, or series differ in variates or covariates.
    """
    if wish.target != (TARGET,):
        raise InputError(f"the target of GluonTS JSON lines is called {TARGET!r}, got target={list(wish.target)}")
    freq = wish.freq or _metadata_freq(path)
    rows: list[dict[str, Any]] = []
    for number, fields in _objects(path):
        where = f"{str(path)!r} line {number}"
        rows.append(_row(fields, where=where, freq=freq) | {ITEM_ID: str(fields.get(ITEM_ID, number - 1))})
        if set(rows[-1]) != set(rows[0]):
            first, last = (sorted(set(row) - {ITEM_ID, START, FREQ}) for row in (rows[0], rows[-1]))
            raise InputError(
                f"{where}: series that belong together must have the same variates and covariates, the first one has "
                f"{first}, this one {last}; write them into files of their own"
            )
    if not rows:
        raise InputError(f"{str(path)!r} is empty")
    kinds = {ITEM_ID: pa.string(), FREQ: pa.string(), START: pa.timestamp("ns")}
    lists = [name for name in rows[0] if name not in kinds]
    schema = pa.schema(kinds | dict.fromkeys(lists, pa.large_list(pa.float64())))
    known = tuple(name for name in lists if name.startswith(KNOWN))
    if other := set(wish.known) - set(known):
        raise InputError(f"known covariates of GluonTS JSON lines are {list(known) or 'none'}, got {sorted(other)}")
    target = tuple(name for name in lists if name.startswith(TARGET))
    return pa.Table.from_pylist(rows, schema=schema), wish._replace(target=target, known=known)


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
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


def _row(fields: dict[str, Any], *, where: str, freq: str | None) -> dict[str, Any]:
    for name in (START, TARGET):
        if name not in fields:
            raise InputError(f"{where}: missing field {name!r}; the fields are {sorted(fields)}")
    alias = freq or fields.get(FREQ)
    if not isinstance(alias, str):
        raise InputError(f"{where} states only when the series starts; pass freq=, for example freq='h'")
    offset = parse_freq(alias)
    start = pd.to_datetime(str(fields[START]), errors="coerce")
    if pd.isna(start):
        raise InputError(f"{where}: start must be a date or time, got {fields[START]!r}")
    target = np.atleast_2d(_numbers(fields[TARGET], name=TARGET, where=where))
    names = [TARGET] if len(target) == 1 else [f"{TARGET}_{variate}" for variate in range(len(target))]
    row = {START: _on_offset(start, offset), FREQ: offset.freqstr} | dict(zip(names, target, strict=True))
    steps = target.shape[1]
    for name in (KNOWN, PAST_ONLY):
        covariates = fields.get(name) or []
        if not isinstance(covariates, list):
            raise InputError(f"{where}: {name} must be a list of lists of numbers, got {str(covariates)[:40]!r}")
        for index, covariate in enumerate(covariates):
            values = _numbers(covariate, name=f"{name}_{index}", where=where)
            if values.ndim != 1 or len(values) < steps:
                raise InputError(
                    f"{where}: {name} must have a value for each of the target's {steps} steps, "
                    f"got {values.size} in row {index}"
                )
            row[f"{name}_{index}"] = values[:steps]
    return row


def _numbers(values: Any, *, name: str, where: str) -> NDArray[np.float64]:
    try:
        numbers = np.array(values, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise InputError(f"{where}: {name} must be a list of numbers, null where missing: {error}") from None
    if numbers.ndim not in (1, 2):
        raise InputError(f"{where}: {name} must be a list of numbers, got {str(values)[:40]!r}")
    return numbers


def _on_offset(start: pd.Timestamp, offset: BaseOffset) -> pd.Timestamp:
    """Return the stamp of the calendar period that ``start`` lies in; GluonTS writes any time within it."""
    start = start.tz_convert("UTC").tz_localize(None) if start.tz else start
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
