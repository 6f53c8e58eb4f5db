"""The stages of a run that make the mixture: expert forecasts, router, joint fine-tuning."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from chronomoe.data.soft_targets import SoftTargetStore
from chronomoe.data.windows import TrainingWindows, Window
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.models.mixture.mixture import DistilledMoE, MixtureConfig, build_mixture
from chronomoe.pipeline import ChronoMoEPipeline
from chronomoe.stages.setup import Setup
from chronomoe.stages.students import load_student
from chronomoe.stages.workspace import Report, stage_key
from chronomoe.training.distillation import DistilConfig, distil, save_curve, select_experts
from chronomoe.training.routing import (
    ExpertForecasts,
    RouterTrainingConfig,
    expert_losses,
    forecast_with_experts,
    mixture_quantile_loss,
    train_router,
)


def mixture(setup: Setup, students: dict[str, Path]) -> Path:
    """Make a mixture of the experts among some students; return the stage that holds its checkpoint."""
    config = setup.config
    names = [name for name in students if name.startswith("expert/")]
    if setup.has_generalist_member:
        names.insert(0, "generalist")
    inputs = setup.base | {
        "moe": asdict(config.moe),
        "experts": {name: stage_key(students[name]) for name in names},
        "windows": config.router_windows,
        "part": config.router_part,
    }

    def load() -> dict[str, ExactChronos2Model]:
        return {name.removeprefix("expert/"): load_student(students[name]) for name in names}

    def cache(folder: Path, report: Report) -> None:
        model = seeded_mixture(load(), config.moe, setup.seed("router"))
        for step, part in enumerate(("train", "validation")):
            report(step, 2)
            windows, domain_of = router_windows(setup, part)
            forecasts = forecast_with_experts(model, windows, domain_of=domain_of)
            torch.save(forecasts._asdict(), folder / f"{part}.pt")

    cached = setup.work.stage("expert-forecasts", inputs, cache)
    inputs |= {"router": asdict(config.router), "select": config.experts.select}

    def make(folder: Path, report: Report) -> None:
        parts = {name: ExpertForecasts(**torch.load(cached / f"{name}.pt")) for name in ("train", "validation")}
        training = replace(config.router, seed=setup.seed("router"))
        model, summary = route(
            load(), parts["train"], parts["validation"], config.moe, training, select=config.experts.select
        )
        ChronoMoEPipeline(model).save_pretrained(folder / "model")
        (folder / "router.json").write_text(json.dumps(summary))

    routed = setup.work.stage("router", inputs, make)
    return routed if config.joint.steps == 0 else joint(setup, routed, inputs)


def seeded_mixture(experts: dict[str, ExactChronos2Model], moe: MixtureConfig, seed: int) -> DistilledMoE:
    """Make a mixture whose untrained router is the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_mixture(experts, moe)
    model.eval()
    return model


def route(
    experts: dict[str, ExactChronos2Model],
    train: ExpertForecasts,
    validation: ExpertForecasts,
    moe: MixtureConfig,
    training: RouterTrainingConfig,
    *,
    select: int | None = None,
) -> tuple[DistilledMoE, dict[str, Any]]:
    """Choose experts if asked to, train the router on their cached forecasts, and return the mixture with a summary.

    The summary has the training curve, and the validation loss of the mixture, of each expert and of the best expert
    of each window in hindsight.
    """
    levels = torch.tensor(next(iter(experts.values())).chronos_config.quantiles)
    if select is not None:
        domain = validation.domain.numpy()
        kept = sorted(
            select_experts(
                validation.quantiles, validation.target, levels, domain, count=select, top_k=moe.routing.top_k
            )
        )
        names = list(experts)
        experts = {names[index]: experts[names[index]] for index in kept}
        train = train._replace(quantiles=train.quantiles[:, kept])
        validation = validation._replace(quantiles=validation.quantiles[:, kept])
    model = seeded_mixture(experts, moe, training.seed)
    curve = train_router(model, train, validation, training)
    losses = expert_losses(validation, levels)
    summary = {
        "curve": curve,
        "validation": {
            "mixture": mixture_quantile_loss(model, validation),
            "experts": dict(zip(experts, losses.mean(dim=0).tolist(), strict=True)),
            "oracle": losses.amin(dim=1).mean().item(),
        },
    }
    return model, summary


def router_windows(setup: Setup, part: str) -> tuple[Dataset[Window], list[int]]:
    """Return the windows that the router learns from, or is judged on, and the domain of each."""
    config = setup.config
    if part == "validation":
        joined = setup.validation()
        return joined, [joined.owner(index) for index in range(len(joined))]
    windows = TrainingWindows(
        setup.domains,
        config.windows,
        size=config.router_windows,
        seed=setup.seed("router windows"),
        part=config.router_part,
    )
    return windows, [windows.domain_of(index) for index in range(len(windows))]


def joint(setup: Setup, routed: Path, inputs: dict[str, Any]) -> Path:
    """Fine-tune router and experts together."""
    options = setup.config.joint
    config = DistilConfig(
        steps=options.steps,
        batch_size=setup.config.budget.batch_size,
        learning_rate=options.learning_rate,
        loss=replace(setup.config.loss, hidden_weight=0.0),  # experts and teacher need not have layers alike
        checkpoint_steps=max(50, options.steps // 4),
        seed=setup.seed("order", "joint"),
    )

    def make(folder: Path, report: Report) -> None:
        model = ChronoMoEPipeline.from_pretrained(routed / "model").model
        curve = distil(
            model,
            setup.pool(),
            SoftTargetStore(setup.work.root / "stages" / "soft-targets" / "store"),
            config,
            folder / "checkpoints",
            validation=setup.validation(),
            expert_learning_rate=options.expert_learning_rate,
            progress=report,
        )
        ChronoMoEPipeline(model).save_pretrained(folder / "model")
        save_curve(curve, folder / "curve.json")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    return setup.work.stage("joint", inputs | {"config": asdict(config), "joint": asdict(options)}, make)
