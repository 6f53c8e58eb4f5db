"""What a mixture's router does on test windows: which experts it uses, and how right it is when it is sure."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from chronomoe.data.windows import collate
from chronomoe.evaluation.metrics import WindowScores, aggregate, concatenate
from chronomoe.evaluation.tasks import Task
from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.models.mixture.router import Routing

CONFIDENCE_BINS = 5


def task_routing(mixture: DistilledMoE, task: Task, *, batch_size: int = 256) -> Routing:
    """Route each window of a task: one row a window."""
    patch_size, device = mixture.chronos_config.output_patch_size, next(mixture.parameters()).device
    mixture.eval()
    routed = []
    for start in range(0, len(task.windows), batch_size):
        windows = task.windows[start : start + batch_size]
        batch = collate(windows, patch_size=patch_size)
        with torch.no_grad():
            routing = mixture.route(batch["context"].to(device), group_ids=batch["group_ids"].to(device))
        first = np.cumsum([0, *(len(window.context) for window in windows[:-1])])
        routed.append([part[first].cpu() for part in routing])
    return Routing(*(torch.cat(parts) for parts in zip(*routed, strict=True)))


def expert_use(routing: Routing) -> list[float]:
    """Return the share of windows for which each expert runs; their sum is the mean number of experts."""
    used = (routing.gate > 0).float()
    count = torch.zeros(routing.prob.shape[1]).index_add(0, routing.expert.flatten(), used.flatten())
    share: list[float] = (count / len(used)).tolist()
    return share


def routing_summary(mixture: DistilledMoE, routed: Mapping[str, Routing]) -> dict[str, Any]:
    """Say which experts each domain uses: shares, mean gates, mean number, and the router's entropy from 0 to 1."""
    num_experts, domains = len(mixture.config.expert_names), {}
    for name, routing in routed.items():
        used = torch.tensor(expert_use(routing))
        weight = torch.zeros(num_experts).index_add(0, routing.expert.flatten(), routing.gate.float().flatten())
        entropy = -(routing.prob * routing.prob.clamp(min=1e-12).log()).sum(dim=1).mean() / np.log(max(2, num_experts))
        domains[name] = {
            "share": (used / used.sum()).tolist(),
            "gate": (weight / weight.sum()).tolist(),
            "experts": float(used.sum()),
            "entropy": float(entropy),
        }
    return {"experts": list(mixture.config.expert_names), "domains": domains}


def confidence_bins(
    tasks: Mapping[str, Task],
    routed: Mapping[str, Routing],
    mixture: Mapping[str, WindowScores],
    oracle: Mapping[str, WindowScores],
) -> list[dict[str, float]]:
    """Errors of a mixture and of its best expert in hindsight, by how sure the router is.

    Windows are ranked by the probability of the most probable expert and cut into equal parts. Errors are SQL, which
    has the same unit in every domain.
    """
    sure = np.concatenate([routed[name].prob.amax(dim=1).numpy()[task.window] for name, task in tasks.items()])
    own, best = (concatenate(scores[name] for name in tasks) for scores in (mixture, oracle))
    bins = []
    for rows in np.array_split(np.argsort(sure, kind="stable"), min(CONFIDENCE_BINS, len(sure))):
        errors = [aggregate(WindowScores(*(column[rows] for column in scores)))["SQL"] for scores in (own, best)]
        if all(np.isfinite(errors)):
            low, high = (float(end(sure[rows])) for end in (np.min, np.max))
            bins.append({"low": low, "high": high, "windows": len(rows), "SQL": errors[0], "best_SQL": errors[1]})
    return bins
