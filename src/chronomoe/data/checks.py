"""Checks of columns that every reader shares; each refusal says what to change."""

import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.api import types

from chronomoe.data.frequency import Rows
from chronomoe.data.series import ITEM_ID, TARGET, TIMESTAMP
from chronomoe.errors import InputError, nearest

_ALSO_CALLED = {
    ITEM_ID: ("id", "item", "itemid", "unique_id", "series_id", "ts_id"),
    TIMESTAMP: ("date", "datetime", "time", "ds"),
    TARGET: ("y", "value", "values"),
}
_HOLDS = {ITEM_ID: "names of the series", TIMESTAMP: "times", TARGET: "values"}
_SHOWN = 5  # names listed before "..."


def listed(names: Iterable[str]) -> str:
    """Return the names quoted, the first few of them where there are many."""
    quoted = [repr(name) for name in names]
    return ", ".join(quoted[:_SHOWN]) + (f", ... ({len(quoted)} in all)" if len(quoted) > _SHOWN else "")


def one_line(error: BaseException) -> str:
    """Return what an error, or else its cause, says, on one line."""
    return " ".join(str(error.__cause__ or error).split()) or type(error).__name__


def similar(name: str, found: Iterable[str]) -> str | None:
    """Return the column that is ``name`` in another spelling or under another usual name."""
    usual = {name, *_ALSO_CALLED.get(name, ())}
    return next((column for column in found if column.lower().replace(" ", "_").replace("-", "_") in usual), None)


