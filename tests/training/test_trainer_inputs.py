"""The trainer takes pipelines for models and data in whatever form one has them."""

from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from chronos import Chronos2Pipeline

import chronomoe
from chronomoe import ChronoMoEPipeline, InputError, StudentConfig, build_mixture, create_student_model
from chronomoe.data.domains import load_domain
from chronomoe.data.fingerprint import fingerprint
from chronomoe.data.fit_inputs import training_windows, validation_windows
from chronomoe.data.soft_targets import LiveTeacher, revision
from chronomoe.data.windows import WindowConfig
from chronomoe.models.provenance import provenance
from chronomoe.models.unwrapping import exact_model_of
from chronomoe.training import routing
from chronomoe.training.arguments import DistilConfig
from chronomoe.training.losses import LossConfig
from chronomoe.training.routing import RouterTrainingConfig, fit_router
from chronomoe.training.trainer import Chronos2DistillationTrainer

SHAPE = WindowConfig(context_length=64, horizon=16, min_context_length=8)
QUICK = DistilConfig(steps=2, batch_size=4)


@pytest.fixture
def pipeline(make_teacher):
    return Chronos2Pipeline(make_teacher(num_layers=2))


@pytest.fixture
def student(pipeline):
    return create_student_model(pipeline, StudentConfig(num_layers=1))


def dictionaries(values):
    return [
        {
            "target": row[:100],
            "past_covariates": {"weekday": values[0, :100] > 0, "price": values[1, :100].astype(np.float32)},
            "future_covariates": {"price": values[1, 100:116].astype(np.float32)},
        }
        for row in values[2:]
    ]


def forms(values):
    """Return the same series in every form, by name."""
    frame = pd.DataFrame(
        {
            "item_id": np.repeat(["a", "b", "c", "d", "e", "f"], 120),
            "timestamp": np.tile(pd.date_range("2024-01-01", periods=120, freq="h"), 6),
            "target": values.ravel(),
        }
    )
    rows = {
        "id": [str(place) for place in range(6)],
        "timestamp": [list(pd.date_range("2024-01-01", periods=120, freq="h"))] * 6,
        "target": values.tolist(),
    }
    return {
        "array": values[:, None],
        "tensor": torch.from_numpy(values)[:, None],
        "list of arrays": list(values),
        "list of unlike tensors": [torch.from_numpy(values[0]), torch.from_numpy(values[1:3])],
        "dictionaries": dictionaries(values),
        "frame": frame,
        "dataset": datasets.Dataset.from_dict(rows),
        "name": "demo:traffic",
        "domain": load_domain("demo:web"),
        "domains": [load_domain("demo:web"), "demo:traffic"],
    }


@pytest.fixture
def values(make_context):
    return make_context(6, 120).numpy()


@pytest.mark.parametrize("form", forms(np.zeros((6, 120), dtype=np.float32)))
def test_windows_are_cut_from_data_of_every_form(values, form):
    data = forms(values)[form]
    windows = training_windows(data, SHAPE, size=5)
    assert len(windows) == 5
    assert all(windows[place].target.shape[1] == SHAPE.horizon for place in range(5))
    last = validation_windows(data, SHAPE)
    assert all(last[place].target.shape == (len(last[place].context), SHAPE.horizon) for place in range(len(last)))


def test_the_last_window_of_each_series_validates_and_covariates_stay_what_they_are(values):
    (first, *rest) = validation_windows(dictionaries(values), SHAPE)
    assert len(rest) == 3
    np.testing.assert_array_equal(first.target[0], values[2, 84:100])
    assert np.isnan(first.target[1:]).all()
    np.testing.assert_array_equal(first.known[2], values[1, 84:100])  # the price is known ahead, the weekday is not
    assert np.isnan(first.known[:2]).all()
    np.testing.assert_array_equal(first.context[0], values[2, 20:84])


@pytest.mark.parametrize("form", ["list of unlike tensors", "dictionaries", "frame"])
def test_a_trainer_needs_a_teacher_a_student_and_data_alone(pipeline, student, values, form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    trainer = Chronos2DistillationTrainer(
        teacher_pipeline=pipeline,
        student_model=ChronoMoEPipeline(student),
        train_dataset=forms(values)[form],
        eval_dataset=forms(values)[form],
        prediction_length=16,
        args=QUICK,
    )
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert not student.training
    assert "eval_loss" in trainer.state.log_history[-2]
    assert list(Path().iterdir()) == []  # nothing is kept where no folder is given


def test_defaults_are_those_of_the_commands(pipeline, student, values):
    trainer = Chronos2DistillationTrainer(teacher_pipeline=pipeline, student_model=student, train_dataset=list(values))
    assert (trainer.args.max_steps, trainer.args.learning_rate) == (DistilConfig().steps, DistilConfig().learning_rate)
    assert isinstance(trainer.soft_targets, LiveTeacher)
    assert (trainer.train_dataset.config.horizon, trainer.train_dataset.config.context_length) == (48, 128)
    assert len(trainer.train_dataset) == DistilConfig().steps * DistilConfig().batch_size


def test_training_by_the_trainer_and_by_distil_gives_the_same_bits(pipeline, student, values, tmp_path):
    from chronomoe.training.distillation import distil

    other = create_student_model(pipeline, StudentConfig(num_layers=1))
    windows = training_windows(list(values), SHAPE, size=8)
    distil(other, windows, LiveTeacher(exact_model_of(pipeline)), QUICK, tmp_path)
    Chronos2DistillationTrainer(
        teacher_pipeline=pipeline, student_model=student, train_dataset=windows, args=QUICK
    ).train()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in student.state_dict().items())


