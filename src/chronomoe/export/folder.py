"""Writing an exported model: the graph, the configuration that the pipeline needs, and a card."""

import json
from collections.abc import Sequence
from pathlib import Path

import onnx
import torch
from transformers import PreTrainedModel

from chronomoe.checkpoints.bands import write_bands
from chronomoe.checkpoints.card import model_card
from chronomoe.checkpoints.finding import GRAPH
from chronomoe.checkpoints.writing import whole_folder
from chronomoe.data.windows import Batch
from chronomoe.errors import InputError
from chronomoe.export.engines import ENGINES
from chronomoe.export.form import Read, ReadForm, known_ahead
from chronomoe.export.graph import build_graph
from chronomoe.export.narrowing import to_int8
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.models.mixture.compression import with_whole_experts
from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.models.sparse.upcycling import SparseChronos2Model

LARGEST_FILE = 2**31 - 2**24
"""Bytes of a graph; the weights of larger ones lie beside it."""


def export_model(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    calibration: Sequence[Batch] | None = None,
    backend: str = "onnx",
) -> Path:
    """Write a student or a mixture as one ONNX graph, whole or not at all.

    ``ChronoMoEPipeline.from_pretrained(folder)`` forecasts with it, with the numbers of the model itself: within 2e-5
    of the scale of a series in float32. Recalibrated bands go with it.

    Args:
        model: a dense Chronos-2 model or a mixture of them, in float32.
        folder: a new or empty folder, or one that holds a checkpoint, which is replaced.
        calibration: batches as ``collate`` makes them. Given these, the products of experts are taken in int8, and
            activations have the ranges that they have on the batches. The router stays float32.
        backend: what runs the folder unless told otherwise, "onnx" (ONNX Runtime) or "openvino". The graph is the same.

    Raises:
        InputError: there is no such backend, the model has MoE layers or adapters, or there is nothing to calibrate on.
    """
    if not isinstance(model, ExactChronos2Model | DistilledMoE) or isinstance(model, SparseChronos2Model):
        raise InputError(
            f"only students and mixtures of them are exported, got a {type(model).__name__}: routing token by token "
            "has no form in one graph that skips work; distil a dense student"
        )
    if backend not in ENGINES:
        raise InputError(f"backend must be one of {', '.join(ENGINES)}, got {backend!r}")
    model = (with_whole_experts(model) if isinstance(model, DistilledMoE) else model).eval()
    if calibration is None:
        graph = build_graph(model)
    else:
        samples = [_read(model, batch) for batch in calibration]
        if not any(sample.observed.any() for sample in samples):
            raise InputError("int8 needs series to calibrate on, got none with a value; pass those that you forecast")
        graph = build_graph(model, narrow=to_int8, samples=samples)
    path = Path(folder).expanduser().resolve()
    with whole_folder(path) as scratch:
        large = graph.ByteSize() > LARGEST_FILE
        onnx.save(graph, scratch / GRAPH, save_as_external_data=large, location=f"{GRAPH}.data" if large else None)
        onnx.checker.check_model(scratch / GRAPH)  # the file: a graph in memory is checked up to 2 GB only
        names = model.config.expert_names if isinstance(model, DistilledMoE) else [path.name]
        config = model.config.to_dict() | {"chronos_pipeline_class": "ChronoMoEPipeline", "expert_names": names}
        config["backend"] = backend
        (scratch / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
        precision = (
            "float32"
            if calibration is None
            else "int8 in the attention and feed-forward products of experts, float32 elsewhere"
        )
        card = model_card(model, name=path.name, sections={"Form": f"One ONNX graph, router included, in {precision}."})
        (scratch / "README.md").write_text(card, encoding="utf-8")
        write_bands(model, scratch)
    return path


@torch.no_grad()
def _read(model: ExactChronos2Model | DistilledMoE, batch: Batch) -> Read:
    """Return what experts read of a batch of windows."""
    context, groups = batch["context"], batch["group_ids"]
    steps = batch["num_output_patches"] * model.chronos_config.output_patch_size
    ahead = known_ahead(batch.get("future_covariates"), rows=len(context), steps=steps)
    read: Read = ReadForm(model).eval()(context, groups, groups, ahead)
    return read
