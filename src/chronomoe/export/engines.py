"""What runs an exported graph: ONNX Runtime or OpenVINO."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from chronomoe.errors import InputError, extra

Arrays = dict[str, NDArray[Any]]
Run = Callable[[Sequence[str], Arrays], list[NDArray[Any]]]
"""Returns the outputs named of inputs by name; several threads may call it."""
MOST_STREAMS = 4
"""Forecasts that OpenVINO computes at once, each for 50 MB more of memory."""


def open_in_onnx_runtime(path: Path, threads: int) -> Run:
    """Open a graph in ONNX Runtime."""
    with extra("onnx"):
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's errors have no common class of their own
        if type(error).__module__.startswith("onnxruntime"):
            raise _unreadable(path, error) from None
        raise
    needed = onnxruntime.RunOptions()
    needed.only_execute_path_to_fetches = True

    def run(outputs: Sequence[str], arrays: Arrays) -> list[NDArray[Any]]:
        found: list[NDArray[Any]] = session.run(outputs, arrays, needed)
        return found

    return run


def open_in_openvino(path: Path, threads: int) -> Run:
    """Open a graph in OpenVINO, in the precision that the graph has."""
    with extra("openvino"):
        import openvino
    streams = max(1, min(MOST_STREAMS, (os.cpu_count() or 1) // threads))
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": threads * streams,
        "INFERENCE_PRECISION_HINT": "f32",  # else bf16 where the processor has it, scaling of series included
        "ENABLE_CPU_PINNING": False,  # else processes share the first cores
    }
    try:
        model = openvino.Core().compile_model(path, "CPU", options)
    except RuntimeError as error:
        raise _unreadable(path, error) from None

    def run(outputs: Sequence[str], arrays: Arrays) -> list[NDArray[Any]]:
        found = model.create_infer_request().infer(arrays)
        return [found[name] for name in outputs]

    return run


ENGINES = {"onnx": open_in_onnx_runtime, "openvino": open_in_openvino}
"""By the name of the backend."""


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"cannot load {str(path)!r}: {' '.join(str(error).split())}")
