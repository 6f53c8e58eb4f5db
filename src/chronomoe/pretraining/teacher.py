"""Pretraining a compact Chronos-2 teacher on synthetic series."""

import json
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from chronos.chronos2 import Chronos2Model
from chronos.chronos2.config import Chronos2CoreConfig
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from chronomoe.data.domains import demo_domains
from chronomoe.errors import InputError, extra
from chronomoe.models.chronos2 import ExactChronos2Model, cast_parameters, use_exact_group_attention
from chronomoe.models.configuration import parse
from chronomoe.pretraining.batches import PretrainingBatches
from chronomoe.pretraining.config import PretrainConfig
from chronomoe.pretraining.corpus import Progress, build_corpus, no_progress
from chronomoe.pretraining.trainer import PretrainingTrainer, ValidationBatches, training_arguments
from chronomoe.stages.processes import choose_device
from chronomoe.training.averaging import AveragedAdamW, use_averaged_weights
from chronomoe.training.trainer import last_checkpoint

QUANTILE_LEVELS = (0.01, *(round(0.05 * step, 2) for step in range(1, 20)), 0.99)
"""The 21 levels of the public Chronos-2 checkpoint."""


def new_teacher(config: PretrainConfig) -> ExactChronos2Model:
    """Make an untrained Chronos-2 of the configured size, the same for the same seed."""
    size = config.teacher
    core = Chronos2CoreConfig(
        d_model=size.d_model,
        d_kv=size.d_kv,
        d_ff=size.d_ff,
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        dropout_rate=size.dropout_rate,
        chronos_config={
            "context_length": config.mix.context_length,
            "input_patch_size": size.patch_size,
            "input_patch_stride": size.patch_size,
            "output_patch_size": size.patch_size,
            "max_output_patches": config.mix.horizon // size.patch_size,
            "quantiles": list(QUANTILE_LEVELS),
            "use_reg_token": True,
            "use_arcsinh": True,
        },
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return use_exact_group_attention(Chronos2Model(core))


def pretrain(
    config: PretrainConfig,
    out: Path,
    *,
    device: str = "auto",
    callbacks: list[TrainerCallback] | None = None,
    progress: Progress = no_progress,
) -> ExactChronos2Model:
    """Train a teacher and write its checkpoint to ``out``; an interrupted run continues at its last saved step.

    ``out`` also gets ``pretrain.json`` (the configuration), ``corpus/``, ``checkpoints/`` and TensorBoard files in
    ``logs/``. While the learning rate has not begun to fall, a run may go on with other ``steps`` and ``decay_steps``:
    longer, or to its end from where it is.

    Raises:
        InputError: ``out`` holds a run that began in another way or with another number of processes, a domain or a
            real series is unknown, or the corpus has nothing that the mix asks for.
    """
    with extra("pretrain"):
        from torch.utils.tensorboard import SummaryWriter
    checkpoints = out / "checkpoints"
    resume = last_checkpoint(checkpoints)
    done = int(resume.rsplit("-", 1)[1]) if resume else 0
    arguments = training_arguments(config, checkpoints, choose_device(device))
    if resume and (began := _processes_of(Path(resume))) != arguments.world_size:
        raise InputError(
            f"{out} holds a pretraining run of {began} processes, which share out its batches; "
            f"continue it with as many, got {arguments.world_size}"
        )
    domains = [f"demo:{name}" for name in demo_domains()] if config.validation is None else config.validation
    watched = [ValidationBatches(spec, config) for spec in domains]
    with arguments.main_process_first(local=False, desc="corpus"):
        _record(config, out, done=done)
        corpus = build_corpus(out / "corpus", config.corpus, progress=progress)
    model = new_teacher(config)
    trainer = PretrainingTrainer(
        model=model,
        args=arguments,
        train_dataset=PretrainingBatches(
            corpus,
            config.mix,
            phases=config.phases,
            patch_size=config.teacher.patch_size,
            seed=config.seed,
            processes=arguments.world_size,
            first=done * arguments.world_size,
        ),
        eval_dataset={batches.name: batches for batches in watched} or None,
        data_collator=itemgetter(0),
        optimizer_cls_and_kwargs=(
            AveragedAdamW,
            {
                "lr": config.learning_rate,
                "betas": (0.9, 0.98),
                "fused": True,
                "average_decay": config.average_decay,
            },
        ),
        callbacks=[TensorBoardCallback(SummaryWriter(str(out / "logs"))), *(callbacks or [])],
    )
    trainer.train(resume_from_checkpoint=resume)
    use_averaged_weights(trainer.optimizer)
    cast_parameters(model, torch.bfloat16)
    if is_first_process():
        model.save_pretrained(out)
    return model


def is_first_process() -> bool:
    """Return whether this is the process that writes."""
    return bool(PartialState().is_main_process)


def _processes_of(checkpoint: Path) -> int:
    """Return how many processes saved a checkpoint: each left its random state."""
    return len(list(checkpoint.glob("rng_state*.pth")))


def _record(config: PretrainConfig, out: Path, *, done: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    record, partial = out / "pretrain.json", out / "pretrain.json.partial"
    wanted: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    began = done > 0 or (out / "model.safetensors").exists()
    if began and record.exists():
        found = json.loads(record.read_text())
        if found != wanted and not _goes_on(found, config, done=done):
            raise InputError(f"{out} holds a pretraining run of another configuration; choose another folder")
    partial.write_text(json.dumps(wanted, indent=2))
    partial.replace(record)


def _goes_on(found: dict[str, Any], config: PretrainConfig, *, done: int) -> bool:
    """Return whether a recorded run can continue with this configuration."""
    try:
        return config.begins_like(parse(found, PretrainConfig, source="the record"), steps=done)
    except InputError:
        return False  # a record of other fields
