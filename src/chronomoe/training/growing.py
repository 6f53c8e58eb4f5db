"""Growing a finished student (route 3): one MoE layer at a time, kept only if validation improves."""

import json
import math
import shutil
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field
from torch.utils.data import Dataset

from chronomoe.data.soft_targets import SoftTargets, revision
from chronomoe.data.windows import Window, digest
from chronomoe.errors import InputError
from chronomoe.models.balancing import AUX_WEIGHT
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.models.configuration import Blocks, configuration
from chronomoe.models.sparse.config import MoEConfig
from chronomoe.models.sparse.insertion import MoEEnhancedChronos2, MoEInsertionConfig
from chronomoe.models.sparse.upcycling import check_dense
from chronomoe.training.arguments import DistilConfig
from chronomoe.training.distillation import Curve, Progress, distil
from chronomoe.training.validation import validation_loss


@configuration
class ExpansionConfig:
    """Which layers are tried, how they are tuned, and when one stays."""

    layer: MoEConfig = field(default_factory=lambda: MoEConfig(num_experts=4, top_k=1))
    """Each new layer; ``layers`` in it is not used."""
    max_layers: int = Field(2, ge=1)
    """At most this many layers are added."""
    candidates: Blocks | None = None
    """Encoder blocks after which a layer may go, each more than once; all when None."""
    probe_steps: int = Field(50, ge=1)
    """Steps of training at each candidate before one of them is chosen."""
    min_gain: float = Field(0.0, ge=0, lt=1)
    """Share of the validation loss that a layer must take away, more than which it stays."""
    tune_earlier: bool = False
    """Tune layers added before together with the new one."""
    training: DistilConfig = field(default_factory=lambda: DistilConfig(steps=300))
    """How the chosen layer is tuned, from the start; probes differ in their number of steps."""
    aux_weight: float = Field(AUX_WEIGHT, ge=0)
    """Of the auxiliary losses."""

    def __post_init__(self) -> None:
        MoEInsertionConfig(after=(0,), layer=self.layer)  # refuses what inserted layers cannot be


class Expansion(NamedTuple):
    """What an expansion ended with."""

    model: ExactChronos2Model
    """The grown student; the base itself where no layer helped."""
    path: list[dict[str, Any]]
    """Of each layer tried: ``layer`` (its number), ``after`` (the block it follows), ``probes`` (``after`` and
    ``validation`` loss of each candidate), ``before`` and ``validation`` (loss without and with it), ``kept``,
    ``steps`` and ``curve`` (its training curve)."""


def expand(
    base: ExactChronos2Model,
    windows: Dataset[Window],
    validation: Dataset[Window],
    config: ExpansionConfig,
    folder: Path,
    *,
    soft_targets: SoftTargets | None = None,
    progress: Progress = lambda done, total: None,
) -> Expansion:
    """Add MoE layers to a finished student, one at a time; whatever was there stays bit-identical.

    For each layer, every candidate place is probed by a short training of a layer there, the place with the lowest
    validation loss is chosen, and a new layer is tuned there from the start. It is kept if the validation loss falls
    by more than ``min_gain``; the first that is not ends the search.

    ``folder`` keeps what is finished: called again after a kill with the same arguments, the search continues where
    it was and ends with the same weights. Runs in one process.

    Args:
        base: a finished student; it is not changed.
        windows: training windows.
        validation: windows that decide.
        config: layers and training.
        folder: for checkpoints, a new one or that of the same expansion.
        soft_targets: live teacher or store; None tunes on what happened alone.
        progress: called with steps done and in all.

    Raises:
        InputError: the base has MoE layers, a candidate is no block of it, or ``folder`` holds another expansion.
    """
    places = candidate_places(base, config)
    search = _Search(windows, validation, soft_targets, config, places, progress)
    _record(folder, search.inputs(base))
    model, path = base, list[dict[str, Any]]()
    loss = search.judge(base)
    for number in range(config.max_layers):
        own = folder / f"layer-{number}"
        if not (own / "layer.json").exists():
            search.add_layer(model, number, own, before=loss)
        path.append(json.loads((own / "layer.json").read_text()))
        if not path[-1]["kept"]:
            break
        grown = MoEEnhancedChronos2.from_pretrained(own / "model", dtype="auto").to(base.device)
        model, loss = grown, path[-1]["validation"]
    progress(search.total, search.total)
    return Expansion(model.eval(), path)


