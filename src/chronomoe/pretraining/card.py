"""``chronomoe pretrain`` as a function: a teacher with its card."""

import json
from pathlib import Path

from chronomoe.checkpoints.card import model_card
from chronomoe.models.chronos2 import ExactChronos2Model
from chronomoe.models.configuration import parse
from chronomoe.pretraining.batches import PretrainingBatches
from chronomoe.pretraining.config import PretrainConfig
from chronomoe.pretraining.corpus import Progress, build_corpus, no_progress
from chronomoe.pretraining.real_series import REAL_SOURCES
from chronomoe.pretraining.teacher import is_first_process, pretrain
from chronomoe.recipe import dump
from chronomoe.stages.faults import room
from chronomoe.stages.workspace import write_atomically


def pretrain_teacher(
    config: PretrainConfig, out: Path, *, device: str = "auto", progress: Progress = no_progress
) -> ExactChronos2Model:
    """Train a teacher, write its checkpoint and model card to ``out``, and return it; see ``pretrain``.

    Args:
        config: the whole run.
        out: a new folder, or that of the same run, which is continued.
        device: see ``choose_device``.
        progress: told how many of how many parts of the corpus are drawn.
    """
    with room(out.parent, out.name):
        model = pretrain(config, out, device=device, progress=progress)
        if is_first_process():
            sections = card_sections(model, config, corpus=out / "corpus")
            write_atomically(out / "README.md", model_card(model, name=out.name, sections=sections))
    return model


def card_sections(model: ExactChronos2Model, config: PretrainConfig, *, corpus: Path) -> dict[str, str]:
    """Return what a card says of the training and of every series in the corpus."""
    parts = build_corpus(corpus, config.corpus)
    batches = PretrainingBatches(
        parts, config.mix, phases=config.phases, patch_size=config.teacher.patch_size, seed=config.seed
    )
    shapes = [batches.shape(index) for index in range(len(batches))]
    patch = config.teacher.patch_size
    rows = sum(shape.rows for shape in shapes)
    tokens = sum(shape.rows * (-(-shape.context_length // patch) + shape.horizon // patch + 1) for shape in shapes)
    operations = 6 * model.num_parameters() * tokens
    training = (
        f"Trained from scratch by `chronomoe pretrain`: {config.steps:,} steps, {rows / 1e6:.2f} million rows of "
        f"context and horizon on each process, {tokens / 1e6:.1f} million tokens, about {operations:.1e} operations "
        "(six a parameter and token). AdamW with a warm-up, stable, decay schedule; the weights are a running average "
        f"over steps, stored in bf16. The recipe:\n\n```yaml\n{dump(config).strip()}\n```"
    )
    counts = {
        "drawn with synforecast's pretraining pool and seasonal generators": len(parts.drawn),
        "composed of calendar profiles, levels, noise and measurement": len(parts.composed),
        "pieces of public real series": len(parts.real),
        "groups of four rows, by synforecast's Multivariatizer and vector autoregression": len(parts.groups),
    }
    lines = [f"Series of {config.corpus.length:,} steps, from seed {config.corpus.seed}:\n"]
    lines += [f"- {count:,} {what}" for what, count in counts.items() if count]
    if config.corpus.real:
        lines += ["\nReal series, the first 70 % of their rows; scores on anything else are zero-shot:\n"]
        lines += ["| series | package, file | terms |", "| --- | --- | --- |"]
        for name in config.corpus.real:
            source = REAL_SOURCES[name]
            lines.append(f"| {name} | {source.package}, `{source.file}` | {source.terms} |")
    else:
        lines += ["\nNo real series, so any score on real data is zero-shot."]
    return {"Training": training, "Corpus": "\n".join(lines)}


def read_config(folder: Path) -> PretrainConfig:
    """Read the configuration that a run recorded."""
    values = json.loads((folder / "pretrain.json").read_text())
    return parse(values, PretrainConfig, source=str(folder / "pretrain.json"))
