"""What the commands distil, compose, evaluate and predict do, as functions."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from transformers import PreTrainedModel

from chronomoe.checkpoints.writing import check_parent, content, work_folder
from chronomoe.data.checks import check_columns
from chronomoe.data.domains import Domain
from chronomoe.data.fingerprint import fingerprint
from chronomoe.data.frames import ITEM_ID, TARGET, TIMESTAMP, Series, frame_to_series, read_series, series_to_frame
from chronomoe.data.readers import read_table
from chronomoe.data.soft_targets import SoftTargetStore, revision
from chronomoe.data.windows import EvaluationWindows, JoinedWindows, TrainingWindows, WindowConfig
from chronomoe.errors import InputError
from chronomoe.evaluation.comparison import Candidate, compare_models, kind_of
from chronomoe.evaluation.tasks import make_task
from chronomoe.models.mixture.mixture import MixtureConfig
from chronomoe.models.mixture.router import RoutingConfig
from chronomoe.models.student import StudentConfig, create_student_model
from chronomoe.pipeline import ChronoMoEPipeline, load_teacher
from chronomoe.stages.mixture import route, seeded_mixture
from chronomoe.stages.setup import check_windows
from chronomoe.stages.workspace import Report, Workspace, check_folder, copy_folder, room, whole_file
from chronomoe.training.distillation import DistilConfig, distil
from chronomoe.training.routing import RouterTrainingConfig, forecast_with_experts

VALIDATION_LIMIT = 128
"""Validation windows of each domain."""
_ALWAYS = "(always)"


def distil_domain(
    teacher: str,
    domain: Domain,
    out: Path,
    *,
    windows: WindowConfig,
    student: str | StudentConfig,
    training: DistilConfig,
    pool: int = 8192,
    console: Console | None = None,
) -> Path:
    """Distil one student for one domain into ``out``, which is a checkpoint in the end; resumable until then.

    Args:
        teacher: hub id, folder, s3:// URL or "tiny".
        domain: its training part is learned from, its validation part watched.
        out: a new folder.
        windows: context and horizon.
        student: a preset or a size.
        training: steps, rates and losses.
        pool: training windows that soft targets are computed for.
        console: for progress.
    """
    check_new(out)
    model = load_teacher(teacher)
    check_windows(windows, model)
    size = student if isinstance(student, StudentConfig) else StudentConfig.preset(student, model)
    pool_windows = TrainingWindows(
        [domain], windows, size=min(pool, training.steps * training.batch_size), seed=training.seed
    )
    validation = JoinedWindows([EvaluationWindows(domain, windows, part="validation", limit=VALIDATION_LIMIT)])
    scratch = work_folder(out)
    check_folder(scratch)
    say_skipped(console, pool_windows.skipped)
    work = Workspace(scratch, console=console)
    inputs = {
        "data": fingerprint(domain),
        "teacher": revision(model),
        "windows": vars(windows),
        "training": str(training),
        "size": vars(size),
        "pool": len(pool_windows),
    }

    def ask(folder: Path, report: Report) -> None:
        SoftTargetStore.build(folder / "store", model, pool_windows, progress=report)

    store = work.stage("soft-targets", inputs, ask)

    def train(folder: Path, report: Report) -> None:
        generator = torch.Generator().manual_seed(training.seed)
        made = create_student_model(model, size, generator=generator)
        distil(
            made,
            pool_windows,
            SoftTargetStore(store / "store"),
            training,
            folder / "checkpoints",
            validation=validation,
            progress=report,
        )
        ChronoMoEPipeline(made).save_pretrained(folder / "model")

    trained = work.stage("student", inputs, train)
    copy_folder(trained / "model", out)
    shutil.rmtree(scratch)
    return out


def compose_mixture(
    experts: Mapping[str, str],
    domains: Sequence[Domain],
    out: Path,
    *,
    windows: WindowConfig,
    routing: RoutingConfig,
    router: RouterTrainingConfig,
    router_windows: int = 4096,
    select: int | None = None,
    console: Console | None = None,
) -> Path:
    """Make a mixture of trained students and write its checkpoint to ``out``.

    Args:
        experts: checkpoints by the names they get.
        domains: series that the router learns from: their training part, watched on their validation part.
        out: a new folder.
        windows: context and horizon.
        routing: how scores become choices.
        router: how the router is trained.
        router_windows: windows it learns from.
        select: keep this many experts, chosen greedily; all when None.
        console: for messages.
    """
    check_new(out)
    members = {name: load_teacher(path) for name, path in experts.items()}
    moe = MixtureConfig(routing=routing)
    mixture = seeded_mixture(members, moe, router.seed)
    check_windows(windows, mixture)
    if router_windows < 1:
        raise InputError(f"the router needs at least 1 window to learn from, got {router_windows}")
    if select is not None and not routing.top_k <= select <= len(members):
        raise InputError(f"select must be from top_k ({routing.top_k}) to {len(members)}, the experts, got {select}")
    say = console or Console(stderr=True)
    train_windows = TrainingWindows(domains, windows, size=router_windows, seed=router.seed)
    say_skipped(say, train_windows.skipped)
    joined = JoinedWindows(
        [EvaluationWindows(domain, windows, part="validation", limit=VALIDATION_LIMIT) for domain in domains]
    )
    with say.status("experts forecast the router's windows"):
        owners = [train_windows.domain_of(index) for index in range(router_windows)]
        train = forecast_with_experts(mixture, train_windows, domain_of=owners)
        validation = forecast_with_experts(
            mixture, joined, domain_of=[joined.owner(index) for index in range(len(joined))]
        )
    with say.status("router learns"):
        composed, summary = route(members, train, validation, moe, router, select=select)
    say.print(f"validation loss of the mixture: {summary['validation']['mixture']:.4f}")
    with room(out.parent, out.name):
        ChronoMoEPipeline(composed).save_pretrained(out)
    return out


def compare_checkpoints(
    models: Sequence[str],
    domains: Sequence[Domain],
    *,
    horizon: int,
    context_length: int,
    limit: int,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Score checkpoints and the seasonal naive forecast on the test part of some domains.

    Returns:
        Records: ``model``, ``kind``, ``domain``, ``horizon``, ``metric``, ``value``.

    Raises:
        InputError: the checkpoints forecast other quantile levels, so that their WQL cannot be compared.
    """
    names = [domain.name for domain in domains]
    if len(set(names)) < len(names):
        raise InputError(f"every data set needs a name of its own, got {names}; rename a file")
    if limit < 1:
        raise InputError(f"limit must be at least 1 window, got {limit}")
    windows = WindowConfig(context_length=context_length, horizon=horizon, min_context_length=min(32, context_length))
    say_skipped(console, {domain.name: EvaluationWindows(domain, windows, part="test").skipped for domain in domains})
    tasks = {domain.name: make_task(domain, windows, limit=limit) for domain in domains}
    loaded: dict[str, PreTrainedModel] = {name: ChronoMoEPipeline.from_pretrained(name).model for name in models}
    levels = {name: tuple(model.chronos_config.quantiles) for name, model in loaded.items()}
    if len(set(levels.values())) > 1:
        counts = ", ".join(f"{name} {len(own)}" for name, own in levels.items())
        raise InputError(f"compared models must have the same quantile levels, got {counts}; compare them one by one")
    candidates = {name: Candidate(model=model, kind=kind_of(model)) for name, model in loaded.items()}
    return compare_models(candidates, tasks, levels=next(iter(levels.values()))).records()


