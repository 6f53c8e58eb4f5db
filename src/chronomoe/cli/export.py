"""The command that writes a checkpoint as one ONNX graph."""

from typing import Annotated

import typer

from chronomoe.cli import options as opt
from chronomoe.errors import InputError


def export(
    model: Annotated[str, typer.Argument(help=opt.MODEL_HELP)],
    out: opt.Out,
    int8: Annotated[
        bool,
        typer.Option("--int8", help="Take feed-forward and output products of experts in int8, calibrated on --data."),
    ] = False,
    backend: Annotated[
        str, typer.Option(help="What runs it unless told otherwise: onnx (ONNX Runtime) or openvino, its own extra.")
    ] = "onnx",
    data: Annotated[
        list[str] | None,
        typer.Option(help="Series like those that will be forecast, for --int8; repeat it. " + opt.DATA_HELP),
    ] = None,
    horizon: opt.Horizon = 48,
    context_length: opt.ContextLength = 512,
    target: opt.Target = None,
    known_covariate: opt.Known = None,
    freq: opt.Freq = None,
) -> None:
    """Write a student or a mixture, router included, as one ONNX graph.

    Writes model.onnx, config.json and a model card, with which `chronomoe predict`
    and ChronoMoEPipeline forecast through ONNX Runtime or OpenVINO. Needs the extra
    "onnx"; to forecast with OpenVINO, "openvino" is enough.

    Example: chronomoe export runs/demo/moe --out exported --int8 --data demo:traffic

    Common errors: a model with MoE layers inside (routes 2 and 3), which has no such
    form, and --int8 without series to calibrate on.
    """
    from chronomoe.stages.export import export_checkpoint

    if int8 != bool(data):
        raise InputError(
            "--int8 needs --data, the series that calibrate it"
            if int8
            else "--data calibrates int8; add --int8, or leave it out"
        )
    path = export_checkpoint(
        model,
        out,
        domains=[opt.read_domain(part, target, known_covariate, freq=freq) for part in data or ()],
        windows=opt.read_windows(context_length, horizon),
        backend=backend,
    )
    print(f"saved {path}")
