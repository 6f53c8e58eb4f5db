import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chronomoe.data.soft_targets import LiveTeacher, SoftTargetStore, revision
from chronomoe.data.windows import TrainingWindows, WindowConfig, collate, model_inputs
from chronomoe.errors import InputError
from chronomoe.models.chronos2 import use_exact_group_attention
from chronomoe.models.sparse.config import MoEConfig
from chronomoe.models.sparse.upcycling import upcycle
from chronomoe.models.student import StudentConfig, create_student_model
from chronomoe.training.arguments import DistilConfig, training_arguments
from chronomoe.training.distillation import distil
from chronomoe.training.losses import LossConfig
from chronomoe.training.trainer import Chronos2MoEDistillationTrainer
from sample_series import sample_domain

STEPS = 6
EXPERTS = 4


@pytest.fixture
def dense(make_teacher):
    return use_exact_group_attention(make_teacher(num_layers=2))


@pytest.fixture
def make_moe():
    """Upcycle a model; the z-loss keeps the auxiliary loss of even routers above zero."""

    def make(model, **changes):
        return upcycle(model, MoEConfig(**{"num_experts": EXPERTS, "top_k": 2, "z_weight": 1.0} | changes))

    return make


@pytest.fixture
def models(dense, make_moe):
    """Teachers and students, dense and MoE, by kind."""
    small = create_student_model(dense, StudentConfig(num_layers=1, d_ff=64))
    return {"dense": (dense, small), "moe": (make_moe(dense), make_moe(small))}


@pytest.fixture
def student(models):
    return models["moe"][1]


@pytest.fixture
def windows():
    domains = [sample_domain("wave"), sample_domain("spikes", variates=2, known=("k",))]
    config = WindowConfig(context_length=48, horizon=16, min_context_length=32)
    return TrainingWindows(domains, config, size=32, seed=0)


def settings(**changes):
    given = {"steps": STEPS, "batch_size": 4, "checkpoint_steps": 2, "learning_rate": 3e-3}
    return DistilConfig(**given | changes)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("teacher", ["dense", "moe"])
@pytest.mark.parametrize("student", ["dense", "moe"])
@pytest.mark.parametrize("learns", [False, True])
def test_every_pair_of_dense_and_moe_trains(models, windows, tmp_path, teacher, student, learns):
    guide, learner = models[teacher][0], models[student][1]
    before = [revision(model) for model in (guide, learner)]
    soft = {"soft_targets": None, "teacher": guide} if learns else {"soft_targets": LiveTeacher(guide)}
    curve = distil(learner, windows, **soft, config=settings(steps=12), folder=tmp_path, validation=windows)
    assert revision(learner) != before[1]
    assert (revision(guide) != before[0]) == learns
    assert curve["eval_loss"][-1] < curve["eval_loss"][0]
    assert ("load" in curve) == (student == "moe")
    assert ("teacher_hard_loss" in curve) == learns
    assert not learner.training
    assert not guide.training


@pytest.mark.parametrize("aux_weight", [0.0, 0.01, 0.5])
def test_the_loss_is_the_distillation_loss_and_the_weighted_auxiliary_loss(
    models, student, windows, tmp_path, aux_weight
):
    config = settings(loss=LossConfig(soft_weight=0.3))
    soft = LiveTeacher(models["dense"][0])
    curve = distil(student, windows, soft, config, tmp_path, aux_weight=aux_weight)
    assert curve["aux_loss"][0] == pytest.approx(1 + math.log(EXPERTS) ** 2, rel=0.01)  # Switch and z-loss, even router
    parts = (curve[name] for name in ("loss", "soft_loss", "hard_loss", "aux_loss"))
    for total, soft, hard, aux in zip(*parts, strict=True):
        assert total == pytest.approx(0.3 * soft + 0.7 * hard + aux_weight * aux, abs=1e-3)


@pytest.mark.parametrize("teacher", ["dense", "moe"])
def test_a_teacher_that_learns_adds_its_hard_and_auxiliary_loss(models, student, windows, tmp_path, teacher):
    config = settings(loss=LossConfig(soft_weight=0.3))
    curve = distil(student, windows, None, config, tmp_path, teacher=models[teacher][0], aux_weight=0.5)
    names = ("loss", "soft_loss", "hard_loss", "aux_loss", "teacher_hard_loss", "teacher_aux_loss")
    for total, soft, hard, aux, teacher_hard, teacher_aux in zip(*(curve[name] for name in names), strict=True):
        assert (teacher_aux > 0) == (teacher == "moe")
        own = 0.3 * soft + 0.7 * hard + 0.5 * aux
        assert total == pytest.approx(own + teacher_hard + 0.5 * teacher_aux, abs=1e-3)


def test_no_gradient_of_the_student_reaches_the_teacher_that_learns(models, windows, tmp_path):
    teacher, student = models["moe"]
    trainer = Chronos2MoEDistillationTrainer(
        student_model=student,
        soft_targets=None,
        teacher=teacher,
        loss=LossConfig(soft_weight=1.0),
        args=training_arguments(str(tmp_path), max_steps=1),
    )
    batch = collate([windows[0], windows[1]], patch_size=16)
    pair = trainer.model.eval()  # no dropout
    trainer.compute_loss(pair, batch).backward()
    both = [parameter.grad.clone() for parameter in teacher.parameters() if parameter.grad is not None]
    teacher.zero_grad()
    student.requires_grad_(False)
    trainer.compute_loss(pair, batch).backward()
    alone = [parameter.grad for parameter in teacher.parameters() if parameter.grad is not None]
    assert all(torch.equal(one, other) for one, other in zip(both, alone, strict=True))


