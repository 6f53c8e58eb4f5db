"""The command line: each command parses, calls the library and says what was written."""

import functools
import json
import os
import sys
import warnings
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from chronomoe import __version__
from chronomoe.cli import options as opt
from chronomoe.cli.export import export
from chronomoe.cli.production import compress, grow, monitor, recalibrate
from chronomoe.cli.recipes import plan, run
from chronomoe.cli.serve import serve
from chronomoe.cli.sparse import expand, upcycle
from chronomoe.cli.tables import print_records
from chronomoe.cli.threads import limit_threads
from chronomoe.errors import InputError

app = typer.Typer(
    name="chronomoe",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


class Command(TyperCommand):
    """A command that loads what models need when it runs, and not when it only shows its help."""

    def invoke(self, ctx: Any) -> Any:
        """Register our architectures, keep libraries quiet and threads to our processors, and run."""
        import huggingface_hub
        import transformers

        from chronomoe.checkpoints.registration import register
        from chronomoe.stages.processes import first_process

        transformers.logging.disable_progress_bar()  # of loading and saving small files; stages show their own
        transformers.logging.set_verbosity_error()
        huggingface_hub.logging.set_verbosity_error()
        register()
        limit_threads()
        with ExitStack() as quiet:
            if not first_process():  # of several, the first alone speaks
                quiet.enter_context(redirect_stdout(quiet.enter_context(Path(os.devnull).open("w"))))
            return super().invoke(ctx)


command = functools.partial(app.command, cls=Command)


def _show_version(wanted: bool) -> bool:
    if wanted:
        print(f"chronomoe {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    cache: opt.Cache = None,
) -> None:
    """Distil Chronos-2 into small experts and run them as one Mixture-of-Experts forecaster.

    Start with: chronomoe run demo --out runs/demo

    chronomoe COMMAND --help describes a command, with an example.
    A mistake in arguments or files prints one line and exits with status 2.
    """


command()(run)
command()(plan)


@command()
def pretrain(
    recipe: Annotated[str, typer.Argument(help="tiny-teacher, or a YAML file with the fields of PretrainConfig.")],
    out: opt.Out,
    steps: Annotated[int | None, typer.Option(help="Training steps instead of the recipe's.")] = None,
    device: opt.Device = "auto",
) -> None:
    """Train a Chronos-2 teacher on synthetic series and the real ones that the recipe names.

    Writes the checkpoint, pretrain.json, corpus/ and TensorBoard files in logs/.
    After an interruption the same command continues; --steps may change until
    the learning rate begins to fall. It also runs in several processes:
    torchrun --nproc-per-node 2 -m chronomoe pretrain ...

    Example: chronomoe pretrain tiny-teacher --out teacher

    Common errors: a missing extra (pip install 'chronomoe[pretrain]', for real
    series 'chronomoe[corpus]'), and an output folder with another run.
    """
    from chronomoe.checkpoints.writing import check_parent
    from chronomoe.pretraining.card import pretrain_teacher
    from chronomoe.pretraining.config import PretrainConfig
    from chronomoe.recipe import load_recipe

    check_parent(out)
    config = load_recipe(recipe, PretrainConfig)
    if steps is not None:
        config = replace(config, steps=steps)

    def progress(done: int, total: int) -> None:
        print(f"corpus: part {done} of {total}", file=sys.stderr)

    pretrain_teacher(config, out, device=device, progress=progress)
    print(f"saved {out}")


@command()
def distil(
    teacher: opt.Model,
    data: Annotated[str, typer.Argument(help=opt.DATA_HELP)],
    out: opt.Out,
    horizon: opt.Horizon = 48,
    context_length: opt.ContextLength = 512,
    student: Annotated[str, typer.Option(help="Size relative to the teacher: half, small or slim.")] = "small",
    steps: Annotated[int, typer.Option(help="Training steps.")] = 1000,
    batch_size: opt.BatchSize = 64,
    learning_rate: opt.LearningRate = 1e-3,
    soft_weight: opt.SoftWeight = 0.5,
    target: opt.Target = None,
    known_covariate: opt.Known = None,
    freq: opt.Freq = None,
    precision: opt.Precision = "auto",
    device: opt.Device = "auto",
    engine: opt.Engine = "local",
    workers: opt.Workers = None,
    seed: opt.Seed = 0,
) -> None:
    """Distil a teacher into one student for one domain.

    Writes a checkpoint that stock Chronos2Pipeline loads too. The student
    learns from the first 70 % of each series and is validated on the next 10 %;
    the rest is for chronomoe evaluate. With --engine ray, the teacher labels on
    a cluster. After an interruption the same command continues.

    Example: chronomoe distil tiny demo:traffic --out students/traffic --steps 500

    Common errors: series too short for context and horizon, a time step that
    cannot be inferred (give --freq), and an output folder that is not empty.
    """
    from chronomoe.stages.students import distil_domain
    from chronomoe.training.arguments import DistilConfig
    from chronomoe.training.losses import LossConfig

    training = opt.pick(DistilConfig, locals(), loss=LossConfig(soft_weight=soft_weight))
    path = distil_domain(
        teacher,
        opt.read_domain(data, target, known_covariate, freq=freq),
        out,
        windows=opt.read_windows(context_length, horizon),
        student=student,
        training=training,
        precision=precision,  # type: ignore[arg-type]  # distil_domain checks it
        device=device,
        engine=engine,
        workers=workers,
    )
    print(f"saved {path}")


@command()
def compose(
    experts: Annotated[list[str], typer.Argument(help="Checkpoints of students: folder, or name=folder.")],
    data: Annotated[list[str], typer.Option(help="Series that the router learns from; repeat it. " + opt.DATA_HELP)],
    out: opt.Out,
    top_k: Annotated[int, typer.Option(help="Experts per series, at most.")] = 2,
    horizon: opt.Horizon = 48,
    context_length: opt.ContextLength = 512,
    windows: Annotated[int, typer.Option(help="Windows that the router learns from.")] = 4096,
    select: Annotated[int | None, typer.Option(help="Experts to keep, chosen greedily; all by default.")] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint that forecasts series unlike all of --data: it joins the mixture; none by default."
        ),
    ] = None,
    familiar: Annotated[
        float,
        typer.Option(help="Share of the validation windows of --data that stays with the experts, with --teacher."),
    ] = 0.98,
    target: opt.Target = None,
    known_covariate: opt.Known = None,
    freq: opt.Freq = None,
    device: opt.Device = "auto",
    seed: opt.Seed = 0,
) -> None:
    """Make a mixture of trained students.

    Each student forecasts all windows once, and the router learns from these
    forecasts. Writes the checkpoint of the mixture. An expert called generalist
    can be the fallback of an unsure router. With --teacher, series unlike all
    that the router learned from are forecast by that checkpoint alone.

    Example: chronomoe compose students/traffic students/web --data demo:traffic --data demo:web --out moe --top-k 2

    Common errors: experts whose teachers differ in quantile levels, patch size,
    context or horizon, two experts of one name (write name=folder), and
    --top-k or --select above the number of experts.
    """
    from chronomoe.models.mixture.familiarity import UnfamiliarConfig
    from chronomoe.models.mixture.router import RoutingConfig
    from chronomoe.stages.mixture import compose_mixture
    from chronomoe.training.routing import RouterTrainingConfig

    named = {name or Path(path).name: path for name, _, path in (part.rpartition("=") for part in experts)}
    if len(named) < len(experts):
        raise InputError(f"every expert needs a name of its own, got {experts}; write name=folder")
    path = compose_mixture(
        named,
        [opt.read_domain(part, target, known_covariate, freq=freq) for part in data],
        out,
        windows=opt.read_windows(context_length, horizon),
        routing=RoutingConfig(top_k=top_k),
        router=RouterTrainingConfig(seed=seed),
        router_windows=windows,
        select=select,
        teacher=teacher,
        unfamiliar=UnfamiliarConfig(familiar=familiar),
        device=device,
    )
    print(f"saved {path}")


