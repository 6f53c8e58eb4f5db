"""Tables of the report about MoE layers: how an expanded model grew, and which experts the tokens choose."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from chronomoe.report.charts import Number, is_number
from chronomoe.report.tables import GAP, Cell, Row, Table, signed

LIMIT = 4
"""An expert with less than this part of an even share is called dead: 1 / (4 * num_experts) of the choices."""


class ModelLayers(NamedTuple):
    """The MoE layers of one model."""

    model: str
    tables: Sequence[Table]
    least_share: float  # of any expert of any layer, 1 where the choices are even

    @property
    def dead(self) -> bool:
        """Whether some expert is hardly ever chosen."""
        return self.least_share < 1 / LIMIT

    @property
    def balance(self) -> str:
        """The least used expert in words."""
        return (
            f"The least used expert of any layer takes {self.least_share:.2f} of an even share of the choices, where "
            f"{1 / LIMIT:g}, that is 1 / ({LIMIT}\u00a0×\u00a0experts) of the choices, is the least for an expert."
        )


def model_layers(moe: Mapping[str, Any]) -> list[ModelLayers]:
    """Tables of every MoE layer, by model."""
    found = []
    for model, inside in moe.items():
        layers = inside["layers"]
        if not layers:
            continue  # an expansion may keep none
        least = inside.get("least_share")
        if least is None:
            least = min(share * len(layer["load"]) for layer in layers for share in layer["load"])
        tables = [layer_table(layer, depth=depth) for depth, layer in enumerate(layers)]
        found.append(ModelLayers(model, tables, float(least)))
    return found


def layer_table(layer: Mapping[str, Any], *, depth: int) -> Table:
    """Shares of the choices by expert: of all tokens, of each domain's and of each place in the window.

    Args:
        layer: what a run noted of it.
        depth: how many MoE layers are computed before it.
    """
    groups = [("all", {"all tokens": layer["load"]})]
    groups += [("domain", layer.get("domains") or {}), ("position", layer.get("positions") or {})]
    rows = [
        Row(name, [_share(share, len(shares), flag=group == "all") for share in shares], group=group)
        for group, parts in groups
        for name, shares in parts.items()
    ]
    experts, top_k = layer["num_experts"], layer["top_k"]
    title = f"{ordinal(depth + 1)} layer, block {layer['block']}: {top_k} of {experts} experts for each token"
    if layer.get("entropy") is not None:
        title += f", router entropy {layer['entropy']:.2f}"
    return Table(
        title=title,
        head="Tokens",
        columns=[f"E{expert}" for expert in range(experts)],
        rows=rows,
    )


def _share(share: Number, num_experts: int, *, flag: bool) -> Cell:
    """Write a share of the choices, shaded by how far it is from even on a scale of doublings."""
    relative = share * num_experts
    shade = max(-1.0, min(1.0, math.log(relative, LIMIT))) if relative > 0 else -1.0
    return Cell(f"{share:.1%}", shade=shade, worse=flag and relative < 1 / LIMIT)


def ordinal(place: int) -> str:
    """Write a place counted from 1: 1st, 2nd, 3rd, 4th."""
    teens = place % 100 in (11, 12, 13)
    return f"{place}{'th' if teens else {1: 'st', 2: 'nd', 3: 'rd'}.get(place % 10, 'th')}"


def growth_table(path: Sequence[Mapping[str, Any]]) -> Table:
    """Each layer that was tried on the way to the expanded model."""
    places = sorted({probe["after"] for layer in path for probe in layer.get("probes") or []})
    rows = []
    for layer in path:
        before, reached, kept = layer["before"], layer["validation"], layer["kept"]
        cells = [
            Cell(f"block {layer['after']}"),
            Cell(_loss(before)),
            Cell(_loss(reached)),
            Cell(signed("{:+.2%}", reached / before - 1) if before else GAP, best=kept),
            Cell("kept" if kept else "left out", best=kept),
            Cell(f"{layer['steps']:,}" if layer.get("steps") is not None else GAP),
        ]
        probed = {probe["after"]: probe["validation"] for probe in layer.get("probes") or []}
        cells += [
            Cell(_loss(probed[place]) if place in probed else GAP, best=place in probed and place == layer["after"])
            for place in places
        ]
        rows.append(Row(f"layer {layer['layer']}", cells))
    note = "Validation loss (hard loss in normalised space) before a layer was added and with it, tuned; it stays only "
    note += "if the loss falls. Blocks and layers are counted from 0."
    if places:
        note += " Probe: validation loss after a short training of a layer behind that block; bold: the place chosen."
    return Table(
        title="How the expanded model grew",
        head="Layer",
        columns=["After", "Loss before", "Loss with it", "Change", "Outcome", "Steps", *(f"Probe {p}" for p in places)],
        rows=rows,
        note=note,
    )


def _loss(value: Number) -> str:
    return f"{value:.4f}" if is_number(value) else GAP