def check_names(names: Sequence[str]) -> None:
    """Refuse names that are used more than once."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"every column needs a name of its own, used more than once: {listed(twice)}")


def check_columns(wanted: Sequence[str], found: Sequence[str]) -> None:
    """Refuse a missing column; the message names the nearest one found."""
    for name in wanted:
        if name in found:
            continue
        other = similar(name, found)
        hint = f" Did you mean {other!r}?" if other else nearest(name, set(found) - set(wanted))
        remedy = f"Rename the one that holds the {_HOLDS[name]} to {name!r}" if name in _HOLDS else "Name one of these"
        raise InputError(f"missing column {name!r}; the columns are {listed(found)}.{hint} {remedy}")


def check_known(known: Sequence[str], covariates: Iterable[str]) -> None:
    """Refuse known covariates that are no covariates; the message names the nearest one."""
    names = list(covariates)
    for name in known:
        if name not in names:
            raise InputError(
                f"known covariates must be covariate columns ({listed(names) or 'there are none'}), "
                f"got {name!r}.{nearest(name, names)}"
            )


_OTHER_NOTATION = r"\s*-?\d{1,3}([., ]?\d{3})*[.,]\d+\s*"


def refuse_text(column: str, what: str, *, example: object = None) -> InputError:
    """Return the error for a column that holds ``what`` instead of numbers."""
    if re.fullmatch(_OTHER_NOTATION, str(example)):
        remedy = (
            "these look like numbers with a decimal comma or thousands separators: read them with "
            "pd.read_csv(path, decimal=',') or pd.read_csv(path, thousands=',')"
        )
    elif column == TARGET:
        remedy = "make them numbers, or empty where the value is missing"
    else:
        remedy = (
            "drop the column, or if it is a covariate encode categories as numbers, "
            f"for example frame[{column!r}].astype('category').cat.codes"
        )
    return InputError(f"column {column!r} must hold numbers, got {what}; {remedy}")


def as_numbers(column: pd.Series) -> NDArray[np.floating[Any]]:
    """Return a column as float64 (float32 where it was), NaN where missing.

    Booleans count as 0 and 1; numbers stored as text are read.

    Raises:
        InputError: the column holds something else; the message names the first such value and its row.
    """
    name = str(column.name)
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(column.dtype.categories.dtype)
    time = types.is_datetime64_any_dtype(column.dtype) or types.is_timedelta64_dtype(column.dtype)
    if time or types.is_complex_dtype(column.dtype):
        value = str(column.iloc[0]) if time else column.iloc[0]
        raise refuse_text(name, f"{value!r} in row 0", example=value)
    if not types.is_numeric_dtype(column.dtype):
        numbers = pd.to_numeric(column, errors="coerce")
        wrong = np.flatnonzero((numbers.isna() & column.notna()).to_numpy())
        if len(wrong):
            row, value = int(wrong[0]), column.iloc[wrong[0]]
            if isinstance(value, str) and numbers.notna().any() and not re.fullmatch(_OTHER_NOTATION, value):
                raise InputError(
                    f"column {name!r} mixes numbers and text: row {row} (counted from 0) holds {value!r}; "
                    "make it a number, or leave it empty where the value is missing"
                )
            raise refuse_text(name, f"{value!r} in row {row}", example=value)
        column = numbers
    narrow = column.dtype in (np.float32, np.float16, bool)
    return column.to_numpy(dtype=np.float32 if narrow else np.float64, na_value=np.nan)


def as_timestamps(column: pd.Series) -> pd.DatetimeIndex:
    """Return a column as times of nanosecond resolution, in the zone that was given.

    Raises:
        InputError: a value is missing or not a time; the message names the first one and its row.
    """
    if isinstance(column.dtype, pd.PeriodDtype):
        column = column.dt.to_timestamp()
    if types.is_numeric_dtype(column.dtype):
        column = _from_numbers(column)
    elif not types.is_datetime64_any_dtype(column.dtype):
        text = column.astype(str)
        digits = text.str.fullmatch(r"\d{6,}").all()
        column = _from_numbers(pd.to_numeric(text)) if digits else _parse_times(column)
    index = pd.DatetimeIndex(column)
    if index.hasnans:
        row = int(np.flatnonzero(index.isna())[0])
        raise InputError(f"column {column.name!r} must hold a time in every row, row {row} (counted from 0) is empty")
    try:
        return index.as_unit("ns")
    except pd.errors.OutOfBoundsDatetime as error:
        raise _refuse_year(error) from None


def _refuse_year(error: pd.errors.OutOfBoundsDatetime) -> InputError:
    return InputError(f"times must lie between the years 1678 and 2262: {one_line(error)}")


_WRITTEN = {4: "%Y", 6: "%Y%m", 8: "%Y%m%d"}
_UNITS = ((1e17, "ns"), (1e14, "us"), (1e11, "ms"), (1e8, "s"))


def _from_numbers(column: pd.Series) -> pd.Series:
    """Read years (2005), months (202401) and days (20240131) written as numbers; refuse others with a remedy."""
    first = column.iloc[0]
    text = column.astype(str).str.removesuffix(".0")
    lengths = text.str.len().unique()
    if len(lengths) == 1 and lengths[0] in _WRITTEN:
        times = pd.to_datetime(text, format=_WRITTEN[lengths[0]], errors="coerce")
        if times.dt.year.between(1700, 2261).all():
            return times
    unit = next((unit for least, unit in _UNITS if abs(first) >= least), None)
    remedy = (
        f"pd.to_datetime(column, unit={unit!r}) if they count from 1970"
        if unit
        else "pd.to_datetime(column, format='%Y') for years, or pd.date_range for steps that are only numbered"
    )
    raise InputError(
        f"column {column.name!r} must hold dates or times, got the number {first}; convert it first, "
        f"for example {remedy}"
    )


def _parse_times(column: pd.Series) -> pd.Series:
    """Read times written as text: ISO 8601, or one other format in all rows.

    Whether the day or the month comes first in ``03/04/2024`` is told by the rows in which only one of them can. One
    offset from UTC in all rows is kept as the zone; where it changes, times are read in UTC.
    """
    text = column.astype(str)
    short = np.flatnonzero(text.str.match(r"\s*\d{1,2}([-/.])\d{1,2}\1\d{2}(?!\d)").to_numpy())
    if len(short):
        raise InputError(
            f"column {column.name!r} has years of two digits, which can be read in more than one way: "
            f"{column.iloc[short[0]]!r} in row {short[0]} (counted from 0); write them as in ISO 8601, 2024-01-31 12:00"
        )
    times = _read_times(column, format="ISO8601")
    if times is not None:
        return times
    year_first = text.str.match(r"\s*\d{4}").any()
    month_first = _read_times(column, dayfirst=False)
    day_first = None if year_first else _read_times(column, dayfirst=True)
    if month_first is not None and day_first is not None and not month_first.equals(day_first):
        row = int(np.flatnonzero((month_first != day_first).to_numpy())[0])
        raise InputError(
            f"column {column.name!r} can be read with the day or the month first: {column.iloc[row]!r} in row {row} "
            "(counted from 0); write times as in ISO 8601, 2024-01-31 12:00"
        )
    times = day_first if month_first is None else month_first
    if times is not None:
        return times
    row = int(np.flatnonzero(pd.to_datetime(column, utc=True, errors="coerce", format="ISO8601").isna().to_numpy())[0])
    raise InputError(
        f"column {column.name!r} must hold dates or times in one format, best ISO 8601 (2024-01-31 12:00), "
        f"got {column.iloc[row]!r} in row {row} (counted from 0)"
    )


def _read_times(column: pd.Series, **options: Any) -> pd.Series | None:
    for utc in (False, True):  # in UTC where the offset from it changes
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=UserWarning)  # pandas on guessing a format
            warnings.simplefilter("error", category=FutureWarning)  # pandas on offsets that change
            try:
                times: pd.Series = pd.to_datetime(column, utc=utc, **options)
                return times
            except pd.errors.OutOfBoundsDatetime as error:
                raise _refuse_year(error) from None
            except (ValueError, TypeError, FutureWarning):
                continue
    return None


def check_finite(name: str, values: NDArray[np.floating[Any]], rows: Rows) -> None:
    """Refuse values that are infinite or beyond float32; NaN, a missing value, is fine."""
    wrong = np.flatnonzero(np.abs(values) > np.finfo(np.float32).max)
    if len(wrong):
        raise InputError(
            f"column {name!r} must hold finite float32 numbers or NaN for missing ones, got "
            f"{values[wrong[0]]} for {rows.place(int(wrong[0]))}; replace it, for example by NaN"
        )
