"""One ONNX graph of a student or of a whole mixture, router included.

The parts of :mod:`chronomoe.export.form` are exported by torch, students of the same shape once for all, and put
together here: each expert stands in an ``If`` that is entered where a row chose it, and reads just those rows.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from chronomoe.errors import InputError
from chronomoe.export.form import Read, ReadForm, StudentForm, WriteForm
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.models.mixture.mixture import DistilledMoE

OPSET = 20
INPUTS = ("context", "group_ids", "route_ids", "future_covariates")
OUTPUTS = ("quantile_preds", "gates")
FREE_AXES = {
    **dict.fromkeys(("context", "future_covariates", "past", "future", "observed", "same"), (0, 1)),
    **dict.fromkeys(("group_ids", "route_ids", "loc", "scale"), (0,)),
    "mixed": (0, 2),
}
"""Axes of any size, by input."""

Narrow = Callable[[ModelProto, list[Read]], ModelProto]
"""Makes the products of a student narrower, given what it reads."""


def build_graph(
    model: ExactChronos2Model | DistilledMoE, *, narrow: Narrow | None = None, samples: Iterable[Read] = ()
) -> ModelProto:
    """Return the forward pass of a student or mixture as one graph, for batches of any shape.

    Its inputs are ``context`` ``(batch, time)``, NaN where missing, ``group_ids`` and ``route_ids`` ``(batch,)``, and
    ``future_covariates`` ``(batch, horizon)``, NaN where unknown, which sets the horizon. It returns
    ``quantile_preds`` ``(batch, quantile, horizon)`` in the unit of each series, and the gate of each expert,
    ``(batch, expert)``, 0 for those that did not run.

    Args:
        model: a dense Chronos-2 model, or a mixture of them, in float32.
        narrow: makes each expert's products narrower.
        samples: what experts read, for ``narrow``.

    Raises:
        InputError: the model has MoE layers, adapters, or experts that read a series in different ways.
    """
    experts = list(model.members()) if isinstance(model, DistilledMoE) else [model]
    _check(experts)
    batch = _example(model)
    with torch.no_grad():
        read_form = ReadForm(model).eval()
        read = read_form(*batch)
        reading = _export(read_form, batch, inputs=INPUTS, outputs=Read._fields)
        steps = read.future.shape[1] * model.chronos_config.output_patch_size
        mixed = torch.zeros(len(read.loc), len(model.chronos_config.quantiles), steps)
        write = (mixed, read.loc, read.scale, batch[3])
        writing = _export(
            WriteForm(model), write, inputs=("mixed", "loc", "scale", "future_covariates"), outputs=OUTPUTS[:1]
        )
        students = _Students(read, narrow, list(samples))
        bodies = [students.of(expert) for expert in experts]
    return _assemble(reading, writing, bodies, model)


class _Students:
    """Graphs of students, exported once a shape and filled with the weights of each."""

    def __init__(self, read: Read, narrow: Narrow | None, samples: list[Read]) -> None:
        self.read, self.narrow, self.samples = read, narrow, samples
        self._made: dict[str, ModelProto] = {}

    def of(self, model: ExactChronos2Model) -> list[ModelProto]:
        """Return a student's graph for rows that are alone, and for rows that attend to others."""
        graphs = []
        for grouped in (False, True):
            form = StudentForm(model, grouped=grouped).eval()
            weights = {name: part.clone() for name, part in form.named_buffers()}
            sizes = [(name, tuple(part.shape)) for name, part in weights.items()]
            shape = f"{grouped} {sizes} {form.heads} {form.eps} {form.embed.act}"
            if shape not in self._made:
                for part in form.buffers():  # no two alike: torch would store one for both
                    part.uniform_()
                batch = (self.read.past, self.read.future, self.read.observed, self.read.same)
                self._made[shape] = _export(form, batch, inputs=Read._fields[:4], outputs=("normalized",))
            graph = ModelProto()
            graph.CopyFrom(self._made[shape])
            for place in graph.graph.initializer:
                if place.name in weights:
                    place.CopyFrom(numpy_helper.from_array(weights[place.name].numpy(), place.name))
            graphs.append(graph if self.narrow is None else self.narrow(graph, self.samples))
        return graphs


