"""Inside MoE layers: how tokens were shared out among experts, by layer, domain and position."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from chronomoe.data.windows import collate, model_inputs, to_device
from chronomoe.evaluation.tasks import Task
from chronomoe.models.sparse.config import MoEConfig
from chronomoe.models.sparse.upcycling import SparseChronos2Model

THIRDS = ("oldest third", "middle third", "latest third")
REGISTER, FORECAST = "register", "forecast"
Counts = Float[Tensor, "position expert"]


@torch.no_grad()
def look_inside(model: SparseChronos2Model, tasks: Mapping[str, Task], *, batch_size: int = 128) -> dict[str, Any]:
    """Count the choices of all tokens of some tasks.

    Returns:
        ``layers``, in the order of computation: ``block``, ``num_experts``, ``top_k``; ``load``, the share of all
        choices that each expert got; the same by ``domains`` and by ``positions`` (thirds of the context that holds
        values, register token, forecast tokens; those that the layer did not compute are left out); ``entropy`` of the
        router, from 0 to 1, over choices' probabilities. Domains count alike in all but their own shares.
        ``least_share``: the smallest load of any expert, as a multiple of an even one.
    """
    model.eval()
    layers = list(zip(model.moe_blocks, model.moe_layers.values(), strict=True))
    places = len((*THIRDS, REGISTER, FORECAST))
    counts = {name: [torch.zeros(places, layer.config.num_experts) for _, layer in layers] for name in tasks}
    entropies: list[list[float]] = [[] for _ in layers]
    for name, task in tasks.items():
        for start in range(0, len(task.windows), batch_size):
            batch = collate(task.windows[start : start + batch_size], patch_size=model.chronos_config.output_patch_size)
            for index, note in enumerate(model(**to_device(model_inputs(batch), model.device)).moe):
                counts[name][index] += _count(
                    note.expert.cpu(),
                    num_experts=layers[index][1].config.num_experts,
                    ahead=batch["num_output_patches"],
                    register=model.chronos_config.use_reg_token,
                )
                entropies[index].append(float(note.entropy))
    described = [
        _layer(block, layer.config, {name: parts[index] for name, parts in counts.items()}, entropies[index])
        for index, (block, layer) in enumerate(layers)
    ]
    least = min((min(layer["load"]) * layer["num_experts"] for layer in described), default=1.0)
    return {"layers": described, "least_share": least}


def _count(expert: Int[Tensor, "batch token choice"], *, num_experts: int, ahead: int, register: bool) -> Counts:
    """Count choices by position: -1, which stands for padding, counts nowhere."""
    tokens = expert.shape[1]
    past = max(0, tokens - ahead - register)
    position = torch.full((tokens,), len(THIRDS) + 1)
    position[:past] = torch.arange(past) * len(THIRDS) // max(1, past)
    if register and tokens > ahead:
        position[past] = len(THIRDS)
    flat = (position[None, :, None] * num_experts + expert)[expert >= 0]
    places = len(THIRDS) + 2
    return flat.bincount(minlength=places * num_experts).view(places, num_experts).float()


def _layer(block: int, config: MoEConfig, counts: Mapping[str, Counts], entropies: list[float]) -> dict[str, Any]:
    even = {name: table / table.sum().clamp(min=1) for name, table in counts.items()}  # domains count alike
    positions = torch.stack(list(even.values())).mean(dim=0)
    return {
        "block": block,
        "num_experts": config.num_experts,
        "top_k": config.top_k,
        "load": _shares(positions.sum(dim=0)),
        "entropy": float(np.mean(entropies) / np.log(max(2, config.num_experts))),
        "domains": {name: _shares(table.sum(dim=0)) for name, table in counts.items()},
        "positions": {
            name: _shares(row)
            for name, row in zip((*THIRDS, REGISTER, FORECAST), positions, strict=True)
            if row.sum() > 0
        },
    }


def _shares(count: Float[Tensor, " expert"]) -> list[float]:
    shares: list[float] = (count / count.sum()).tolist()
    return shares