command()(upcycle)
command()(expand)
command()(export)
command()(grow)
command()(compress)
command()(recalibrate)
command()(monitor)
command()(serve)


@command()
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Checkpoints: hub ids, folders, s3:// URLs or 'tiny'.")],
    data: Annotated[list[str], typer.Option(help="Series to test on; repeat it. " + opt.DATA_HELP)],
    horizon: opt.Horizon,
    out: opt.OutFile,
    context_length: opt.ContextLength = 512,
    limit: Annotated[int, typer.Option(help="Windows per data set, at most.")] = 400,
    target: opt.Target = None,
    known_covariate: opt.Known = None,
    freq: opt.Freq = None,
    seasonality: Annotated[
        int | None, typer.Option(help="Steps of the main period; by default the usual one, such as 24 for hours.")
    ] = None,
    device: opt.Device = "auto",
) -> None:
    """Score checkpoints and the seasonal naive forecast on the last fifth of the series.

    Writes JSON lines, one record per line: model, kind, domain, horizon, metric
    (WQL, SQL, MASE, MAE, MSE, coverage and others) and value.

    Example: chronomoe evaluate moe tiny --data demo:traffic --data demo:web --horizon 48 --out evaluation.jsonl

    Common errors: checkpoints with different quantile levels, two data sets of
    one name, and series too short for the horizon.
    """
    from chronomoe.stages.evaluation import evaluate_checkpoints
    from chronomoe.stages.workspace import check_file_out, write_atomically

    check_file_out(out, inputs=data)
    records = evaluate_checkpoints(
        models,
        [opt.read_domain(part, target, known_covariate, seasonality, freq) for part in data],
        horizon=horizon,
        context_length=context_length,
        limit=limit,
        device=device,
    )
    write_atomically(out, "".join(json.dumps(record) + "\n" for record in records))
    print_records(records)
    print(f"saved {out}")


