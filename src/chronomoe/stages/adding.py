"""Adding an expert to a finished mixture: the others stay as they are, the router is trained anew."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from chronomoe.data.domains import Domain
from chronomoe.data.soft_targets import revision
from chronomoe.data.windows import WindowConfig
from chronomoe.errors import InputError
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.models.mixture.compression import compress, with_one_more
from chronomoe.models.mixture.familiarity import UnfamiliarConfig
from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.models.student import StudentConfig, create_student_model
from chronomoe.pipeline import ChronoMoEPipeline, load_model, load_teacher
from chronomoe.stages.mixture import guarded, route
from chronomoe.stages.processes import choose_device
from chronomoe.stages.soft_targets import Material, check_windows, label, report_skipped
from chronomoe.stages.students import load_student, train
from chronomoe.stages.workspace import Report, Workspace, check_new, folder_for, stage_key
from chronomoe.training.arguments import DistilConfig
from chronomoe.training.routing import RouterTrainingConfig, expert_losses, forecast_with_experts


def grow_mixture(
    moe: str | Path,
    domain: Domain,
    others: Sequence[Domain],
    out: Path,
    *,
    name: str,
    teacher: str | None = None,
    from_teacher: bool = False,
    windows: WindowConfig,
    training: DistilConfig,
    router: RouterTrainingConfig,
    pool: int = 8192,
    router_windows: int = 4096,
    device: str = "auto",
    console: Console | None = None,
) -> Path:
    """Add an expert for a new domain and write the mixture to ``out``; resumable until then.

    The expert branches from the member that forecasts the domain's validation windows best; in a mixture of low-rank
    experts it is cut to their rank. What is kept of the others stays, to the bit. A router with one more choice is
    trained on windows of all domains, and a teacher for unfamiliar series learns which these are now. Bands of the
    mixture are left out: its routing changes.

    Args:
        moe: checkpoint of a mixture.
        domain: the new one; its training part is learned from, its validation part watched.
        others: those that the mixture has, so that the router learns what is not the new expert's.
        out: a new folder.
        name: of the expert.
        teacher: whose forecasts it learns from; None for what happened alone.
        from_teacher: cut the expert from the teacher, of the shape of the mixture's first, instead of branching.
        windows: context and horizon.
        training: steps, rates and losses.
        router: how the router is trained.
        pool: training windows of the new domain, at most.
        router_windows: windows that the router learns from, domains taking turns.
        device: see ``choose_device``.
        console: for progress.

    Raises:
        InputError: the checkpoint is no mixture, the name is taken, two domains have one name, or there are no others.
    """
    check_new(out)
    place = choose_device(device)
    mixture = _mixture(moe, "grown")
    members = dict(zip(mixture.config.expert_names, mixture.to(place).experts, strict=False))  # without a teacher
    if not name or name in (taken := mixture.config.expert_names):
        raise InputError(f"the expert needs a name of its own, got {name!r}; the mixture has {', '.join(taken)}")
    names = [one.name for one in (*others, domain)]
    if not others or len(set(names)) < len(names):
        raise InputError(
            f"the router needs series of the mixture's other domains, each of a name of its own, got {names}; "
            "pass them with --data"
        )
    check_windows(windows, mixture)
    if router_windows < 1:
        raise InputError(f"the router needs at least 1 window to learn from, got {router_windows}")
    if from_teacher and (teacher is None or mixture.config.low_rank is not None):
        raise InputError(
            "an expert is cut from the teacher that --teacher names, and not where experts are low-rank changes of one "
            "model; leave out --from-teacher"
        )
    guide = None if teacher is None else load_teacher(teacher).to(place)
    own = Material.of(
        [domain], windows, size=min(pool, training.steps * training.batch_size), seed=training.seed, facts={}
    )
    everyone = Material.of([*others, domain], windows, size=router_windows, seed=router.seed, facts={})
    report_skipped(console, everyone.windows.skipped)
    start = "the teacher" if from_teacher else _nearest(mixture, own)

    def begin() -> ExactChronos2Model:
        if guide is None or not from_teacher:
            branch: ExactChronos2Model = copy.deepcopy(members[start])
            return branch
        core = mixture.config.experts[0]
        size = StudentConfig(**{field: core[field] for field in ("num_layers", "d_model", "num_heads", "d_ff")})
        return create_student_model(guide, size, generator=torch.Generator().manual_seed(training.seed))

    with folder_for(out, console=console) as work:
        work.console.print(f"{name} branches from {start}")
        soft_targets = None if guide is None else label(work, "soft-targets", guide, own)
        facts = {"experts": {one: revision(model) for one, model in members.items()}, "start": start}
        made = train(work, "expert", begin, own, soft_targets, training, inputs=facts)
        expert: ExactChronos2Model = load_student(made, place)
        grown = None if mixture.config.low_rank is None else with_one_more(mixture, name, expert)
        experts = {**members, name: expert if grown is None else grown.experts[-1]}
        inputs = {**everyone.facts, "experts": {one: revision(model) for one, model in experts.items()}}
        routed = route(work, experts, everyone.windows, everyone.watched(), mixture.moe, router, inputs=inputs)
        if grown is not None:
            routed = _routed_as(work, grown, routed)
        if mixture.teacher is not None:
            before: Any = mixture.config
            again = UnfamiliarConfig(familiar=before.unfamiliar["familiar"])
            routed = guarded(work, routed, mixture.teacher, again, name=before.expert_names[-1])
        work.publish(routed / "model", out)
    return out


def _routed_as(work: Workspace, grown: DistilledMoE, routed: Path) -> Path:
    """Return the stage of a mixture of low-rank experts with the router that was trained on the same ones, whole."""

    def make(folder: Path, report: Report) -> None:
        found: Any = load_model(routed / "model")
        grown.router.load_state_dict(found.router.state_dict())
        grown.balance_bias.load_state_dict(found.balance_bias.state_dict())
        ChronoMoEPipeline(grown).save_pretrained(folder / "model")

    return work.stage("grown", {"routed": stage_key(routed)}, make)


def compress_checkpoint(moe: str | Path, out: Path, *, rank: int) -> DistilledMoE:
    """Write a mixture whose experts are changes of one model, of low rank; see ``models.mixture.compression``.

    Bands are left out, as forecasts change a little.

    Raises:
        InputError: the checkpoint is no mixture, or its experts differ in shape.
    """
    check_new(out)
    made = compress(_mixture(moe, "compressed"), rank=rank)
    ChronoMoEPipeline(made).save_pretrained(out)
    return made


def _mixture(moe: str | Path, done: str) -> DistilledMoE:
    mixture = load_model(moe)
    if not isinstance(mixture, DistilledMoE):
        raise InputError(f"only a mixture is {done}, {str(moe)!r} holds a {type(mixture).__name__}; compose one first")
    return mixture


@torch.no_grad()
def _nearest(mixture: DistilledMoE, material: Material) -> str:
    """Return the expert whose forecasts of the watched validation windows are best."""
    watched = material.watched()
    forecasts = forecast_with_experts(mixture, watched, domain_of=[0] * len(watched))
    losses = expert_losses(forecasts, torch.tensor(mixture.chronos_config.quantiles)).mean(dim=0)
    best: str = mixture.config.expert_names[int(losses.argmin())]
    return best
