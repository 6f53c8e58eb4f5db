"""How fast do ONNX Runtime and OpenVINO forecast with an exported mixture, against the checkpoint itself?

A mixture of students of a full-size Chronos-2 with random weights, exported in float32 and in int8, and the same
mixture in float32 and bf16 forecast the same rows in turns, on as many threads. OpenVINO takes part where it is
installed. int8 is calibrated on other rows. Differences are relative to the spread of the forecasts; with random
weights those of int8 say nothing of trained ones.
"""

import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from answer import answer, batch_options, forecast, full_size, in_turns, medians, mixture_of, ratio

from chronomoe.evaluation.cost import varied_context
from chronomoe.export.folder import export_model
from chronomoe.export.runtime import OnnxModel
from chronomoe.models.precision import has_bfloat16_units

TURNS = {1: 20, 64: 4}
"""For each size of a batch."""


def main() -> None:
    options = batch_options(__doc__, batch_sizes=[1, 64])
    teacher = full_size(num_layers=options.layers)
    mixture = mixture_of(teacher, preset=options.preset, num_experts=options.num_experts)
    patches = -(-options.horizon // mixture.chronos_config.output_patch_size)
    seen = varied_context(32, context_length=options.context_length, seed=1)
    calibration = [{"context": seen, "group_ids": torch.arange(len(seen)), "num_output_patches": patches}]
    reach, times, differences = {}, {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {
            kind: export_model(mixture, Path(scratch) / kind, calibration=batches)
            for kind, batches in (("float32", None), ("int8", calibration))
        }
        runtimes = {"ONNX": "onnx"} | ({"OpenVINO": "openvino"} if find_spec("openvino") else {})
        graphs = {
            f"{runtime} in {kind}": OnnxModel(folder, backend=backend)
            for runtime, backend in runtimes.items()
            for kind, folder in folders.items()
        }
        sizes = {kind: (folder / "model.onnx").stat().st_size for kind, folder in folders.items()}
        for rows in options.batch_sizes:
            context = varied_context(rows, context_length=options.context_length)
            sides = {"checkpoint float32": forecast(mixture, context, horizon=options.horizon)}
            if has_bfloat16_units(mixture.device):
                sides["checkpoint bf16"] = forecast(mixture, context, horizon=options.horizon, dtype=torch.bfloat16)
            for name, graph in graphs.items():
                sides[name] = lambda graph=graph, rows=context: graph(rows, num_output_patches=patches)
            expected = sides["checkpoint float32"]().quantile_preds
            for name in graphs:
                gap = (sides[name]().quantile_preds - expected).abs().max() / expected.std()
                differences[f"{name}, batch {rows}"] = float(f"{gap.item():.2g}")
            seconds = in_turns(sides, repeats=options.repeats or TURNS.get(rows, 4))
            times[rows] = medians(seconds)
            for name in graphs:
                reach[f"{name} against the checkpoint in float32, batch {rows}"] = ratio(
                    seconds, over="checkpoint float32", under=name
                )
            for runtime in runtimes:
                reach[f"{runtime} in int8 against its float32, batch {rows}"] = ratio(
                    seconds, over=f"{runtime} in float32", under=f"{runtime} in int8"
                )
    answer(
        "ONNX Runtime and OpenVINO against the checkpoint",
        reach=reach,
        num_experts=options.num_experts,
        preset=options.preset,
        milliseconds=times,
        largest_difference=differences,
        graph_megabytes={kind: round(size / 1e6, 1) for kind, size in sizes.items()},
    )


if __name__ == "__main__":
    main()
