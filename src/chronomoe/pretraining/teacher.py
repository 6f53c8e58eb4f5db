"""Pretraining a compact Chronos-2 teacher on synthetic series."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from chronos.chronos2 import Chronos2Model
from chronos.chronos2.config import Chronos2CoreConfig
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from chronomoe.data.domains import demo_domains, load_domain
from chronomoe.data.windows import Batch, EvaluationWindows, WindowConfig, collate, model_inputs
from chronomoe.errors import InputError, extra
from chronomoe.models.chronos2 import ExactChronos2Model, cast_parameters, use_exact_group_attention
from chronomoe.pretraining.averaging import AveragedAdamW, averaged_weights, use_averaged_weights
from chronomoe.pretraining.batches import MixConfig, Phase, PretrainingBatches
from chronomoe.pretraining.corpus import CorpusConfig, Progress, build_corpus, no_progress
from chronomoe.training.trainer import last_checkpoint

QUANTILE_LEVELS = (0.01, *(round(0.05 * step, 2) for step in range(1, 20)), 0.99)
"""The 21 levels of the public Chronos-2 checkpoint."""
LEAST = {
    "warmup_steps": 0,
    "decay_steps": 0,
    "weight_decay": 0,
    "save_steps": 1,
    "validation_steps": 1,
    "workers": 0,
}
"""Least values of the fields of ``PretrainConfig`` that have no other rule."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Size of the model."""

    d_model: int = 192
    """Width of a token."""
    d_kv: int = 64
    """Width of an attention head."""
    num_heads: int = 3
    """Attention heads."""
    d_ff: int = 768
    """Units of each feed-forward block."""
    num_layers: int = 4
    """Encoder blocks."""
    patch_size: int = 16
    """Steps of a token."""
    dropout_rate: float = 0.0
    """Dropout everywhere."""

    def __post_init__(self) -> None:
        for name in ("d_model", "num_heads", "d_ff", "num_layers", "patch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.d_kv < 2 or self.d_kv % 2:
            raise InputError(f"d_kv must be even, for rotary positions, and at least 2, got {self.d_kv}")
        if not 0 <= self.dropout_rate < 1:
            raise InputError(f"dropout_rate must be from 0 to below 1, got {self.dropout_rate}")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A whole pretraining run."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """Size of the model."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """Which series are drawn."""
    mix: MixConfig = field(default_factory=MixConfig)
    """How they become windows; its context length and horizon are the model's."""
    growth: tuple[Phase, ...] = ()
    """Phases of shorter contexts before the longest one: steps, context length, batch size."""
    steps: int = 4250
    """Optimiser steps of all phases together."""
    batch_size: int = 64
    """Windows of a batch, on each process, when they have the longest context."""
    learning_rate: float = 2e-3
    """Peak of the warm-up, stable, decay schedule."""
    warmup_steps: int = 200
    """Steps of linear warm-up."""
    decay_steps: int = 1500
    """Last steps, in which the learning rate falls to a hundredth of its peak."""
    weight_decay: float = 0.01
    """AdamW's."""
    average_decay: float = 0.998
    """Of the running average of the weights, which is what is validated and shipped; 0 for the weights themselves."""
    save_steps: int = 250
    """Steps between two resumable checkpoints."""
    validation: tuple[str, ...] | None = None
    """Domains watched during training, as ``load_domain`` takes them; the demo domains when None."""
    validation_steps: int = 500
    """Steps between two looks at them."""
    workers: int = 0
    """Background processes that make batches, for each training process."""
    bf16: bool = False
    """Train in bf16 autocast: faster on a GPU or a processor with bf16 instructions, far slower elsewhere."""
    seed: int = 0
    """Of initial weights and windows; the corpus has its own."""

    def __post_init__(self) -> None:
        if self.steps < 1 or min(phase.batch_size for phase in self.phases) < 1:
            sizes = [phase.batch_size for phase in self.phases]
            raise InputError(f"steps and batch_size must be at least 1, got {self.steps} and {sizes}")
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate must be above 0, got {self.learning_rate}")
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.average_decay < 1:
            raise InputError(f"average_decay must be from 0 to below 1, got {self.average_decay}")
        for length in [self.mix.horizon, *(phase.context_length for phase in self.phases)]:
            if length < 1 or length % self.teacher.patch_size:
                raise InputError(
                    f"context lengths and horizon must be multiples of the patch size {self.teacher.patch_size}, "
                    f"got {length}"
                )
        longest = max(phase.context_length for phase in self.phases)
        if longest > self.mix.context_length:
            raise InputError(
                f"contexts must not grow beyond the model's {self.mix.context_length} steps, got {longest}"
            )
        if self.corpus.length < self.mix.context_length + self.mix.horizon:
            raise InputError(
                f"the corpus needs series of at least a context and a horizon, {self.mix.context_length} + "
                f"{self.mix.horizon} steps, got {self.corpus.length}"
            )

    @property
    def phases(self) -> tuple[Phase, ...]:
        """All phases, the longest context last; one that has no step left is left out."""
        phases: list[Phase] = []
        left = self.steps
        for phase in self.growth:
            if phase.steps >= left:
                return (*phases, replace(phase, steps=left))
            phases.append(phase)
            left -= phase.steps
        last = Phase(steps=left, context_length=self.mix.context_length, batch_size=self.batch_size)
        return (*phases, last)

    @property
    def decay(self) -> int:
        """Steps in which the rate falls: after the warm-up, which is not shortened, so that a short run is a start."""
        return max(0, min(self.decay_steps, self.steps - self.warmup_steps))

    def begins_like(self, other: "PretrainConfig", *, steps: int) -> bool:
        """Tell whether the first ``steps`` steps of both runs are the same."""
        free = {"steps": 1, "decay_steps": 0, "growth": (), "save_steps": 1, "validation_steps": 1, "workers": 0}
        if replace(self, **free) != replace(other, **free):  # type: ignore[arg-type]
            return False
        if steps and replace(self, steps=steps).phases != replace(other, steps=steps).phases:
            return False
        stable = min(config.steps - config.decay for config in (self, other))
        return steps <= stable or (self.steps, self.decay_steps) == (other.steps, other.decay_steps)


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


class ValidationBatches(Dataset[Batch]):
    """Windows of one domain, as ready batches."""

    def __init__(self, spec: str, config: PretrainConfig, *, windows: int = 64, rows: int = 32) -> None:
        domain = load_domain(spec)
        self.name, self.rows, self.patch_size = domain.name, rows, config.teacher.patch_size
        length = min(512, config.mix.context_length)
        shape = WindowConfig(
            context_length=length, horizon=min(96, config.mix.horizon), min_context_length=min(64, length)
        )
        self._windows = EvaluationWindows(domain, shape, part="validation", limit=windows)

    def __len__(self) -> int:
        return -(-len(self._windows) // self.rows)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        places = range(index * self.rows, min(len(self._windows), (index + 1) * self.rows))
        batch = collate([self._windows[place] for place in places], patch_size=self.patch_size)
        return {**model_inputs(batch), "future_target": batch["future_target"]}


class PretrainingTrainer(Trainer):
    """A ``Trainer`` of ready batches, taken in their order; its weights are validated as averages."""

    rows_seen = 0
    tokens_seen = 0
    since = 0.0

    def _get_train_sampler(self, train_dataset: object = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)

    def training_step(self, model: torch.nn.Module, inputs: Batch, *rest: Any, **options: Any) -> Tensor:
        """Count the windows, then train on them."""
        self.since = self.since or time.perf_counter()
        self.rows_seen += len(inputs["context"])
        patch = self.accelerator.unwrap_model(model).chronos_config.input_patch_size
        self.tokens_seen += len(inputs["context"]) * (
            -(-inputs["context"].shape[1] // patch) + 1 + inputs["num_output_patches"]
        )
        loss: Tensor = super().training_step(model, inputs, *rest, **options)
        return loss

    def log(self, logs: dict[str, float], *rest: Any, **options: Any) -> None:
        """Add how many windows and tokens were trained on in a second since the last report, by all processes."""
        if "loss" in logs and self.since:
            seconds = (time.perf_counter() - self.since) / self.args.world_size
            logs |= {
                "windows_per_second": round(self.rows_seen / seconds, 1),
                "tokens_per_second": round(self.tokens_seen / seconds),
            }
            self.rows_seen, self.tokens_seen, self.since = 0, 0, time.perf_counter()
        super().log(logs, *rest, **options)

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Validate the averaged weights; the time it takes is not counted as training."""
        begun = time.perf_counter()
        with averaged_weights(self.optimizer):
            metrics: dict[str, float] = super().evaluate(*arguments, **options)
        if self.since:
            self.since += time.perf_counter() - begun
        return metrics


def only(items: Sequence[Batch]) -> Batch:
    """Return the one ready batch of a list."""
    (batch,) = items
    return batch


def pretrain(
    config: PretrainConfig,
    out: Path,
    *,
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
    arguments = _arguments(config, checkpoints)
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
        data_collator=only,
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
    """Tell whether this process writes for all that train together."""
    return bool(PartialState().is_main_process)


def _arguments(config: PretrainConfig, folder: Path) -> TrainingArguments:
    watch = config.validation is None or len(config.validation) > 0
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=1,  # an item is a batch
        per_device_eval_batch_size=1,
        learning_rate=config.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={
            "num_decay_steps": config.decay,
            "decay_type": "1-sqrt",
            "min_lr_ratio": 0.01,
        },
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=1.0,
        bf16=config.bf16,
        seed=config.seed,
        save_steps=config.save_steps,
        save_total_limit=2,
        logging_steps=50,
        eval_strategy="steps" if watch else "no",
        eval_steps=config.validation_steps if watch else None,
        prediction_loss_only=True,
        label_names=["future_target"],
        report_to="none",
        remove_unused_columns=False,
        ignore_data_skip=True,
        ddp_find_unused_parameters=True,  # univariate batches leave group attention's q and k unused
        use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=config.workers,
        dataloader_prefetch_factor=4 if config.workers else None,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=False,
    )


def _processes_of(checkpoint: Path) -> int:
    """Tell how many processes saved a checkpoint: each left the state of its random numbers."""
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
    """Tell whether a run that was recorded so far can go on as configured now."""
    try:
        return config.begins_like(TypeAdapter(PretrainConfig).validate_python(found), steps=done)
    except ValidationError:
        return False  # a record of other fields
