"""Distil a student in the processes that torchrun started; each writes its weights, curve and the windows it saw.

With the word "moe" after the folder, the student has MoE layers and a loss-free bias.
"""

import json
import os
import sys
from pathlib import Path

import torch
from chronos.chronos2 import Chronos2Model
from chronos.chronos2.config import Chronos2CoreConfig

from chronomoe.data.soft_targets import LiveTeacher
from chronomoe.data.windows import TrainingWindows, WindowConfig
from chronomoe.models.chronos2 import use_exact_group_attention
from chronomoe.models.sparse.config import MoEConfig
from chronomoe.models.sparse.upcycling import upcycle
from chronomoe.models.student import StudentConfig, create_student_model
from chronomoe.training.arguments import DistilConfig
from chronomoe.training.distillation import distil
from conftest import FORECASTING, SIZES
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
    torch.manual_seed(0)
    core = Chronos2CoreConfig(**SIZES | {"num_layers": 2})
    core.chronos_config = FORECASTING
    teacher = use_exact_group_attention(Chronos2Model(core))
    student = create_student_model(teacher, StudentConfig(num_layers=1))
    windows = TrainingWindows(
        [sample_domain()], WindowConfig(context_length=48, horizon=16, min_context_length=32), size=64, seed=0
    )
    if "moe" in sys.argv[2:]:
        student = upcycle(student, MoEConfig(num_experts=4, top_k=1, bias_rate=0.1))
    if rank == "0":
        torch.save(student.state_dict(), out / "start.pt")
    witness = Witness(teacher)
    config = DistilConfig(steps=3, batch_size=4, checkpoint_steps=2)
    curve = distil(student, windows, witness, config, out / "checkpoints")
    torch.save(student.state_dict(), out / f"weights-{rank}.pt")
    (out / f"curve-{rank}.json").write_text(json.dumps(curve))
    (out / f"seen-{rank}.json").write_text(json.dumps(witness.seen))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
