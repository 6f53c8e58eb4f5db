import json

import pytest

from chronomoe.data.soft_targets import LiveTeacher
from chronomoe.data.windows import EvaluationWindows, WindowConfig
from chronomoe.errors import InputError
from chronomoe.models.chronos2 import use_exact_group_attention
from chronomoe.models.student import StudentConfig, create_student_model
from chronomoe.training.arguments import DistilConfig
from chronomoe.training.distillation import distil, save_curve, training_curve
from chronomoe.training.losses import LossConfig
from sample_series import sample_domain


@pytest.fixture
def exact(make_teacher):
    return use_exact_group_attention(make_teacher(num_layers=2))


@pytest.fixture
def windows():
    config = WindowConfig(context_length=48, horizon=16, min_context_length=32)
    return EvaluationWindows(sample_domain(), config, part="train")


HIDDEN = DistilConfig(steps=1, loss=LossConfig(hidden_weight=1.0))


def test_the_hidden_loss_is_refused_without_the_teacher(exact, windows, tmp_path):
    student = create_student_model(exact, StudentConfig(num_layers=1))
    message = "hidden_weight needs the teacher itself: a soft-target store holds forecasts only"
    with pytest.raises(InputError, match=message):
        distil(student, windows, LiveTeacher(exact), HIDDEN, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_hidden_loss_is_refused_for_students_of_another_width_and_mixtures(exact, make_mixture, windows, tmp_path):
    narrow = create_student_model(exact, StudentConfig(d_model=32))
    options = {"config": HIDDEN, "folder": tmp_path, "hidden_teacher": exact}
    with pytest.raises(InputError, match="needs a student of the teacher's d_model 48, got 32"):
        distil(narrow, windows, LiveTeacher(exact), **options)
    with pytest.raises(InputError, match="hidden_weight must be 0 for a mixture"):
        distil(make_mixture(), windows, LiveTeacher(exact), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number, got nan"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0, got -1.0"),
        ({"warmup_share": 1.5}, "warmup_share must be at most 1, got 1.5"),
        ({"checkpoint_steps": 0}, "checkpoint_steps must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": 2**32}, "seed must be at most 4294967295, got 4294967296"),
        ({"schedule": "step"}, "schedule must be 'cosine' or 'constant', got 'step'"),
        ({"ema_decay": 1.0}, "ema_decay must be below 1, got 1.0"),
    ],
)
def test_impossible_trainings_are_refused(unchecked, options, message):
    with pytest.raises(InputError, match=message):
        DistilConfig(**options)


def test_a_training_curve_holds_steps_and_losses_and_survives_json(tmp_path):
    history = [
        {"step": 2, "loss": 3.0, "soft_loss": 2.0, "hard_loss": 4.0, "learning_rate": 0.1},
        {"step": 2, "eval_loss": 5.0},
        {"step": 4, "loss": 1.0},
        {"step": 4, "train_loss": 9.0},
    ]
    curve = training_curve(history)
    assert curve == {
        "step": [2, 4],
        "loss": [3.0, 1.0],
        "soft_loss": [2.0, 0.0],
        "hard_loss": [4.0, 0.0],
        "eval_step": [2],
        "eval_loss": [5.0],
    }
    save_curve(curve, tmp_path / "curve.json")
    assert json.loads((tmp_path / "curve.json").read_text()) == curve