def test_a_router_is_trained_on_data_of_any_form(pipeline, student, values):
    mixture = build_mixture([student, pipeline], num_experts_per_tok=1)
    before = {name: value.clone() for name, value in mixture.state_dict().items()}
    shape = {"prediction_length": 16, "num_windows": 24}
    curve = fit_router(mixture, list(values), args=RouterTrainingConfig(epochs=2), **shape)
    assert len(curve["loss"]) == 2
    changed = {
        name.split(".")[0] for name, value in mixture.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed <= {"router", "balance_bias"}


def test_the_windows_a_router_stops_by_are_not_drawn_for_training(pipeline, student, monkeypatch):
    values = np.arange(6 * 120, dtype=np.float32).reshape(6, 120)  # no value twice
    drawn = training_windows(list(values), SHAPE, size=200, leave_last=True)
    last = set(values[:, -SHAPE.horizon :].ravel().tolist())
    assert not any(last & set(drawn[place].target.ravel().tolist()) for place in range(200))
    mixture = build_mixture([student, pipeline], num_experts_per_tok=1)
    seen = []
    monkeypatch.setattr(routing, "forecast_with_experts", lambda _, windows, **__: seen.append(windows))
    monkeypatch.setattr(routing, "train_router", lambda *_: {})
    fit_router(mixture, list(values), prediction_length=16, num_windows=200)
    assert not any(last & set(seen[0][place].target.ravel().tolist()) for place in range(200))
    with pytest.raises(InputError, match="pass eval_dataset too"):
        fit_router(mixture, drawn, prediction_length=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_dataset": 3}, "training data must be a frame, a file, a domain or what Chronos2Pipeline.fit takes"),
        ({"train_dataset": []}, "training data must be .* is empty"),
        ({"train_dataset": [np.ones(20)]}, "no series of domain .* has a train part that holds a context of 32"),
        ({"prediction_length": 65}, "prediction_length must be at most 64, what this model forecasts in one pass"),
        ({"columns": {"freq": "h"}}, "freq name columns of a frame or file, got a list"),
        ({"soft_targets": lambda batch: batch["future_target"]}, "a student has one teacher; pass one of"),
        ({"loss": LossConfig(hidden_weight=0.1), "teacher_pipeline": None}, "hidden_weight needs the teacher itself"),
    ],
)
def test_what_cannot_be_trained_is_refused(pipeline, student, values, options, message):
    given = {"teacher_pipeline": pipeline, "student_model": student, "train_dataset": list(values)} | options
    with pytest.raises(InputError, match=message):
        Chronos2DistillationTrainer(**given)


def test_a_student_says_which_teacher_and_data_it_learned_from(pipeline, student, tmp_path):
    domain = load_domain("demo:traffic")
    Chronos2DistillationTrainer(
        teacher_pipeline=pipeline, student_model=student, train_dataset=domain, args=QUICK, prediction_length=16
    ).train()
    ChronoMoEPipeline(student).save_pretrained(tmp_path / "student")
    loaded = chronomoe.load_model(tmp_path / "student")
    said = provenance(loaded.config)
    assert (said.teacher, said.data) == (revision(pipeline.model), {"traffic": fingerprint(domain)})
    card = (tmp_path / "student" / "README.md").read_text()
    assert said.teacher in card
    assert f"traffic `{said.data['traffic']}`" in card
    mixture = build_mixture([loaded, loaded])
    ChronoMoEPipeline(mixture).save_pretrained(tmp_path / "mixture")
    assert said.teacher in (tmp_path / "mixture" / "README.md").read_text()
    assert provenance(create_student_model(loaded).config).teacher is None  # that of a student of its own


def test_another_teacher_than_before_is_refused_unless_that_is_meant(pipeline, student, make_teacher, values):
    shape = {"student_model": student, "train_dataset": list(values), "args": QUICK, "prediction_length": 16}
    Chronos2DistillationTrainer(teacher_pipeline=pipeline, **shape).train()
    Chronos2DistillationTrainer(teacher_pipeline=pipeline, **shape).train()
    other = Chronos2DistillationTrainer(teacher_pipeline=make_teacher(seed=1), **shape)
    with pytest.raises(InputError, match=f"distilled from teacher {revision(pipeline.model)}, these soft targets are"):
        other.train()
    student.config.provenance = None
    other.train()
    assert provenance(student.config).teacher == revision(make_teacher(seed=1))


def test_experts_of_several_teachers_are_mixed_with_a_warning(student, make_teacher):
    other = create_student_model(make_teacher(seed=1), StudentConfig(num_layers=1))
    for model, teacher in ((student, "aaaa"), (other, "bbbb")):
        model.config.provenance = {"teacher": teacher, "data": {}}
    with pytest.warns(UserWarning, match="from several teachers: one from aaaa, two from bbbb"):
        build_mixture({"one": student, "two": other})
    build_mixture({"one": student, "two": student})
