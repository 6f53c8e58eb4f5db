"""Frequencies: read an alias, infer one from timestamps, check that timestamps follow it."""

import re
import warnings
from collections.abc import Sequence
from datetime import UTC, tzinfo
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.tseries.frequencies import to_offset
from pandas.tseries.offsets import BaseOffset, Tick, Week

from chronomoe.data.series import ITEM_ID, TIMESTAMP
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
_DAY = pd.Timedelta(days=1)


class Rows(NamedTuple):
    """The timestamps of many series, one series after the other."""

    item_ids: Sequence[str] | NDArray[np.object_]
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
    """Return the pandas offset of an alias; the aliases of pandas before 2.2 (``H``, ``T``, ``M``) are understood."""
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


def check_increasing(rows: Rows) -> None:
    """Refuse timestamps that do not strictly increase within each series."""
    steps = np.diff(rows.timestamps.asi8)
    wrong = np.flatnonzero((steps <= 0) & rows.follows())
    if len(wrong) == 0:
        return
    row = int(wrong[0]) + 1
    if steps[row - 1] == 0:
        raise InputError(
            f"duplicated timestamp: {rows.place(row)}; keep one row for each time of an item, "
            f"for example frame.drop_duplicates(['{ITEM_ID}', '{TIMESTAMP}'])"
        )
    raise InputError(
        f"unsorted timestamps: {rows.place(row)} comes after {rows.timestamps[row - 1]}; "
        f"sort the frame, for example frame.sort_values(['{ITEM_ID}', '{TIMESTAMP}'])"
    )


def check_regular(rows: Rows, offset: BaseOffset, *, given: bool) -> None:
    """Refuse increasing timestamps that are not one step, which the caller may have ``given``, after the one before."""
    rule = f"irregular frequency: timestamps must follow {offset.freqstr!r} ({'given' if given else 'inferred'}), which"
    mend = (
        "Reindex so that every step has a row, NaN where missing (frame.asfreq for one item), "
        f"split items of different frequencies{' or' if given else ', or pass freq='} "
        f"{'correct freq=' if given else 'if the inferred one is wrong'}"
    )
    step = _fixed(offset)
    if step is None:
        for first in np.unique(rows.bounds[:-1][np.diff(rows.bounds) > 0]):
            if not offset.is_on_offset(rows.timestamps[first]):
                raise InputError(f"{rule} {rows.place(int(first))} does not. {mend}")
    before, after = rows.timestamps[:-1], rows.timestamps[1:]
    expected = later(before, np.ones(len(before), dtype=np.int64), offset)
    wrong = np.flatnonzero(rows.follows() & np.asarray(expected != after))
    if len(wrong) == 0:
        return
    row = int(wrong[0])
    if abs(after[row] - expected[row]) == pd.Timedelta("1h") and (step is None or step >= _DAY):
        mend = (
            "An hour apart is how a change of clocks looks. For days of a local calendar give the times that zone, "
            f"for example frame.timestamp.dt.tz_convert('Europe/Berlin'), or none. {mend}"
        )
    raise InputError(f"{rule} {rows.place(row + 1)} does not: after {before[row]} comes {expected[row]}. {mend}")


def _fixed(offset: BaseOffset) -> pd.Timedelta | None:
    """Return the length of a step, None where it depends on the calendar."""
    if isinstance(offset, Week):
        return pd.Timedelta(weeks=offset.n)
    return pd.Timedelta(offset) if isinstance(offset, Tick) else None


def later(times: pd.DatetimeIndex, steps: NDArray[np.int64], offset: BaseOffset) -> pd.DatetimeIndex:
    """Return the times that lie some steps after others, element by element; refuse those after the year 2262."""
    step, most = _fixed(offset), int(steps.max(initial=0))
    try:
        if step is not None:
            if most * step.value > np.iinfo(np.int64).max:
                raise OverflowError
            return times + pd.to_timedelta(steps * step.value)
        found = times.to_numpy().copy()
        for places in pd.Series(steps).groupby(steps).indices.values():
            if count := int(steps[places[0]]):
                starts, back = np.unique(found[places], return_inverse=True)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", pd.errors.PerformanceWarning)  # pandas steps some one by one
                    found[places] = (pd.DatetimeIndex(starts) + count * offset).to_numpy()[back]
        return pd.DatetimeIndex(found)
    except (pd.errors.OutOfBoundsDatetime, OverflowError):
        raise InputError(
            f"times must lie between the years 1678 and 2262, {most} steps of {offset.freqstr!r} after {times.max()} "
            "do not; shorten the horizon"
        ) from None


class Clock(NamedTuple):
    """How times with a zone are counted, and the zone they are shown in; None for times without one."""

    counted: tzinfo | None = None
    """The zone itself where steps are those of its calendar (days and longer), else UTC."""
    shown: tzinfo | None = None

    def read(self, times: pd.DatetimeIndex) -> pd.DatetimeIndex:
        """Return times as they are counted, without zone."""
        return times if times.tz is None else times.tz_convert(self.counted or UTC).tz_localize(None)

    def show(self, times: pd.DatetimeIndex) -> pd.DatetimeIndex:
        """Return counted times in the zone they came in; midnights that a change of clocks leaves out come later."""
        if self.counted is None:
            return times
        first = np.ones(len(times), dtype=bool)
        return times.tz_localize(self.counted, ambiguous=first, nonexistent="shift_forward").tz_convert(self.shown)


def find_clock(rows: Rows, freq: str | None) -> Clock:
    """Tell how times with a zone are counted: local where their steps are days or longer there, else in UTC."""
    zone = rows.timestamps.tz
    if zone is None:
        return Clock()
    local, utc = Clock(zone, zone), Clock(UTC, zone)
    read = rows._replace(timestamps=local.read(rows.timestamps))
    world = utc.read(rows.timestamps)
    if (world == world.normalize()).all():
        return utc
    try:
        offset = infer_offset(read) if freq is None else parse_freq(freq)
        step = _fixed(offset)
        if step is not None and step < _DAY:
            return utc
        check_regular(read, offset, given=True)
    except InputError:
        return utc
    return local


def same_step(one: str, other: str) -> bool:
    """Return whether two aliases mean the same step; weeks may start on other days."""
    first, second = parse_freq(one), parse_freq(other)
    return first == second or (isinstance(first, Week) and isinstance(second, Week) and first.n == second.n)


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
    """
    offset = parse_freq(freq)
    period, rest = divmod(_PERIODS.get(offset.name.split("-")[0], 1), offset.n)
    return max(period, 1) if rest == 0 else 1
