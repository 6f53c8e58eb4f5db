"""The command line: each command parses, calls the library and says what was written."""

import json
import os
import shlex
import sys
import warnings
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from chronomoe import __version__
from chronomoe.cli.options import (
    DATA_HELP,
    DEVICE_HELP,
    MODEL_HELP,
    TABLE_HELP,
    BatchSize,
    Cache,
    ContextLength,
    Device,
    Dtype,
    Freq,
    Horizon,
    Known,
    LearningRate,
    Out,
    Seed,
    SoftWeight,
    Target,
    as_path,
    parse_levels,
    read_domain,
    read_windows,
)
from chronomoe.cli.sparse import expand, upcycle
from chronomoe.cli.tables import print_records, print_summary
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
    cache: Cache = None,
) -> None:
    """Distil Chronos-2 into small experts and run them as one Mixture-of-Experts forecaster.

    Start with: chronomoe run demo --out runs/demo
    """


@app.command(cls=Command)
def run(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, such as demo, or a YAML file with the same fields.")],
    out: Out,
    teacher: Annotated[str | None, typer.Option(help="Use this teacher instead of the recipe's. " + MODEL_HELP)] = None,
    steps: Annotated[int | None, typer.Option(help="Use this many training steps instead of the recipe's.")] = None,
    device: Annotated[str | None, typer.Option(help="Use this device instead of the recipe's: " + DEVICE_HELP)] = None,
) -> None:
    """Distil experts, train the router, evaluate and write a report.

    Run the same command again to continue after an interruption; finished stages are skipped.
    The folder ends with report.html, report.md, evaluation.jsonl, config.yaml and moe/, the checkpoint.
    A recipe of your own has the fields of that config.yaml; what it leaves out keeps its default.

    Example: chronomoe run demo --out runs/demo
    """
    from dataclasses import replace

    from chronomoe.checkpoints.writing import check_parent
    from chronomoe.recipe import load_recipe
    from chronomoe.run import run as run_recipe

    check_parent(out)
    config = load_recipe(recipe)
    if teacher is not None:
        config = replace(config, teacher=teacher)
    if steps is not None:
        config = replace(config, budget=replace(config.budget, steps=steps))
    if device is not None:
        config = replace(config, device=device)
    report = run_recipe(config, out, console=Console(stderr=True), command=_command())
    print_summary(out)
    print(f"report: {report}")


@app.command(cls=Command)
def pretrain(
    recipe: Annotated[str, typer.Argument(help="tiny-teacher, or a YAML file with the fields of PretrainConfig.")],
    out: Out,
    steps: Annotated[int | None, typer.Option(help="Use this many steps instead of the recipe's.")] = None,
    device: Device = "auto",
) -> None:
    """Train a Chronos-2 teacher on synthetic series and on the public real ones that the recipe names.

    Real series need the extra "corpus" of the package. The folder ends with the checkpoint, pretrain.json, corpus/ and
    logs/: TensorBoard files with loss, learning rate, windows per second, and the loss on validation domains (those of
    the demo unless named).
    Run the same command again to continue after an interruption; --steps may change until the learning rate falls.
    Several processes: torchrun --nproc-per-node 2 -m chronomoe pretrain ...

    Example: chronomoe pretrain tiny-teacher --out teacher
    """
    from dataclasses import replace

    from chronomoe.checkpoints.writing import check_parent
    from chronomoe.pretraining.card import pretrain_teacher
    from chronomoe.pretraining.config import PretrainConfig
    from chronomoe.recipe import load_recipe

    check_parent(out)
    config = load_recipe(recipe, PretrainConfig)
    if steps is not None:
        config = replace(config, steps=steps)
    pretrain_teacher(
        config,
        out,
        device=device,
        progress=lambda done, total: print(f"corpus: part {done} of {total}", file=sys.stderr),
    )
    print(f"saved {out}")


