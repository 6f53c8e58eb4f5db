"""Route 2, from teacher to forecast: MoE layers inside a teacher and a smaller student, which learn together."""

import numpy as np

from chronomoe import (
    ChronoMoEPipeline,
    Chronos2MoEDistillationTrainer,
    DistilConfig,
    MoEConfig,
    create_student_model,
    upcycle,
)


def main(steps: int = 300) -> None:
    teacher = ChronoMoEPipeline.from_pretrained("tiny")
    student = upcycle(create_student_model(teacher, "half"), MoEConfig(num_experts=4, top_k=1))
    trainer = Chronos2MoEDistillationTrainer(
        student_model=student,
        teacher=upcycle(teacher, MoEConfig(num_experts=8, top_k=2)),
        train_dataset="demo:traffic",
        args=DistilConfig(steps=steps, batch_size=16),
    )
    trainer.train()
    wave = np.sin(np.arange(200, dtype=np.float32) / 4)
    print("median:", ChronoMoEPipeline(student).predict_quantiles([wave], prediction_length=8)[1][0][0].tolist())


if __name__ == "__main__":
    main()
