"""What the commands distil, compose, evaluate and predict do, as functions."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from chronomoe.checkpoints.writing import check_parent, content, work_folder
from chronomoe.data.domains import Domain
from chronomoe.data.fingerprint import fingerprint
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
from chronomoe.stages.workspace import Report, Workspace, check_folder, copy_folder, room
from chronomoe.training.distillation import DistilConfig, distil
from chronomoe.training.routing import RouterTrainingConfig, forecast_with_experts

VALIDATION_LIMIT = 128
"""Validation windows of each domain."""


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
