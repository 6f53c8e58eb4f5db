"""Mixtures of the same experts under several routings, each row forecast by an expert once."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from chronomoe.models.chronos2 import ForecastOutput
from chronomoe.models.mixture.mixture import DistilledMoE


def sharing_forecasts(models: Mapping[str, PreTrainedModel]) -> dict[str, PreTrainedModel]:
    """Return the models, where mixtures of the same experts share what each of these says of a row.

    For as many rows as memory holds: a forecast takes 4 bytes a quantile and step for each expert.
    """
    made: dict[int, nn.ModuleList] = {}
    found = dict(models)
    for name, model in models.items():
        if isinstance(model, DistilledMoE) and isinstance(model.experts, nn.ModuleList):
            place = id(model.experts)
            if place not in made:
                made[place] = nn.ModuleList(map(_remembering, model.experts))
            found[name] = twin = copy.copy(model)
            twin._modules = {**model._modules, "experts": made[place]}
    return found


def _remembering(expert: nn.Module) -> nn.Module:
    """Return the same expert, weights shared, that forecasts a row which is alone in its group once."""
    twin, known = copy.copy(expert), dict[bytes, Tensor]()

    def forward(context: Tensor, **inputs: Any) -> ForecastOutput:
        group_ids = inputs.get("group_ids")
        if group_ids is not None and len(group_ids.unique()) < len(group_ids):
            output: ForecastOutput = expert(context, **inputs)
            return output
        parts = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and name != "group_ids"}
        asked = f"{sorted(parts)} {inputs.get('num_output_patches')} ".encode()
        rows = torch.cat([context, *(value.to(context.dtype) for value in parts.values())], dim=1).cpu().numpy()
        keys = [asked + row.tobytes() for row in rows]
        new = torch.tensor([place for place, key in enumerate(keys) if key not in known], dtype=torch.long)
        if len(new):
            new = new.to(context.device)
            picked = {name: value[new] for name, value in inputs.items() if isinstance(value, Tensor)}
            made = expert(context[new], **inputs | picked).normalized_preds
            known.update(zip((keys[place] for place in new.tolist()), made, strict=True))
        return ForecastOutput(normalized_preds=torch.stack([known[key] for key in keys]))

    twin.forward = forward  # type: ignore[method-assign]
    return twin
