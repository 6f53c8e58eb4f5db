"""How fast does ONNX Runtime forecast with an exported mixture, in float32 and int8, against the checkpoint itself?

A mixture of students of a full-size Chronos-2 with random weights, exported twice, and the same mixture in float32 and
bf16 forecast the same rows in turns, on as many threads. int8 is calibrated on other rows. Differences are relative to
the spread of the forecasts; with random weights those of int8 say nothing of trained ones.
"""

import tempfile
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
        graphs = {
            kind: OnnxModel(export_model(mixture, Path(scratch) / kind, calibration=batches))
            for kind, batches in (("float32", None), ("int8", calibration))
        }
        sizes = {kind: (Path(scratch) / kind / "model.onnx").stat().st_size for kind in graphs}
        for rows in options.batch_sizes:
            context = varied_context(rows, context_length=options.context_length)
            sides = {"checkpoint float32": forecast(mixture, context, horizon=options.horizon)}
            if has_bfloat16_units(mixture.device):
                sides["checkpoint bf16"] = forecast(mixture, context, horizon=options.horizon, dtype=torch.bfloat16)
            for kind, graph in graphs.items():
                sides[f"ONNX {kind}"] = lambda graph=graph, rows=context: graph(rows, num_output_patches=patches)
            expected = sides["checkpoint float32"]().quantile_preds
            for kind in graphs:
                gap = (sides[f"ONNX {kind}"]().quantile_preds - expected).abs().max() / expected.std()
                differences[f"{kind}, batch {rows}"] = float(f"{gap.item():.2g}")
            seconds = in_turns(sides, repeats=options.repeats or TURNS.get(rows, 4))
            times[rows] = medians(seconds)
            for kind in graphs:
                reach[f"ONNX in {kind} against the checkpoint in float32, batch {rows}"] = ratio(
                    seconds, over="checkpoint float32", under=f"ONNX {kind}"
                )
    answer(
        "ONNX Runtime against the checkpoint",
        reach=reach,
        num_experts=options.num_experts,
        preset=options.preset,
        milliseconds=times,
        largest_difference=differences,
        graph_megabytes={kind: round(size / 1e6, 1) for kind, size in sizes.items()},
    )


if __name__ == "__main__":
    main()