def _check(experts: list[ExactChronos2Model]) -> None:
    for expert in experts:
        if expert.dtype != torch.float32:
            raise InputError(f"only float32 models are exported, got {expert.dtype}; load it with dtype='float32'")
        if expert.chronos_config.time_encoding_scale != experts[0].chronos_config.time_encoding_scale:
            raise InputError(
                "experts must share time_encoding_scale, got "
                f"{sorted({one.chronos_config.time_encoding_scale for one in experts})}; distil them from one teacher"
            )


def _example(model: ExactChronos2Model | DistilledMoE) -> tuple[Tensor, ...]:
    """Make a batch for tracing: no two of its sizes are alike, and none is 1."""
    size = model.chronos_config.input_patch_size
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(5, 3 * size + 1, generator=generator)
    group_ids = torch.tensor([0, 0, 1, 2, 3])
    return context, group_ids, group_ids.clone(), torch.full((5, 2 * size - 1), torch.nan)


def _export(form: nn.Module, batch: tuple[Tensor, ...], *, inputs: Iterable[str], outputs: Iterable[str]) -> ModelProto:
    names = list(inputs)
    free = [{axis: torch.export.Dim.DYNAMIC for axis in FREE_AXES[name]} for name in names]
    with warnings.catch_warnings(action="ignore"):  # of torch, about its own code
        program = torch.onnx.export(
            form,
            batch,
            dynamo=True,
            dynamic_shapes=tuple(free),
            input_names=names,
            output_names=list(outputs),
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None  # with dynamo
    model: ModelProto = program.model_proto
    return model


class _Graph:
    """Nodes and constants in the order in which they are put together."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}

    def add(self, op: str, inputs: Iterable[str], output: str, **attributes: Any) -> str:
        """Add a node of one output and return that."""
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def constant(self, name: str, value: Any) -> str:
        """Add a constant and return its name."""
        self.constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def insert(self, piece: ModelProto, prefix: str, *, shared: str, **names: str) -> None:
        """Add the nodes of a piece, its inputs and outputs under the names given.

        Weights of layers, whose names have a dot, are stored once for one ``shared`` prefix, whatever piece reads them;
        what else a piece holds, such as the ranges of its activations, is its own.
        """
        weights = {}
        for weight in piece.graph.initializer:
            weights[weight.name] = (shared if "." in weight.name else prefix) + weight.name
            if weights[weight.name] not in self.constants:
                renamed = TensorProto()
                renamed.CopyFrom(weight)
                renamed.name = weights[weight.name]
                self.constants[renamed.name] = renamed

        def rename(name: str) -> str:
            return name and (names.get(name) or weights.get(name) or prefix + name)

        for node in piece.graph.node:
            renamed_node = NodeProto()
            renamed_node.CopyFrom(node)
            renamed_node.name = prefix + node.name
            for side in (renamed_node.input, renamed_node.output):
                side[:] = [rename(name) for name in side]
            self.nodes.append(renamed_node)

    def branch(self, condition: str, output: str, then: "_Graph", otherwise: "_Graph") -> str:
        """Add an ``If`` whose branches give their last node's output; constants move out here."""
        bodies = []
        for name, body in (("then", then), ("else", otherwise)):
            self.constants |= body.constants
            result = helper.make_empty_tensor_value_info(body.nodes[-1].output[0])
            bodies.append(helper.make_graph(body.nodes, f"{output}/{name}", [], [result]))
        return self.add("If", [condition], output, then_branch=bodies[0], else_branch=bodies[1])


def _assemble(
    read: ModelProto, write: ModelProto, bodies: list[list[ModelProto]], model: ExactChronos2Model | DistilledMoE
) -> ModelProto:
    graph = _Graph()
    graph.insert(read, "read/", shared="read/", **{name: name for name in (*INPUTS, *Read._fields)})
    settings = model.chronos_config
    batch = graph.add("Shape", ["future"], "batch", start=0, end=1)
    steps = graph.add("Shape", ["future"], "patches", start=1, end=2)
    steps = graph.add("Mul", [steps, graph.constant("patch_size", [settings.output_patch_size])], "steps")
    levels = graph.constant("levels", [len(settings.quantiles)])
    shape = graph.add("Concat", [batch, levels, steps], "shape", axis=0)
    mixed = graph.add(
        "ConstantOfShape", [shape], "mixed/start", value=helper.make_tensor("zero", TensorProto.FLOAT, [1], [0])
    )
    graph.constant("zero", np.float32(0))
    graph.constant("none", np.int64(0))
    graph.constant("first", [0])
    graph.constant("second", [1])
    graph.constant("last_two", [1, 2])
    for index, (alone, grouped) in enumerate(bodies):
        mixed = _add_expert(graph, f"expert{index}", index, mixed, alone, grouped)
    graph.insert(
        write,
        "write/",
        shared="write/",
        mixed=mixed,
        quantile_preds="quantile_preds",
        **{name: name for name in ("loc", "scale", "future_covariates")},
    )
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64 if name.endswith("ids") else TensorProto.FLOAT, axes)
        for name, axes in zip(INPUTS, (["batch", "time"], ["batch"], ["batch"], ["batch", "horizon"]), strict=True)
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, axes)
        for name, axes in zip(
            OUTPUTS, (["batch", len(settings.quantiles), "horizon"], ["batch", len(bodies)]), strict=True
        )
    ]
    whole = helper.make_graph(graph.nodes, "chronomoe", inputs, outputs, list(graph.constants.values()))
    domains = {(one.domain, one.version) for piece in (read, write, *sum(bodies, [])) for one in piece.opset_import}
    return helper.make_model(
        whole,
        producer_name="chronomoe",
        opset_imports=[helper.make_opsetid(*domain) for domain in sorted(domains)],
        ir_version=read.ir_version,
    )


