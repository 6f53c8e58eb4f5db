"""The stages that make a mixture of trained students: expert forecasts, router, joint fine-tuning."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from chronos.chronos2 import Chronos2Model
from rich.console import Console

from chronomoe.data.domains import Domain
from chronomoe.data.soft_targets import revision
from chronomoe.data.windows import JoinedWindows, TrainingWindows, WindowConfig
from chronomoe.errors import InputError
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.models.mixture.config import MixtureConfig
from chronomoe.models.mixture.cores import check_same_task
from chronomoe.models.mixture.familiarity import UnfamiliarConfig
from chronomoe.models.mixture.mixture import DistilledMoE, build_mixture
from chronomoe.models.mixture.router import RoutingConfig
from chronomoe.models.sparse.upcycling import check_dense
from chronomoe.pipeline import ChronoMoEPipeline, load_model, load_teacher
from chronomoe.stages.processes import choose_device
from chronomoe.stages.soft_targets import Material, check_windows, report_skipped
from chronomoe.stages.students import train
from chronomoe.stages.workspace import Report, Workspace, check_new, folder_for, stage_key
from chronomoe.training.arguments import DistilConfig
from chronomoe.training.familiarity import TEACHER, add_teacher
from chronomoe.training.routing import (
    ExpertForecasts,
    RouterTrainingConfig,
    expert_losses,
    forecast_with_experts,
    mixture_quantile_loss,
    train_router,
)
from chronomoe.training.selection import select_experts

Experts = Mapping[str, ExactChronos2Model]
PARTS = ("train", "validation")


def route(
    work: Workspace,
    experts: Experts,
    windows: TrainingWindows,
    validation: JoinedWindows,
    moe: MixtureConfig,
    training: RouterTrainingConfig,
    *,
    inputs: Mapping[str, Any],
    select: int | None = None,
) -> Path:
    """Let every expert forecast the router's windows once, and train the router on these forecasts.

    Args:
        work: the run's folder.
        experts: by name.
        windows: that the router learns from.
        validation: that stop its training.
        moe: router, routing and balance.
        training: of the router; its seed is that of the router's first weights, too.
        inputs: what experts and windows depend on.
        select: keep this many experts, chosen greedily; all when None.

    Returns:
        The stage: ``model/`` and ``router.json``, with the training curve, and the validation loss of the mixture, of
        each expert and of the best expert of each window in hindsight.
    """
    read = {"router inputs": [moe.router.use_patch_embedding, moe.router.feature_length]}

    def forecast(members: Experts, part: str) -> ExpertForecasts:
        model = seeded_mixture(members, moe, training.seed)
        if part == "train":
            return forecast_with_experts(model, windows, domain_of=[windows.domain_of(i) for i in range(len(windows))])
        owners = [validation.owner(index) for index in range(len(validation))]
        return forecast_with_experts(model, validation, domain_of=owners)

    def cache(folder: Path, report: Report) -> None:
        for step, part in enumerate(PARTS):
            report(step, len(PARTS))
            torch.save(forecast(experts, part)._asdict(), folder / f"{part}.pt")

    cached = work.stage("expert-forecasts", {**inputs, **read}, cache)

    def learn(folder: Path, report: Report) -> None:
        parts = {name: ExpertForecasts(**torch.load(cached / f"{name}.pt")) for name in PARTS}
        members = experts
        if select is not None:
            members, parts = _selected(experts, parts, top_k=moe.routing.top_k, select=select)
            if moe.router.use_patch_embedding and list(members)[0] != list(experts)[0]:
                parts = {name: forecast(members, name) for name in PARTS}  # the router reads another first expert
        model = seeded_mixture(members, moe, training.seed)
        curve = train_router(model, parts["train"], parts["validation"], training)
        losses = expert_losses(parts["validation"], torch.tensor(model.chronos_config.quantiles))
        summary = {
            "curve": curve,
            "validation": {
                "mixture": mixture_quantile_loss(model, parts["validation"]),
                "experts": dict(zip(members, losses.mean(dim=0).tolist(), strict=True)),
                "oracle": losses.amin(dim=1).mean().item(),
            },
        }
        ChronoMoEPipeline(model).save_pretrained(folder / "model")
        (folder / "router.json").write_text(json.dumps(summary))

    needed = {**inputs, "moe": asdict(moe), "router": asdict(training), "select": select}
    return work.stage("router", needed, learn)


def _selected(
    experts: Experts, parts: Mapping[str, ExpertForecasts], *, top_k: int, select: int
) -> tuple[Experts, dict[str, ExpertForecasts]]:
    """Choose experts greedily by validation loss; return them with their forecasts."""
    seen = parts["validation"]
    levels = torch.tensor(next(iter(experts.values())).chronos_config.quantiles)
    kept = sorted(select_experts(seen.quantiles, seen.target, levels, seen.domain.numpy(), count=select, top_k=top_k))
    names = [list(experts)[index] for index in kept]
    cut = {name: part._replace(quantiles=part.quantiles[:, kept]) for name, part in parts.items()}
    return {name: experts[name] for name in names}, cut


def guarded(
    work: Workspace, routed: Path, teacher: Chronos2Model, config: UnfamiliarConfig, *, name: str = TEACHER
) -> Path:
    """Let the teacher forecast what is unlike all the windows that the router of a finished mixture learned from.

    Args:
        work: the run's folder.
        routed: the stage of the router, or of joint training after it.
        teacher: joins the checkpoint.
        config: what counts as familiar.
        name: of the teacher among the experts.
    """

    def make(folder: Path, report: Report) -> None:
        model: DistilledMoE = load_model(routed / "model").to(teacher.device)
        cached = routed.with_name("expert-forecasts")
        train, validation = (ExpertForecasts(**torch.load(cached / f"{name}.pt")) for name in PARTS)
        add_teacher(model, teacher, train, validation, familiar=config.familiar, name=name)
        ChronoMoEPipeline(model).save_pretrained(folder / "model")

    inputs = {"routed": stage_key(routed), "teacher": revision(teacher), "unfamiliar": asdict(config), "name": name}
    return work.stage("unfamiliar", inputs, make)


def joint(
    work: Workspace,
    routed: Path,
    material: Material,
    soft_targets: Path,
    training: DistilConfig,
    *,
    expert_learning_rate: float,
    device: torch.device,
) -> Path:
    """Fine-tune router and experts together; ``training`` has the router's learning rate."""

    def build() -> DistilledMoE:
        model: DistilledMoE = load_model(routed / "model").to(device)
        return model

    return train(
        work,
        "joint",
        build,  # type: ignore[arg-type]
        material,
        soft_targets,
        training,
        inputs={"routed": stage_key(routed), "expert_learning_rate": expert_learning_rate},
        learning_rates={"experts": expert_learning_rate},
    )


