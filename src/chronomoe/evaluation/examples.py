"""Windows to draw: some at fixed places of each domain, and those that went best and worst."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from chronomoe.evaluation.comparison import Comparison
from chronomoe.models.mixture.mixture import DistilledMoE

PLACES = (0.35, 0.8)
"""Shares of the way through each domain's rows, so that none is picked for its looks."""


def drawn_forecasts(comparison: Comparison, main: str, *, places: Sequence[float] = PLACES) -> list[dict[str, Any]]:
    """Return windows with the forecasts that a comparison kept of them.

    Args:
        comparison: with forecasts of ``main``, whose smallest and largest SQL of each domain are drawn too.
        main: a row.
        places: shares of the way through each task's rows.
    """
    row_of, drawn = comparison.rows[main], []
    for name, task in comparison.tasks.items():
        scores = row_of.test[name]
        with np.errstate(invalid="ignore", divide="ignore"):
            scaled = scores.scaled_quantile_loss / scores.scaled_observed
        picked = [("", int(place * (len(task.target) - 1))) for place in places]
        if np.isfinite(scaled).any():
            picked += [("best", int(np.nanargmin(scaled))), ("worst", int(np.nanargmax(scaled)))]
        for why, row in picked:
            owner = int(task.window[row])
            place, cutoff = task.places[owner]
            source = task.domain.series[place]
            context = task.contexts[row][-4 * task.horizon :]
            times = source.timestamps()
            drawn.append(
                {
                    "domain": name,
                    "item_id": source.item_id,
                    "freq": source.freq,
                    "why": why,
                    "SQL": float(scaled[row]) if np.isfinite(scaled[row]) else None,
                    "context_timestamps": [str(time) for time in times[cutoff - len(context) : cutoff]],
                    "context": _listed(context),
                    "target_timestamps": [str(time) for time in times[cutoff : cutoff + task.horizon]],
                    "target": _listed(task.target[row]),
                    "levels": list(comparison.levels),
                    "models": {model: parts[name][row].tolist() for model, parts in comparison.forecasts.items()},
                }
                | _used(comparison, main, name, owner)
            )
    return drawn


def _used(comparison: Comparison, main: str, domain: str, window: int) -> dict[str, Any]:
    """Say which experts made a forecast, where there are experts."""
    model, routed = comparison.candidates[main].model, comparison.rows[main].routed
    if not isinstance(model, DistilledMoE):
        return {}
    expert, gate = routed[domain].expert[window], routed[domain].gate[window]
    return {
        "experts": [model.config.expert_names[index] for index in expert[gate > 0].tolist()],
        "gates": gate[gate > 0].tolist(),
    }


def _listed(values: Float[np.ndarray, " time"]) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
