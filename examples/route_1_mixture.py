"""Route 1, from teacher to forecast: a student for each domain, a mixture of them, and a router that picks."""

from chronomoe import (
    ChronoMoEPipeline,
    Chronos2DistillationTrainer,
    DistilConfig,
    build_mixture,
    create_student_model,
    fit_router,
)
from chronomoe.data.domains import load_domain

DOMAINS = ("traffic", "web")


def main(out: str = "moe", steps: int = 300) -> None:
    teacher = ChronoMoEPipeline.from_pretrained("tiny")
    students = {name: create_student_model(teacher, "small") for name in DOMAINS}
    for name, student in students.items():
        Chronos2DistillationTrainer(
            teacher_pipeline=teacher,
            student_model=student,
            train_dataset=f"demo:{name}",  # or a frame, a file, arrays: whatever Chronos2Pipeline.fit takes
            args=DistilConfig(steps=steps),
        ).train()
    mixture = build_mixture(students, num_experts_per_tok=2)
    fit_router(mixture, [f"demo:{name}" for name in DOMAINS], num_windows=4 * steps)
    ChronoMoEPipeline(mixture).save_pretrained(out)
    pipeline = ChronoMoEPipeline.from_pretrained(out)
    past = load_domain("demo:traffic").series[0].target[0]
    print("experts:", pipeline.routing([past]))
    print("median:", pipeline.predict_quantiles([past], prediction_length=4)[1][0][0].tolist())


if __name__ == "__main__":
    main()