def seeded_mixture(experts: Experts, moe: MixtureConfig, seed: int) -> DistilledMoE:
    """Make a mixture whose untrained router is the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_mixture(dict(experts), moe)
    model.eval()
    return model


def check_select(select: int | None, *, top_k: int, candidates: int) -> None:
    """Refuse to keep more experts than there are, or to choose more than are kept."""
    if select is not None and not top_k <= select <= candidates:
        raise InputError(f"select must be from top_k ({top_k}) to {candidates}, the number of experts, got {select}")


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
    teacher: str | None = None,
    unfamiliar: UnfamiliarConfig | None = None,
    device: str = "auto",
    console: Console | None = None,
) -> Path:
    """Make a mixture of trained students and write its checkpoint to ``out``; resumable until then.

    Args:
        experts: checkpoints by the names they get.
        domains: series that the router learns from: their training part, watched on their validation part.
        out: a new folder.
        windows: context and horizon.
        routing: how scores become choices.
        router: how the router is trained.
        router_windows: windows it learns from.
        select: keep this many experts, chosen greedily; all when None.
        teacher: a checkpoint that forecasts series unlike all of the domains'; none when None.
        unfamiliar: which series these are.
        device: see ``choose_device``.
        console: for messages.
    """
    check_new(out)
    place = choose_device(device)
    members = {name: load_teacher(path).to(place) for name, path in experts.items()}
    for name, model in members.items():
        check_dense(model, what=f"expert {name!r}", remedy="distil a student, or forecast with that checkpoint itself")
    moe = MixtureConfig(routing=routing)
    check_windows(windows, seeded_mixture(members, moe, router.seed))
    check_select(select, top_k=routing.top_k, candidates=len(members))
    guard = None if teacher is None else load_teacher(teacher).to(place)
    if guard is not None:
        check_same_task([model.config for model in (*members.values(), guard)], [*members, TEACHER])
    if router_windows < 1:
        raise InputError(f"the router needs at least 1 window to learn from, got {router_windows}")
    material = Material.of(domains, windows, size=router_windows, seed=router.seed, facts={})
    report_skipped(console, material.windows.skipped)
    with folder_for(out, console=console) as work:
        inputs = {**material.facts, "experts": {name: revision(model) for name, model in members.items()}}
        routed = route(work, members, material.windows, material.watched(), moe, router, inputs=inputs, select=select)
        loss = json.loads((routed / "router.json").read_text())["validation"]["mixture"]
        work.console.print(f"validation loss of the mixture: {loss:.4f}")
        if guard is not None:
            routed = guarded(work, routed, guard, unfamiliar or UnfamiliarConfig())
        work.publish(routed / "model", out)
    return out