def test_the_curve_holds_entropy_and_load_of_each_layer_and_survives_json(dense, make_moe, windows, tmp_path):
    student = make_moe(dense)
    curve = distil(student, windows, None, settings(), tmp_path)
    entropy, load = torch.tensor(curve["entropy"]), torch.tensor(curve["load"])
    assert entropy.shape == (STEPS, 2)
    assert load.shape == (STEPS, 2, EXPERTS)
    torch.testing.assert_close(entropy[0], torch.full((2,), math.log(EXPERTS)))
    torch.testing.assert_close(load.sum(dim=2), torch.ones(STEPS, 2))
    assert json.loads(json.dumps(curve)) == curve


def test_store_and_live_moe_teacher_agree(models, student, windows, tmp_path):
    teacher = models["moe"][0]
    store = SoftTargetStore.build(tmp_path / "store", teacher, windows)
    batch = collate([windows[index] for index in range(4)], patch_size=16)
    torch.testing.assert_close(store(batch), LiveTeacher(teacher)(batch), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("stopped_at", [2, 5])
@pytest.mark.parametrize("learns", [False, True])
def test_a_killed_run_ends_with_the_weights_and_biases_of_one_left_alone(
    dense, make_moe, windows, tmp_path, stopped_at, learns
):
    def stop(done, total):
        if done == stopped_at:
            raise KeyboardInterrupt

    def run(folder, progress=lambda done, total: None):
        teacher, student = make_moe(dense, bias_rate=0.1), make_moe(dense, bias_rate=0.1, layers=(0,))
        soft = {"soft_targets": None, "teacher": teacher} if learns else {"soft_targets": LiveTeacher(teacher)}
        distil(student, windows, config=settings(), folder=tmp_path / folder, progress=progress, **soft)
        return weights(student) | {f"teacher.{name}": value for name, value in weights(teacher).items()}

    whole = run("whole")
    assert any(name.endswith("balance_bias.bias") and value.abs().max() > 0 for name, value in whole.items())
    with pytest.raises(KeyboardInterrupt):
        run("cut", stop)
    assert_same_bits(whole, run("cut"))


def shares(model, windows, patch_size=16):
    """Return the share of the choices that each expert of each layer takes."""
    batch = collate([windows[index] for index in range(len(windows))], patch_size=patch_size)
    with torch.no_grad():
        return torch.stack([layer.load for layer in model.eval()(**model_inputs(batch)).moe])


@pytest.mark.parametrize(
    ("top_k", "balance", "steps"),
    [(1, {}, 300), (2, {}, 120), (1, {"bias_rate": 0.001}, 300)],
    ids=["default, one choice", "default, two choices", "and a bias"],
)
def test_no_expert_dies_in_training_with_balancing(dense, make_moe, windows, tmp_path, top_k, balance, steps):
    student = make_moe(dense, top_k=top_k, **{"z_weight": 0.001} | balance)
    distil(student, windows, LiveTeacher(dense), settings(steps=steps, checkpoint_steps=1000), tmp_path)
    assert shares(student, windows).min() >= 1 / (4 * EXPERTS)


def test_frozen_weights_are_not_in_the_optimiser(student, tmp_path):
    student.requires_grad_(False)
    student.encoder.block[0].layer[2].requires_grad_(True)
    trainer = Chronos2MoEDistillationTrainer(
        student_model=student, soft_targets=None, loss=LossConfig(), args=training_arguments(str(tmp_path), max_steps=1)
    )
    optimised = {id(value) for group in trainer.create_optimizer().param_groups for value in group["params"]}
    assert optimised == {id(value) for value in student.encoder.block[0].layer[2].parameters()}


def test_two_processes_agree_on_weights_and_biases_and_report_their_common_load(tmp_path):
    script = Path(__file__).parents[1].joinpath("distil_in_processes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, script, tmp_path, "moe"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"weights-{rank}.pt") for rank in range(2)]
    assert_same_bits(*ranks)
    biases = [value for name, value in ranks[0].items() if name.endswith("balance_bias.bias")]
    assert all(value.abs().max() > 0 for value in biases)
    curves = [json.loads((tmp_path / f"curve-{rank}.json").read_text()) for rank in range(2)]
    for name in ("load", "entropy", "aux_loss"):
        assert curves[0][name] == curves[1][name]
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(2)]
    assert set(seen[0]).isdisjoint(seen[1])


def test_impossible_trainings_are_refused(models, make_teacher, windows, tmp_path):
    teacher, student = models["moe"]
    with pytest.raises(InputError, match=r"aux_weight must be at least 0, got -0\.1"):
        distil(student, windows, None, settings(), tmp_path / "out", aux_weight=-0.1)
    with pytest.raises(InputError, match="a student has one teacher; pass one of teacher, teacher_pipeline"):
        distil(student, windows, LiveTeacher(teacher), settings(), tmp_path / "out", teacher=teacher)
    other = use_exact_group_attention(make_teacher(forecasting={"quantiles": [0.1, 0.5, 0.9]}))
    with pytest.raises(InputError, match="must forecast the same quantile levels, got 3 and 9"):
        distil(student, windows, None, settings(), tmp_path / "out", teacher=other)
    assert not (tmp_path / "out").exists()
