"""Which of the trained models to deploy: decided on validation windows, before anybody looks at a test window."""

from collections.abc import Mapping, Sequence
from typing import Any

from chronomoe.evaluation.comparison import NAIVE, Row
from chronomoe.evaluation.metrics import bootstrap_relative, percentiles, relative, relative_draws

METRIC = "WQL"
RULE = "the cheapest model whose validation error is within one standard error of the best model's"


def recommend(
    rows: Mapping[str, Row], costs: Sequence[Mapping[str, Any]], names: Sequence[str], *, draws: int, seed: int
) -> dict[str, Any]:
    """Name the checkpoint to deploy, by the one-standard-error rule (Breiman et al., 1984, section 3.4.3).

    The standard error is that of the ratio to the best model's error, by the paired bootstrap that every interval here
    comes from. Training looked at other windows of the validation part (:data:`chronomoe.data.windows.WATCHED`).

    Args:
        rows: with validation scores.
        costs: a record for each of the names, with ``flops`` at the mean number of experts.
        names: of the rows to choose from, each one checkpoint.
        draws: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        ``model`` and ``best``, their ``flops``; ``error``, relative to seasonal naive, with ``low`` and ``high``;
        ``sure``, the share of draws in which the model is at most as wrong as the best other one; and, by model, the
        ``candidates``, best first.
    """
    naive = rows[NAIVE].validation
    flops = {cost["model"]: cost["flops"] for cost in costs}
    error = {name: relative(rows[name].validation, naive, METRIC) for name in names}
    best = min(names, key=lambda name: error[name])
    ratios = {
        name: relative_draws(rows[name].validation, rows[best].validation, METRIC, draws=draws, seed=seed)
        for name in names
    }
    ratio = {name: error[name] / error[best] for name in names}
    near = [name for name in names if name == best or ratio[name] - 1 <= ratios[name].std()]
    model = min(near, key=lambda name: (flops[name], error[name]))
    others = [name for name in names if name != model]
    rival = min(others, key=lambda name: error[name]) if others else model
    interval = bootstrap_relative(rows[model].validation, naive, METRIC, draws=draws, seed=seed)
    candidates = [
        {
            "model": name,
            "kind": rows[name].kind,
            "error": error[name],
            "domains": {
                domain: relative({domain: own}, {domain: naive[domain]}, METRIC)
                for domain, own in rows[name].validation.items()
            },
            "flops": flops[name],
            "ratio": ratio[name],
            **dict(zip(("low", "high"), percentiles(ratios[name]), strict=True)),
            "near": name in near,
        }
        for name in sorted(names, key=lambda name: error[name])
    ]
    return {
        "model": model,
        "kind": rows[model].kind,
        "best": best,
        "rival": rival,
        "rule": RULE,
        "metric": METRIC,
        "error": interval.ratio,
        "low": interval.low,
        "high": interval.high,
        "flops": flops[model],
        "best_flops": flops[best],
        "sure": float((ratios[model] <= ratios[rival]).mean()),
        "candidates": candidates,
    }
