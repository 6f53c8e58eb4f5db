"""Commands for a mixture in use: are its forecasts still good, and do its bands cover what they say."""

import json
from pathlib import Path
from typing import Annotated

import typer

from chronomoe.cli import options as opt
from chronomoe.errors import InputError


def recalibrate(
    model: opt.Model,
    data: Annotated[list[str], typer.Argument(help="Series to calibrate on, one or more. " + opt.DATA_HELP)],
    out: opt.Out,
    horizon: opt.Horizon = 48,
    context_length: opt.ContextLength = 512,
    part: Annotated[
        str, typer.Option(help="Of each series: validation (the tenth before the last fifth), test or train.")
    ] = "validation",
    limit: Annotated[int, typer.Option(help="Windows per data set, at most.")] = 2000,
    target: opt.Target = None,
    known_covariate: opt.Known = None,
    freq: opt.Freq = None,
    device: opt.Device = "auto",
) -> None:
    """Stretch the quantile bands of a checkpoint so that they cover what they say.

    Split-conformal calibration of each central band and forecast step, for
    each expert on its own (conformalized quantile regression; Romano et al.,
    2019, https://arxiv.org/abs/1905.03222). Writes the checkpoint with its
    bands; the median and the weights stay.

    Example: chronomoe recalibrate moe demo:traffic demo:web --out calibrated

    Common errors: series too short for context and horizon, too few windows
    for the widest band, and an exported graph.
    """
    from chronomoe.stages.bands import recalibrate_checkpoint

    if part not in ("train", "validation", "test"):
        raise InputError(f"part must be train, validation or test, got {part!r}")
    bands = recalibrate_checkpoint(
        model,
        [opt.read_domain(one, target, known_covariate, freq=freq) for one in data],
        out,
        windows=opt.read_windows(context_length, horizon),
        part=part,  # type: ignore[arg-type]
        limit=limit,
        device=device,
    )
    own = int((bands.windows > 0).sum())
    print(f"saved {out}: bands of {own} experts of {len(bands.windows)} from their own windows, the others from all")


def monitor(
    forecasts: Annotated[Path, typer.Argument(help="What `chronomoe predict` wrote, CSV or Parquet.")],
    actuals: Annotated[
        Path, typer.Argument(help="CSV or Parquet file, long or wide, with the values that have arrived since.")
    ],
    target: opt.Target = None,
    since: Annotated[
        str | None,
        typer.Option(help="First time that is judged, against all before; by default half of the values come before."),
    ] = None,
    seasonality: Annotated[int | None, typer.Option(help="Steps of the main period; by default the usual one.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", parser=opt.as_path, metavar="PATH", help="JSON lines file to write, one a group."),
    ] = None,
) -> None:
    """Score past forecasts once values arrive, and say whether to distil again.

    Prints WQL and coverage of the 80 % band for all series, and for each value of
    the columns expert (chronomoe predict --experts writes it) and domain, of
    either file. "distil again": the loss rose by more than 10 % against that of
    repeating the last season; "recalibrate": the band covers over 5 points more
    or less than 80 %; both with 95 % confidence.

    Example: chronomoe monitor forecasts.parquet actuals.parquet

    Common errors: item ids that differ between the files, forecasts without the
    levels 0.1, 0.5 and 0.9, and values that do not reach back a season.
    """
    import pandas as pd

    from chronomoe.cli.tables import print_monitored
    from chronomoe.data.checks import as_timestamps
    from chronomoe.data.files import read_table
    from chronomoe.evaluation.monitoring import monitor as judge
    from chronomoe.stages.workspace import check_file_out, write_atomically

    if out is not None:
        check_file_out(out, inputs=[forecasts, actuals])
    begin = None if since is None else as_timestamps(pd.Series([since], name="since"))[0]
    found = judge(
        read_table(forecasts), read_table(actuals), target=target or ["target"], since=begin, seasonality=seasonality
    )
    print_monitored(found)
    if out is not None:
        rows = [
            json.loads(json.dumps(one._asdict()), parse_constant=lambda _: None) for one in found
        ]  # JSON has no NaN
        write_atomically(out, "".join(json.dumps(row) + "\n" for row in rows))
        print(f"saved {out}")


def grow(
    model: opt.Model,
    domain: Annotated[str, typer.Argument(help="Series of the new domain. " + opt.DATA_HELP)],
    name: Annotated[str, typer.Option(help="Of the new expert.")],
    data: Annotated[
        list[str], typer.Option(help="Series of the domains that the mixture has; repeat it. " + opt.DATA_HELP)
    ],
    out: opt.Out,
    teacher: Annotated[
        str | None, typer.Option(help="Learn from its forecasts too; by default from what happened alone.")
    ] = None,
    from_teacher: Annotated[
        bool, typer.Option("--from-teacher", help="Cut the expert from the teacher instead of branching.")
    ] = False,
    horizon: opt.Horizon = 48,
    context_length: opt.ContextLength = 512,
    steps: Annotated[int, typer.Option(help="Training steps of the expert.")] = 200,
    batch_size: opt.BatchSize = 64,
    learning_rate: opt.LearningRate = 1e-3,
    soft_weight: opt.SoftWeight = 0.1,
    windows: Annotated[int, typer.Option(help="Windows that the router learns from.")] = 4096,
    target: opt.Target = None,
    known_covariate: opt.Known = None,
    freq: opt.Freq = None,
    device: opt.Device = "auto",
    seed: opt.Seed = 0,
) -> None:
    """Add an expert for a new domain to a mixture, and train the router anew.

    The expert branches from the one that forecasts the new domain best. The
    others stay as they are, to the bit. After an interruption the same command
    continues.

    Example: chronomoe grow moe demo:web --name web --data demo:traffic --data demo:weather --teacher tiny --out grown

    Common errors: a name that an expert has, a teacher other than the mixture's,
    and no --data: without the other domains, the router cannot learn which
    series the new expert is not for.
    """
    from chronomoe.stages.adding import grow_mixture
    from chronomoe.training.arguments import DistilConfig
    from chronomoe.training.losses import LossConfig
    from chronomoe.training.routing import RouterTrainingConfig

    path = grow_mixture(
        model,
        opt.read_domain(domain, target, known_covariate, freq=freq),
        [opt.read_domain(one, target, known_covariate, freq=freq) for one in data],
        out,
        name=name,
        teacher=teacher,
        from_teacher=from_teacher,
        windows=opt.read_windows(context_length, horizon),
        training=opt.pick(DistilConfig, locals(), loss=LossConfig(soft_weight=soft_weight)),
        router=RouterTrainingConfig(seed=seed),
        router_windows=windows,
        device=device,
    )
    print(f"saved {path}")


def compress(
    model: opt.Model,
    out: opt.Out,
    rank: Annotated[
        int, typer.Option(help="Of an expert's change of each matrix: more is closer to the mixture, and larger.")
    ] = 16,
) -> None:
    """Keep the experts of a mixture as low-rank changes of one model.

    That model is the expert called generalist, or the mean of all. Nothing is
    trained: each change is cut to its largest singular values and kept as int8.
    For mixtures of many experts that branched from one student.

    Example: chronomoe compress moe --rank 16 --out compressed

    Common error: experts of different sizes.
    """
    from chronomoe.stages.adding import compress_checkpoint

    made = compress_checkpoint(model, out, rank=rank)
    size = sum(value.nbytes for value in made.state_dict().values())
    print(f"saved {out}: {len(made.experts)} experts of rank {rank}, {size / 1e6:.1f} MB")