class _Search:
    """Probes places and tunes layers."""

    def __init__(
        self,
        windows: Dataset[Window],
        validation: Dataset[Window],
        soft_targets: SoftTargets | None,
        config: ExpansionConfig,
        places: list[int],
        progress: Progress,
    ) -> None:
        self.windows, self.validation, self.soft_targets = windows, validation, soft_targets
        self.config, self.places, self.progress = config, places, progress
        self.probes = places if len(places) > 1 else []
        self.steps = len(self.probes) * config.probe_steps + config.training.steps  # of one layer
        self.total = self.steps * config.max_layers

    def inputs(self, base: ExactChronos2Model) -> dict[str, Any]:
        """Return what the result depends on."""
        return {
            "config": asdict(self.config),
            "base": revision(base),
            "soft_targets": self.soft_targets is not None,
            "windows": [len(self.windows), digest(self.windows[0])],  # type: ignore[arg-type]
            "validation": [len(self.validation), digest(self.validation[0])],  # type: ignore[arg-type]
        }

    def judge(self, model: ExactChronos2Model) -> float:
        """Return the validation loss."""
        return validation_loss(model, self.validation, batch_size=self.config.training.batch_size)

    def add_layer(self, model: ExactChronos2Model, number: int, folder: Path, *, before: float) -> None:
        """Choose a place, tune a layer there, and write the grown model and, last, the entry of the path."""
        first = number * self.steps
        probes = [
            self.probe(model, number, after, folder, first=first + index * self.config.probe_steps)
            for index, after in enumerate(self.probes)
        ]
        probes_by_loss = sorted(probes, key=lambda probe: (math.isnan(probe["validation"]), probe["validation"]))
        after = probes_by_loss[0]["after"] if probes else self.places[0]
        grown = self.grow(model, number, after)
        first += len(self.probes) * self.config.probe_steps
        curve = self.tune(grown, self.config.training, folder / "tuning", first=first)
        reached = self.judge(grown)
        entry = {
            "layer": number,
            "after": after,
            "probes": probes,
            "before": before,
            "validation": reached,
            "kept": reached < before * (1 - self.config.min_gain),
            "steps": self.config.training.steps,
            "curve": curve,
        }
        grown.save_pretrained(folder / "model")
        _write(folder / "layer.json", entry)
        shutil.rmtree(folder / "tuning")

    def probe(self, model: ExactChronos2Model, number: int, after: int, folder: Path, *, first: int) -> dict[str, Any]:
        """Train a layer at a candidate place for a short while; a finished probe is read back."""
        record, scratch = folder / f"probe-{after}.json", folder / f"probe-{after}"
        if not record.exists():
            grown = self.grow(model, number, after)
            self.tune(grown, replace(self.config.training, steps=self.config.probe_steps), scratch, first=first)
            _write(record, {"after": after, "validation": self.judge(grown)})
            shutil.rmtree(scratch)
        found: dict[str, Any] = json.loads(record.read_text())
        return found

    def grow(self, model: ExactChronos2Model, number: int, after: int) -> MoEEnhancedChronos2:
        """Return a copy of the model with one more layer, which alone is trainable unless earlier ones are, too."""
        if isinstance(model, MoEEnhancedChronos2):
            grown = model.with_layer(after)
        else:
            grown = MoEEnhancedChronos2(model, MoEInsertionConfig(after=(after,), layer=self.config.layer))
        for order, layer in grown.moe_layers.items():
            layer.requires_grad_(order == number or self.config.tune_earlier)
        return grown

    def tune(self, model: MoEEnhancedChronos2, training: DistilConfig, folder: Path, *, first: int) -> Curve:
        """Train what is trainable; ``first`` steps of the expansion are done."""
        return distil(
            model,
            self.windows,
            self.soft_targets,
            training,
            folder,
            aux_weight=self.config.aux_weight,
            progress=lambda done, _: self.progress(first + done, self.total),
        )


def candidate_places(base: ExactChronos2Model, config: ExpansionConfig) -> list[int]:
    """Return the encoder blocks after which a layer may go.

    Raises:
        InputError: the base has MoE layers, or a candidate is no block of it.
    """
    check_dense(base, what="an expansion", remedy="start from the base, and raise max_layers for more of them")
    blocks = len(base.encoder.block)
    places = list(range(blocks)) if config.candidates is None else list(config.candidates)
    if max(places) >= blocks:
        raise InputError(f"candidates must be from 0 to {blocks - 1}, the model's encoder blocks, got {max(places)}")
    return places


def _record(folder: Path, inputs: dict[str, Any]) -> None:
    """Write down what is asked for; refuse a folder where something else was."""
    record, wanted = folder / "expansion.json", json.loads(json.dumps(inputs))
    if record.exists() and json.loads(record.read_text()) != wanted:
        raise InputError(f"{folder} holds an expansion of another model, other windows or settings; choose a new one")
    folder.mkdir(parents=True, exist_ok=True)
    _write(record, wanted)


def _write(path: Path, value: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value))
    partial.replace(path)
