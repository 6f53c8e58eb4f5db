"""What a comparison claims: ratios of errors on test windows, with intervals and what was aimed for."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from chronomoe.evaluation.comparison import (
    AVERAGE_EXPERT,
    AVERAGE_SINGLE,
    MIXTURE,
    OWN_EXPERT,
    OWN_SINGLE,
    SIMPLE_AVERAGE,
    Comparison,
    Row,
)
from chronomoe.evaluation.cost import Efficiency
from chronomoe.evaluation.metrics import Interval, bootstrap_relative, percentiles

METRICS = ("WQL", "MAE")
"""Errors that every claim is made for."""
FULL_SIZE = 100e6
"""Parameters of a teacher for which the targets of speed were set."""
SPEED, SPEED_TARGET = "throughput", 18.0


class _Rival(NamedTuple):
    name: str
    says: str
    target: float | None = None


def claims(
    comparison: Comparison,
    held_out: Comparison | None,
    costs: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    *,
    draws: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Return the claims about some rows: at home, against what a user would have otherwise, then on unseen domains."""
    flops = {cost["model"]: cost["flops"] for cost in costs}
    unseen = {} if held_out is None else held_out.rows
    found = []
    for name in names:
        at_home = [(comparison.rows, rival) for rival in _at_home(name, comparison.rows, flops)]
        for rows, rival in [*at_home, *((unseen, rival) for rival in UNSEEN)]:
            if name not in rows or rival.name not in rows:
                continue
            away = ", unseen domains" if rows is unseen else ""
            says = f"{name} against {rival.says}{away}{_times(flops, rival.name, name)}"
            target = "" if rival.target is None else f"at most {rival.target:.2f}"
            for metric in METRICS:
                test = (rows[name].test, rows[rival.name].test)
                interval = bootstrap_relative(*test, metric, draws=draws, seed=seed)
                found.append(
                    _claim(says, name, rival.name, metric, interval, target, rival.target) | {"unseen": rows is unseen}
                )
    return found


def speed_claim(
    name: str, measured: Mapping[str, Efficiency], teacher: str, *, draws: int, seed: int
) -> dict[str, Any]:
    """Claim how many more windows a second a model forecasts than another, by a bootstrap over rounds of timing."""
    times = [np.array(measured[one].batch_seconds) for one in (teacher, name)]
    rounds = np.random.default_rng(seed).integers(len(times[0]), size=(draws, len(times[0])))
    slow, fast = (np.median(one[rounds], axis=1) for one in times)
    interval = Interval(float(np.median(times[0]) / np.median(times[1])), *percentiles(slow / fast))
    target = SPEED_TARGET if measured[teacher].parameters >= FULL_SIZE else None
    says = f"{name} against {teacher}, same machine, batches of {measured[name].batch_size}"
    return _claim(says, name, teacher, SPEED, interval, f"at least {SPEED_TARGET:g}×" if target else "", target)


def _claim(
    says: str, name: str, rival: str, metric: str, interval: Interval, target: str, target_ratio: float | None
) -> dict[str, Any]:
    claim = {"claim": says, "model": name, "against": rival, "unseen": False, "metric": metric}
    return claim | interval._asdict() | {"target": target or None, "target_ratio": target_ratio}


def equal_generalist(name: str, rows: Mapping[str, Row], flops: Mapping[str, float]) -> str | None:
    """Return the generalist whose active compute is nearest to a row's, at its mean number of experts."""
    generalists = [other for other, row in rows.items() if row.kind == "generalist" and other != "generalist-base"]
    gap = {other: abs(np.log(flops[other] / flops[name])) for other in generalists}
    return min(gap, key=lambda other: gap[other], default=None)


def _times(flops: Mapping[str, float], rival: str, name: str) -> str:
    """Say how equal a comparison is."""
    return f", {flops[rival] / flops[name]:.2g} times its active compute" if flops.get(rival) else ""


def _at_home(name: str, rows: Mapping[str, Row], flops: Mapping[str, float]) -> list[_Rival]:
    mixture, equal = name == MIXTURE, equal_generalist(name, rows, flops)
    own = [
        _Rival(OWN_SINGLE, "each domain's own single", 0.98),
        _Rival(OWN_EXPERT, "each domain's own expert, looked up by name"),
    ]
    generalists = [
        _Rival(other, other, 0.95 if mixture and other == equal else 1.0)
        for other, row in rows.items()
        if row.kind == "generalist" and other != "generalist-base"
    ]
    base = [_Rival("generalist-base", "generalist-base, which it grew from", 1.0)] if name == "expanded" else []
    average = [_Rival(SIMPLE_AVERAGE, "the simple average of all its experts", 0.95)] if mixture else []
    return [*(own if mixture else ()), *generalists, *base, *average, _Rival("teacher", "the teacher")]


UNSEEN = (
    _Rival(AVERAGE_SINGLE, "the average single", 0.9),
    _Rival(AVERAGE_EXPERT, "the average branched expert"),
    _Rival("generalist-full", "generalist-full", 1.0),
    _Rival("generalist-wide", "generalist-wide", 1.0),
    _Rival("teacher", "the teacher", 1.03),
)
"""What a user of a domain that nobody trained on would have otherwise."""