def predict_file(
    model: str,
    file: Path,
    *,
    horizon: int,
    out: Path,
    future: Path | None = None,
    target: Sequence[str] | None = None,
    freq: str | None = None,
    levels: Sequence[float] = (0.1, 0.5, 0.9),
    batch_size: int = 256,
) -> int:
    """Forecast every series of a file, write a CSV or Parquet file and return its number of rows.

    Args:
        model: hub id, folder, s3:// URL or "tiny".
        file: past values, long or wide.
        horizon: steps to forecast.
        out: ``.csv`` or ``.parquet``; there whole or not at all.
        future: future values of known covariates, long, with the same item ids.
        target: column to forecast, or several.
        freq: pandas alias of one step; inferred when None.
        levels: quantile levels.
        batch_size: rows forecast at once.

    Raises:
        InputError: a file cannot be read or written, or what is in it breaks a rule of ``frame_to_series``.
    """
    if out.suffix not in (".csv", ".parquet"):
        raise InputError(f"forecasts are written to a .csv or .parquet file, got {out}")
    if horizon < 1:
        raise InputError(f"horizon must be at least 1 step, got {horizon}")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1 row, got {batch_size}")
    check_file_out(out, inputs=[file] if future is None else [file, future])
    names = list(target) if target else [TARGET]
    known = None if future is None else read_table(future)
    covariates = () if known is None else tuple(name for name in known.columns if name not in (ITEM_ID, TIMESTAMP))
    series = list(read_series(file, target=names, known_covariates=covariates, freq=freq))
    ahead = None if known is None else _known_ahead(known, series, covariates, horizon=horizon)
    pipeline = ChronoMoEPipeline.from_pretrained(model)
    parts = []
    for step in dict.fromkeys(item.freq for item in series):  # weeks may start on other days
        items = [item for item in series if item.freq == step]
        part: pd.DataFrame = pipeline.predict_df(
            series_to_frame(items),
            future_df=None if ahead is None else ahead[ahead[ITEM_ID].isin([item.item_id for item in items])],
            target=names,
            prediction_length=horizon,
            quantile_levels=list(levels),
            batch_size=batch_size,
            freq=step,
        )
        parts.append(part)
    forecasts = pd.concat(parts, ignore_index=True)
    with whole_file(out) as scratch:
        if out.suffix == ".csv":
            forecasts.to_csv(scratch, index=False)
        else:
            forecasts.to_parquet(scratch, index=False)
    return len(forecasts)


