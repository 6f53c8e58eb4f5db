"""Route 3, from teacher to forecast: a finished student grows by an MoE layer, and all that it had stays as it was."""

import numpy as np

from chronomoe import (
    ChronoMoEPipeline,
    Chronos2DistillationTrainer,
    Chronos2MoEDistillationTrainer,
    DistilConfig,
    MoEConfig,
    MoEEnhancedChronos2,
    create_student_model,
)


def main(steps: int = 300) -> None:
    teacher = ChronoMoEPipeline.from_pretrained("tiny")
    time = np.arange(1000, dtype=np.float32)
    series = [np.sin(2 * np.pi * time / period) + 0.1 * np.random.randn(1000) for period in (12, 24, 168)]
    common = {"teacher_pipeline": teacher, "train_dataset": series, "args": DistilConfig(steps=steps, batch_size=16)}

    student = create_student_model(teacher, "small")
    Chronos2DistillationTrainer(student_model=student, **common).train()
    grown = MoEEnhancedChronos2(student, MoEConfig(num_experts=4, top_k=1))
    Chronos2MoEDistillationTrainer(student_model=grown, **common).train()  # the new layer alone is trained
    print("median:", ChronoMoEPipeline(grown).predict_quantiles(series[:1], prediction_length=8)[1][0][0].tolist())


if __name__ == "__main__":
    main()
