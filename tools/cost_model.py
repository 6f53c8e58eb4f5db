"""Fit what a forecast costs to the cases of bench/cost.py.

Milliseconds of a batch of ``rows`` series, each with ``experts`` of the ``run`` experts that run, of ``tokens`` patches
of context and horizon, ``ahead`` of them the horizon's:

    call + expert * run + rows * (route + experts * (token * tokens + pair * tokens ** 2 + head * ahead))

Coefficients are not negative and make the relative errors of all cases small (least squares).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

TERMS = ("call", "expert", "route", "token", "pair", "head")
SERIES = 100_000_000
USUAL = {"context_length": 512, "horizon": 96, "rows": 256, "mean_experts": 1.04, "experts_run": 4}
"""A usual batch: four experts, of which most series use one."""


def terms(case: dict[str, Any], *, patch_size: int) -> NDArray[np.float64]:
    """Return what each coefficient is multiplied by."""
    ahead = -(-case["horizon"] // patch_size)
    tokens = -(-case["context_length"] // patch_size) + ahead + 1
    rows = case["rows"]
    each = rows * case["mean_experts"]
    return np.array([1, case["experts_run"], rows, each * tokens, each * tokens**2, each * ahead], dtype=np.float64)


def fit(cases: Sequence[dict[str, Any]], *, patch_size: int) -> tuple[dict[str, float], float]:
    """Return the coefficients in milliseconds and the largest relative error of a case."""
    measured = np.array([case["milliseconds"] for case in cases])
    matrix = np.stack([terms(case, patch_size=patch_size) for case in cases])
    found, _ = nnls(matrix / measured[:, None], np.ones(len(cases)))
    error = float(np.abs(matrix @ found / measured - 1).max())
    return dict(zip(TERMS, found.tolist(), strict=True)), error


def page(answer: dict[str, Any]) -> list[str]:
    """Return the Markdown of the model: coefficients of each type, and the hours of a large job."""
    patch_size, places = answer["patch_size"], f"{answer['threads']} thread{'s' * (answer['threads'] > 1)}"
    lines = ["| milliseconds | " + " | ".join(TERMS) + " | largest error | hours for 100M series |"]
    lines.append("| --- " * (len(TERMS) + 3) + "|")
    for kind in dict.fromkeys(case["dtype"] for case in answer["cases"]):
        cases = [case for case in answer["cases"] if case["dtype"] == kind]
        found, error = fit(cases, patch_size=patch_size)
        batch = float(terms(USUAL, patch_size=patch_size) @ np.array(list(found.values())))
        hours = batch / 1000 * SERIES / USUAL["rows"] / 3600
        cells = " | ".join(f"{value:.3g}" for value in found.values())
        lines.append(f"| {kind}, {places} | {cells} | {error:.0%} | {hours:.0f} |")
    return lines