def _known_ahead(
    known: pd.DataFrame, series: Sequence[Series], covariates: Sequence[str], *, horizon: int
) -> pd.DataFrame:
    """Return the known covariates of the forecast steps; refuse a series that lacks some of them."""
    if not covariates:
        raise InputError("the file of future values needs a column for at least one known covariate, got none")
    if len(series) > 1:
        check_columns([ITEM_ID, TIMESTAMP], list(map(str, known.columns)))
    always = known.assign(**{_ALWAYS: 0.0})  # a target, so that an item without any known value is not left out
    ahead_of = frame_to_series(always, target=_ALWAYS, known_covariates=covariates, freq=series[0].freq)
    found = {item.item_id: item for item in ahead_of}
    for item in series:
        wanted = pd.date_range(item.start, periods=len(item) + horizon, freq=item.freq)[len(item) :]
        ahead = found.get(item.item_id)
        if ahead is None or not ahead.timestamps()[:horizon].equals(wanted):
            got = "none" if ahead is None else f"{len(ahead)} steps from {ahead.start}"
            raise InputError(
                f"future values must cover the {horizon} steps from {wanted[0]} to {wanted[-1]} of item "
                f"{item.item_id!r}, got {got}"
            )
    return series_to_frame([found[item.item_id].cut(0, horizon) for item in series]).drop(columns=_ALWAYS)


def check_file_out(out: Path, *, inputs: Sequence[str | Path]) -> None:
    """Refuse a file to write that is an input, a folder, or lies where nothing can be written."""
    if out.is_dir():
        raise InputError(f"{out} is a folder; name a file to write")
    check_parent(out)
    if out.exists() and any(out.samefile(path) for path in inputs if Path(path).exists()):
        raise InputError(f"{out} is also read; name another file to write")


def check_new(out: Path) -> None:
    """Refuse an output folder that holds anything, or lies where nothing can be written."""
    check_parent(out)
    if out.expanduser().exists() and content(out.expanduser()):
        raise InputError(f"the output folder {out} is not empty; choose a new one")


def say_skipped(console: Console | None, skipped: Mapping[str, int]) -> None:
    """Say how many series of each domain were too short."""
    for name, count in skipped.items():
        if count:
            (console or Console(stderr=True)).print(f"{name}: {count} series too short for a window, skipped")
