"""Products of experts in int8, calibrated on what the experts read."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from chronomoe.export.form import Read


class _Samples(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, reads: list[Read], names: list[str]) -> None:
        self._batches: Iterator[dict[str, Any]] = iter(
            [{name: getattr(read, name).numpy() for name in names} for read in reads]
        )

    def get_next(self) -> dict[str, Any] | None:
        """Return the next batch, None after the last."""
        return next(self._batches, None)


def to_int8(graph: ModelProto, samples: list[Read]) -> ModelProto:
    """Return a student's graph whose products with weights are taken in int8, in attention and feed-forward layers.

    Weights have a scale for each output, activations one for each product, from the range that they have on the
    samples: a forecast does not depend on the rest of its batch. What is left in float32: instance norm, norms,
    attention scores, the residual stream, the patch embedding, and the quantile head, whose error would be the
    forecast's.
    """
    weights = {weight.name for weight in graph.graph.initializer}
    products = [
        node.name
        for node in graph.graph.node
        if node.op_type == "MatMul" and node.input[1] in weights and "blocks." in node.input[1]
    ]
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        onnx.save(graph, before)
        quantize_static(
            before,
            after,
            _Samples(samples, [one.name for one in graph.graph.input]),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            nodes_to_quantize=products,
            op_types_to_quantize=["MatMul"],
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"ActivationSymmetric": False, "QuantizeBias": False},
        )
        return onnx.load(after)