@app.command(cls=Command)
def distil(
    teacher: Annotated[str, typer.Argument(help=MODEL_HELP)],
    data: Annotated[str, typer.Argument(help=DATA_HELP)],
    out: Out,
    horizon: Horizon = 48,
    context_length: ContextLength = 512,
    student: Annotated[str, typer.Option(help="Size: half, small or slim, relative to the teacher.")] = "small",
    steps: Annotated[int, typer.Option(help="Training steps.")] = 1000,
    batch_size: BatchSize = 64,
    learning_rate: LearningRate = 1e-3,
    soft_weight: SoftWeight = 0.5,
    target: Target = None,
    known_covariate: Known = None,
    freq: Freq = None,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Distil a teacher into one student for one domain; the student loads in stock Chronos2Pipeline too.

    It learns from the first 70 % of each series and is watched on the next 10 %; `chronomoe evaluate` takes the rest.
    Run the same command again to continue after an interruption.

    Example: chronomoe distil tiny demo:traffic --out students/traffic --steps 500
    """
    from chronomoe.stages.students import distil_domain
    from chronomoe.training.distillation import DistilConfig
    from chronomoe.training.losses import LossConfig

    training = DistilConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        loss=LossConfig(soft_weight=soft_weight),
        seed=seed,
    )
    path = distil_domain(
        teacher,
        read_domain(data, target, known_covariate, freq=freq),
        out,
        windows=read_windows(context_length, horizon),
        student=student,
        training=training,
        device=device,
        console=Console(stderr=True),
    )
    print(f"saved {path}")


@app.command(cls=Command)
def compose(
    experts: Annotated[list[str], typer.Argument(help="Checkpoints of students, as name=folder or just the folder.")],
    data: Annotated[list[str], typer.Option(help="Series that the router learns from; repeat it. " + DATA_HELP)],
    out: Out,
    top_k: Annotated[int, typer.Option(help="Experts of a series.")] = 2,
    horizon: Horizon = 48,
    context_length: ContextLength = 512,
    windows: Annotated[int, typer.Option(help="Windows that the router learns from.")] = 4096,
    select: Annotated[int | None, typer.Option(help="Keep this many experts, chosen greedily.")] = None,
    target: Target = None,
    known_covariate: Known = None,
    freq: Freq = None,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Make a mixture of trained students: forecast with each once, train the router, save the checkpoint.

    An expert called generalist can be the fallback of an unsure router; experts must come from teachers that share
    quantile levels, patch size, context and horizon.

    Example: chronomoe compose students/traffic students/web --data demo:traffic --data demo:web --out moe --top-k 2
    """
    from chronomoe.models.mixture.router import RoutingConfig
    from chronomoe.stages.mixture import compose_mixture
    from chronomoe.training.routing import RouterTrainingConfig

    named = {name or Path(path).name: path for name, _, path in (part.rpartition("=") for part in experts)}
    if len(named) < len(experts):
        raise InputError(f"every expert needs a name of its own, got {experts}; write name=folder")
    path = compose_mixture(
        named,
        [read_domain(part, target, known_covariate, freq=freq) for part in data],
        out,
        windows=read_windows(context_length, horizon),
        routing=RoutingConfig(top_k=top_k),
        router=RouterTrainingConfig(seed=seed),
        router_windows=windows,
        select=select,
        device=device,
        console=Console(stderr=True),
    )
    print(f"saved {path}")


app.command(cls=Command)(upcycle)
app.command(cls=Command)(expand)


@app.command(cls=Command)
def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Checkpoints to compare: hub ids, folders, s3:// URLs or 'tiny'.")
    ],
    data: Annotated[list[str], typer.Option(help="Series to test on; repeat it. " + DATA_HELP)],
    horizon: Horizon,
    out: Annotated[
        Path, typer.Option("--out", "-o", parser=as_path, metavar="PATH", help="JSON lines file for the records.")
    ],
    context_length: ContextLength = 512,
    limit: Annotated[int, typer.Option(help="Windows of each data set, at most.")] = 400,
    target: Target = None,
    known_covariate: Known = None,
    freq: Freq = None,
    seasonality: Annotated[
        int | None, typer.Option(help="Steps of the main period; by default what is usual, such as 24 for hours.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Score checkpoints and the seasonal naive forecast on the last fifth of the series; write one record a line.

    A record has model, kind, domain, horizon, metric (WQL, SQL, MASE, MAE, MSE, coverage and others) and value.

    Example: chronomoe evaluate moe tiny --data demo:traffic --data demo:web --horizon 48 --out evaluation.jsonl
    """
    from chronomoe.stages.evaluation import evaluate_checkpoints
    from chronomoe.stages.workspace import check_file_out

    check_file_out(out, inputs=data)
    records = evaluate_checkpoints(
        models,
        [read_domain(part, target, known_covariate, seasonality, freq) for part in data],
        horizon=horizon,
        context_length=context_length,
        limit=limit,
        device=device,
    )
    _write_lines(records, out)
    print_records(records)
    print(f"saved {out}")


@app.command(cls=Command)
def predict(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    file: Annotated[Path, typer.Argument(help=f"Past values: {TABLE_HELP}.")],
    horizon: Horizon,
    out: Annotated[
        Path, typer.Option("--out", "-o", parser=as_path, metavar="PATH", help="CSV or Parquet file for the forecasts.")
    ],
    future: Annotated[
        Path | None, typer.Option(help="File with item_id, timestamp and the known covariates of the forecast steps.")
    ] = None,
    target: Target = None,
    freq: Freq = None,
    levels: Annotated[str, typer.Option(help="Quantile levels, separated by commas.")] = "0.1,0.5,0.9",
    batch_size: Annotated[int, typer.Option(help="Series forecast at once.")] = 256,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Forecast every series of a file.

    The result has a row for each step: item_id, timestamp, target_name, predictions (the median), and a column for each
    quantile level. Forecasts start one step after the last row of each series.

    Example: chronomoe predict moe past.csv --horizon 48 --out forecasts.csv
    """
    from chronomoe.predict import predict_file

    rows = predict_file(
        model,
        file,
        horizon=horizon,
        out=out,
        future=future,
        target=target,
        freq=freq,
        levels=parse_levels(levels),
        batch_size=batch_size,
        device=device,
        dtype=dtype,
    )
    print(f"saved {out}: {rows} rows")


@app.command(cls=Command)
def report(folder: Annotated[Path, typer.Argument(help="Folder of a run.")]) -> None:
    """Write report.html and report.md of a finished run again.

    Example: chronomoe report runs/demo
    """
    from chronomoe.report.page import write_report

    print(f"report: {write_report(folder)}")


def _write_lines(records: list[dict[str, Any]], path: Path) -> None:
    from chronomoe.stages.workspace import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))


def _command() -> str:
    return shlex.join(["chronomoe", *sys.argv[1:]])


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
        _complain("interrupted; what was finished stays", _INTERRUPTED)
    raise SystemExit(status)


def _complain(message: str, status: int) -> int:
    print(f"chronomoe: {' '.join(message.split())}", file=sys.stderr)
    return status
