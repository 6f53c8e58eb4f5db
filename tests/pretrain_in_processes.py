"""Pretrain a tiny teacher in the processes that torchrun started; each writes its weights and the batches it saw."""

import dataclasses
import os
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from chronomoe.pretraining.batches import MixConfig, Phase
from chronomoe.pretraining.config import PretrainConfig, TeacherConfig
from chronomoe.pretraining.corpus import CorpusConfig
from chronomoe.pretraining.teacher import pretrain

CONFIG = PretrainConfig(
    teacher=TeacherConfig(d_model=32, d_kv=16, num_heads=2, d_ff=32, num_layers=1),
    corpus=CorpusConfig(
        seasonalities=(12,), series_per_generator=1, slow_series_per_generator=0, composed_series=8, groups=4, length=80
    ),
    mix=MixConfig(context_length=48, min_context_length=16, horizon=16, group_share=0.3),
    growth=(Phase(steps=6, context_length=32, batch_size=8),),
    steps=20,
    batch_size=8,
    learning_rate=1e-2,
    warmup_steps=2,
    decay_steps=10,
    average_decay=0.9,
    save_steps=8,
    validation=(),
)


class Witness(TrainerCallback):
    """Notes the contexts that a model is given."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        self.seen.append(kwargs["context"].clone())


def main():
    out, rank = Path(sys.argv[1]), os.environ["RANK"]
    witness = Witness()
    model = pretrain(dataclasses.replace(CONFIG, steps=3, validation=("demo:web",)), out, callbacks=[witness])
    torch.save(model.state_dict(), out / f"weights-{rank}.pt")
    torch.save(witness.seen[:3], out / f"seen-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
