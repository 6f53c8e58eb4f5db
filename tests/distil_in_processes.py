"""Distil a student in the processes that torchrun started; each writes its weights and the windows it saw."""

import json
import os
import sys
from pathlib import Path

import torch

from chronomoe.data.soft_targets import LiveTeacher
from chronomoe.data.synthetic import CorpusConfig, MixConfig
from chronomoe.data.windows import TrainingWindows, WindowConfig
from chronomoe.models.student import StudentConfig, create_student_model
from chronomoe.training.experts import DistilConfig, distil
from chronomoe.training.pretraining import PretrainConfig, TeacherConfig, new_teacher
from sample_series import sample_domain


class Witness(LiveTeacher):
    """A live teacher that notes which windows it is asked about."""

    def __init__(self, teacher):
        super().__init__(teacher)
        self.seen = []

    def __call__(self, batch):
        self.seen += batch["window"].tolist()
        return super().__call__(batch)


def main():
    out, rank = Path(sys.argv[1]), os.environ["RANK"]
    size = TeacherConfig(d_model=32, d_kv=16, num_heads=2, d_ff=32, num_layers=2)
    config = PretrainConfig(
        teacher=size,
        corpus=CorpusConfig(length=64),
        mix=MixConfig(context_length=48, horizon=16, min_context_length=16),
    )
    teacher = new_teacher(config)
    student = create_student_model(teacher, StudentConfig(num_layers=1))
    windows = TrainingWindows(
        [sample_domain()], WindowConfig(context_length=48, horizon=16, min_context_length=32), size=64, seed=0
    )
    if rank == "0":
        torch.save(student.state_dict(), out / "start.pt")
    witness = Witness(teacher)
    distil(student, windows, witness, DistilConfig(steps=3, batch_size=4, checkpoint_steps=2), out / "checkpoints")
    torch.save(student.state_dict(), out / f"weights-{rank}.pt")
    (out / f"seen-{rank}.json").write_text(json.dumps(witness.seen))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