@command()
def predict(
    model: opt.Model,
    file: Annotated[Path, typer.Argument(help=f"Past values: {opt.TABLE_HELP}, or a folder of such parts.")],
    horizon: opt.Horizon,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", parser=opt.as_path, metavar="PATH", help="File to write; of a folder of parts, a new folder."
        ),
    ],
    future: Annotated[
        Path | None,
        typer.Option(
            help="File with item_id, timestamp and the known covariates of the forecast steps; of parts, or a folder "
            "of files named like them."
        ),
    ] = None,
    target: opt.Target = None,
    freq: opt.Freq = None,
    levels: Annotated[str, typer.Option(help="Quantile levels, separated by commas.")] = "0.1,0.5,0.9",
    batch_size: Annotated[int, typer.Option(help="Series to forecast at once.")] = 256,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "float32",
    experts: Annotated[bool, typer.Option("--experts", help="Add a column with the main expert of a series.")] = False,
    engine: opt.Engine = "local",
    workers: opt.Workers = None,
) -> None:
    """Forecast every series of a file, or of a folder of parts.

    Writes a .csv or .parquet file with one row per step: item_id, timestamp,
    target_name, predictions (the median), and a column per quantile level. The
    first step follows the last row of each series. Of a folder, where --out
    names a folder too, each part is forecast on its own, here or by the workers
    of --engine ray. After an interruption the same command continues.

    Example: chronomoe predict moe past.csv --horizon 48 --out forecasts.csv

    Common errors: a missing column (name it with --target), a time step that
    cannot be inferred (give --freq), and a --future file without a row for
    every forecast step.
    """
    from chronomoe.predict.files import Forecaster
    from chronomoe.predict.parts import predict_parts

    numbers = opt.split(levels, float, "quantile levels must be numbers separated by commas, such as 0.1,0.5,0.9")
    asked = opt.pick(Forecaster, locals(), levels=numbers)
    if engine == "local" and (out.suffix or not file.is_dir()):
        rows = asked.write(file, out)
    else:
        rows = predict_parts(asked, file, out, engine=engine, workers=workers)
    print(f"saved {out}: {rows} rows")


@command()
def report(folder: Annotated[Path, typer.Argument(help="Folder of a run.")]) -> None:
    """Write report.html and report.md of a finished run again.

    Example: chronomoe report runs/demo

    Common error: a run that has not been evaluated; finish it first.
    """
    from chronomoe.report.page import write_report

    print(f"report: {write_report(folder)}")


_INTERRUPTED = 130
_WRONG_USAGE: type[Exception] = typer.BadParameter.__mro__[1]
"""The class of all complaints about arguments, which typer does not export."""


def main() -> None:
    """Run the command line: a caller's mistake is one line on stderr and status 2, an interruption one and 130."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.formatwarning = lambda message, *_, **__: f"chronomoe: {' '.join(str(message).split())}\n"
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    try:
        status = app(prog_name="chronomoe", standalone_mode=False)
    except InputError as error:
        status = _complain(str(error), 2)
    except _WRONG_USAGE as error:
        context = getattr(error, "ctx", None)
        command = "chronomoe" if context is None else context.command_path
        message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        status = _complain(f"{message}; see {command} --help", 2)
    if status == _INTERRUPTED:
        _complain("interrupted; finished work is kept", _INTERRUPTED)
    raise SystemExit(status)


def _complain(message: str, status: int) -> int:
    print(f"chronomoe: {' '.join(message.split())}", file=sys.stderr)
    return status
