"""Frequencies: read an alias, infer one from timestamps, check that timestamps follow it."""

import re
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.tseries.frequencies import to_offset
from pandas.tseries.offsets import BaseOffset, Week

from chronomoe.errors import InputError

MIN_STEPS = 3
"""Fewest timestamps that show a frequency."""

_FORMER_ALIASES = {"H": "h", "T": "min", "S": "s", "L": "ms", "M": "ME", "BM": "BME", "Q": "QE", "BQ": "BQE"} | {
    "A": "YE",
    "Y": "YE",
    "AS": "YS",
}
_WEEKDAYS = ("MON", "TUE", "WED", "THU", "FRI", "SAT", "SUN")
_PERIODS = {"ms": 1000, "s": 3600, "min": 1440, "h": 24, "bh": 8, "D": 7, "B": 5, "C": 5, "W": 52, "SMS": 24, "SME": 24}
_PERIODS |= dict.fromkeys(("MS", "ME", "BMS", "BME"), 12) | dict.fromkeys(("QS", "QE", "BQS", "BQE"), 4)
_BLOCK = 8  # steps from which a frequency is guessed where the whole series shows none
_MAX_BLOCKS = 64


class Rows(NamedTuple):
    """The timestamps of many series, one series after the other."""

    item_ids: Sequence[str]
    timestamps: pd.DatetimeIndex
    bounds: NDArray[np.int64]
    """Series ``i`` has rows ``bounds[i]:bounds[i + 1]``."""

    def item(self) -> NDArray[np.int64]:
        """Return the number of the series that each row belongs to."""
        return np.repeat(np.arange(len(self.item_ids)), np.diff(self.bounds))

    def follows(self) -> NDArray[np.bool_]:
        """Return, for each row but the first, whether the row before it is of the same series."""
        item = self.item()
        return np.equal(item[1:], item[:-1])

    def place(self, row: int) -> str:
        """Say which item, which row of it and which time a row is."""
        item = int(np.searchsorted(self.bounds, row, side="right")) - 1
        return f"item {self.item_ids[item]!r} at row {row - self.bounds[item]} of the item ({self.timestamps[row]})"


@lru_cache
def parse_freq(freq: str) -> BaseOffset:
    """Return the pandas offset of an alias; the aliases of pandas before 2.2 (``H``, ``T``, ``M``) are understood.

    Raises:
        InputError: not an alias, or not a positive step.
    """
    match = re.fullmatch(r"(-?\d*)([A-Za-z]+)(.*)", freq)
    alias = f"{match[1]}{_FORMER_ALIASES.get(match[2], match[2])}{match[3]}" if match else freq
    try:
        offset = to_offset(alias)
    except ValueError:
        offset = None
    if offset is None or offset.n < 1:
        raise InputError(
            f"freq must be a pandas offset alias of at least one step, such as 'h', '15min', 'D', 'B', 'W-SUN', 'MS' "
            f"or 'QE', got {freq!r}"
        )
    return offset


def infer_offset(rows: Rows) -> BaseOffset:
    """Infer the step that the series share from the longest one.

    Where that one has gaps, the step is the one that stretches of it follow, so that a check can name the gap.

    Raises:
        InputError: no series has three timestamps.
    """
    lengths = np.diff(rows.bounds)
    longest = int(lengths.argmax())
    if lengths[longest] < MIN_STEPS:
        raise InputError(
            f"a frequency shows only in a series of at least {MIN_STEPS} rows, and the longest one (item "
            f"{rows.item_ids[longest]!r}) has {lengths[longest]}; pass freq=, for example freq='D'"
        )
    index = rows.timestamps[rows.bounds[longest] : rows.bounds[longest + 1]]
    if alias := pd.infer_freq(index):
        return parse_freq(alias)
    for start in range(0, min(len(index) - MIN_STEPS, _BLOCK * _MAX_BLOCKS), _BLOCK):
        if alias := pd.infer_freq(index[start : start + max(MIN_STEPS, _BLOCK)]):
            return parse_freq(alias)
    steps, count = np.unique(np.diff(index.to_numpy()), return_counts=True)
    return parse_freq(pd.tseries.frequencies.to_offset(pd.Timedelta(steps[count.argmax()])).freqstr)


def check_regular(rows: Rows, offset: BaseOffset, *, given: bool) -> None:
    """Check that within each series every timestamp is one step after the one before.

    Args:
        rows: Increasing timestamps.
        offset: The step. Weekly series may have their own weekdays.
        given: Whether the caller stated the step, rather than the data.

    Raises:
        InputError: they are not; the message names the item and the first timestamp that is out of step.
    """
    step = pd.Timedelta(weeks=offset.n) if isinstance(offset, Week) else offset
    source = "given" if given else "inferred"
    mend = (
        "Reindex so that every step has a row, NaN where missing (frame.asfreq for one item), "
        f"split items of different frequencies{' or' if given else ', or pass freq='} "
        f"{'correct freq=' if given else 'if the inferred one is wrong'}"
    )
    if not isinstance(offset, Week | pd.offsets.Tick):
        for first in np.unique(rows.bounds[:-1][np.diff(rows.bounds) > 0]):
            if not offset.is_on_offset(rows.timestamps[first]):
                raise InputError(
                    f"irregular frequency: timestamps must follow {offset.freqstr!r} ({source}), "
                    f"which {rows.place(int(first))} does not. {mend}"
                )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=pd.errors.PerformanceWarning)  # offsets that pandas steps one by one
        expected = rows.timestamps[:-1] + step
    wrong = np.flatnonzero(rows.follows() & np.asarray(expected != rows.timestamps[1:]))
    if len(wrong):
        row = int(wrong[0]) + 1
        within_a_day = isinstance(offset, pd.offsets.Tick) and pd.Timedelta(offset) < pd.Timedelta("1D")
        if abs(rows.timestamps[row] - expected[row - 1]) == pd.Timedelta("1h") and not within_a_day:
            mend = (
                "An hour apart is how a change of clocks looks: times with a zone count in UTC. For days of a local "
                f"calendar leave the zone out, for example frame.timestamp.dt.tz_localize(None). {mend}"
            )
        raise InputError(
            f"irregular frequency: timestamps must follow {offset.freqstr!r} ({source}), which {rows.place(row)} does "
            f"not: after {rows.timestamps[row - 1]} comes {expected[row - 1]}. {mend}"
        )


def alias_from(offset: BaseOffset, start: pd.Timestamp) -> str:
    """Return the alias of ``offset`` for a series that starts at ``start``: a week is anchored at its weekday."""
    if not isinstance(offset, Week):
        return str(offset.freqstr)
    return f"{offset.n if offset.n > 1 else ''}W-{_WEEKDAYS[start.weekday()]}"


def default_seasonality(freq: str) -> int:
    """Return the steps of the main period that series of a frequency usually have, 1 where none is usual.

    The day for hours and minutes (24 for ``h``, 96 for ``15min``), the hour for seconds, the week for days (7, business
    days 5), the year for weeks, months and quarters (52, 12, 4). ``gluonts.time_feature.get_seasonality`` agrees but
    for days and weeks, where it gives 1. A step that does not divide the period, such as ``7min``, gives 1.

    Raises:
        InputError: ``freq`` is not an offset alias.
    """
    offset = parse_freq(freq)
    period, rest = divmod(_PERIODS.get(offset.name.split("-")[0], 1), offset.n)
    return max(period, 1) if rest == 0 else 1
