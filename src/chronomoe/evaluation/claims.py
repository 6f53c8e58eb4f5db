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
from chronomoe.evaluation.metrics import bootstrap_relative

METRICS = ("WQL", "MAE")
"""Errors that every claim is made for."""
FULL_SIZE = 100e6
"""Parameters of a teacher for which the targets of speed were set."""
SPEED, SPEED_TARGET = "throughput", 18.0


class _Rival(NamedTuple):
    name: str
    says: str
    target: float | None


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
    found = []
    for name in names:
        for rows, rivals in (
            (comparison.rows, _at_home(name, comparison.rows, flops)),
            ({} if held_out is None else held_out.rows, _unseen(name)),
        ):
            for rival in rivals:
                if name not in rows or rival.name not in rows:
                    continue
                for metric in METRICS:
                    test = (rows[name].test, rows[rival.name].test)
                    ratio, low, high = bootstrap_relative(*test, metric, draws=draws, seed=seed)
                    found.append(
                        {
                            "claim": f"{name} against {rival.says}{_times(flops, rival.name, name)}",
                            "model": name,
                            "against": rival.name,
                            "unseen": rows is not comparison.rows,
                            "metric": metric,
                            "ratio": ratio,
                            "low": low,
                            "high": high,
                            "target": None if rival.target is None else f"at most {rival.target:.2f}",
                            "target_ratio": rival.target,
                        }
                    )
    return found


def speed_claim(
    name: str, measured: Mapping[str, Efficiency], teacher: str, *, draws: int, seed: int
) -> dict[str, Any]:
    """Claim how many more windows a second a model forecasts than another, by a bootstrap over rounds of timing."""
    times = [np.array(measured[one].batch_seconds) for one in (teacher, name)]
    rounds = np.random.default_rng(seed).integers(len(times[0]), size=(draws, len(times[0])))
    slow, fast = (np.median(one[rounds], axis=1) for one in times)
    low, high = np.quantile(slow / fast, [0.025, 0.975])
    full = measured[teacher].parameters >= FULL_SIZE
    return {
        "claim": f"{name} against {teacher}, same machine, batches of {measured[name].batch_size}",
        "model": name,
        "against": teacher,
        "unseen": False,
        "metric": SPEED,
        "ratio": float(np.median(times[0]) / np.median(times[1])),
        "low": float(low),
        "high": float(high),
        "target": f"at least {SPEED_TARGET:g}×" if full else None,
        "target_ratio": SPEED_TARGET if full else None,
    }


def equal_generalist(name: str, rows: Mapping[str, Row], flops: Mapping[str, float]) -> str | None:
    """Return the generalist whose active compute is nearest to a row's, at its mean number of experts."""
    generalists = [other for other, row in rows.items() if row.kind == "generalist" and other != "generalist-base"]
    gap = {other: abs(np.log(flops[other] / flops[name])) for other in generalists}
    return min(gap, key=lambda other: gap[other], default=None)


def _times(flops: Mapping[str, float], rival: str, name: str) -> str:
    """Say how equal a comparison is."""
    return f", {flops[rival] / flops[name]:.2g} times its active compute" if flops.get(rival) else ""


def _at_home(name: str, rows: Mapping[str, Row], flops: Mapping[str, float]) -> list[_Rival]:
    equal = equal_generalist(name, rows, flops)
    rivals = []
    if name == MIXTURE:
        rivals += [
            _Rival(OWN_SINGLE, "each domain's own single", 0.98),
            _Rival(OWN_EXPERT, "each domain's own expert, looked up by name", None),
        ]
    for other, row in rows.items():
        if row.kind == "generalist" and other != "generalist-base":
            target = (0.95 if name == MIXTURE else 1.0) if other == equal else 1.0
            rivals.append(_Rival(other, other, target))
    if name == "expanded":
        rivals.append(_Rival("generalist-base", "generalist-base, which it grew from", 1.0))
    if name == MIXTURE:
        rivals.append(_Rival(SIMPLE_AVERAGE, "the simple average of all its experts", 0.95))
    return [*rivals, _Rival("teacher", "the teacher", None)]


def _unseen(name: str) -> list[_Rival]:
    rivals = [
        _Rival(AVERAGE_SINGLE, "the average single", 0.9),
        _Rival(AVERAGE_EXPERT, "the average branched expert", None),
        _Rival("generalist-full", "generalist-full", 1.0),
        _Rival("generalist-wide", "generalist-wide", 1.0),
        _Rival("teacher", "the teacher", 1.03),
    ]
    return [rival._replace(says=f"{rival.says}, unseen domains") for rival in rivals]