def _add_expert(graph: _Graph, name: str, index: int, mixed: str, alone: ModelProto, grouped: ModelProto) -> str:
    """Add an expert's forecasts, times their gates, to what those before it gave; skip it where no row chose it."""
    place = graph.constant(f"{name}/index", np.int64(index))
    gate = graph.add("Gather", ["gates", place], f"{name}/gate", axis=1)
    chosen = graph.add("Greater", [gate, "zero"], f"{name}/chosen")
    rows = graph.add("Squeeze", [graph.add("NonZero", [chosen], f"{name}/rows2"), "first"], f"{name}/rows")
    count = graph.add("Size", [rows], f"{name}/count")
    any_row = graph.add("Greater", [count, "none"], f"{name}/any")
    run = _Graph()
    read = {part: run.add("Gather", [part, rows], f"{name}/{part}", axis=0) for part in Read._fields[:3]}
    same = run.add("Gather", ["same", rows], f"{name}/same_rows", axis=0)
    read["same"] = run.add("Gather", [same, rows], f"{name}/same", axis=1)
    forms = []
    for kind, piece in (("grouped", grouped), ("alone", alone)):
        form = _Graph()
        form.insert(piece, f"{name}/{kind}/", shared=f"{name}/", normalized=f"{name}/{kind}/normalized", **read)
        forms.append(form)
    normalized = run.branch("together", f"{name}/normalized", *forms)
    weight = run.add("Gather", [gate, rows], f"{name}/weight", axis=0)
    weight = run.add("Unsqueeze", [weight, "last_two"], f"{name}/weight3")
    part = run.add("Mul", [normalized, weight], f"{name}/part")
    target = run.add("Unsqueeze", [rows, "second"], f"{name}/target")
    run.add("ScatterND", [mixed, target, part], f"{name}/mixed/run", reduction="add")
    skip = _Graph()
    skip.add("Identity", [mixed], f"{name}/mixed/skip")
    return graph.branch(any_row, f"{name}/mixed", run, skip)
