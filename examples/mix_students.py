"""Build a mixture of two students by hand, and see which one a series is sent to."""

import numpy as np

from chronomoe import (
    ChronoMoEPipeline,
    MixtureConfig,
    RoutingConfig,
    StudentConfig,
    build_mixture,
    create_student_model,
)
from chronomoe.pipeline import load_teacher


def main() -> None:
    teacher = load_teacher("tiny")
    students = {
        "shallow": create_student_model(teacher, StudentConfig(num_layers=1)),
        "deep": create_student_model(teacher, StudentConfig(num_layers=2)),
    }
    mixture = build_mixture(students, MixtureConfig(routing=RoutingConfig(top_k=1)))  # its router knows nothing yet
    pipeline = ChronoMoEPipeline(mixture)
    wave = np.sin(np.arange(200, dtype=np.float32) / 4)
    print("experts:", pipeline.routing([wave]))
    print("median:", pipeline.predict_quantiles([wave], prediction_length=8)[1][0][0].tolist())


if __name__ == "__main__":
    main()
