import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chronomoe.data.soft_targets import LiveTeacher, SoftTargetStore
from chronomoe.data.windows import TrainingWindows, WindowConfig, collate
from chronomoe.models.chronos2 import use_exact_group_attention
from chronomoe.models.student import StudentConfig, create_student_model
from chronomoe.training.arguments import DistilConfig, training_arguments
from chronomoe.training.distillation import distil
from chronomoe.training.losses import LossConfig
from chronomoe.training.trainer import Chronos2DistillationTrainer, last_checkpoint
from chronomoe.training.validation import validation_loss
from sample_series import sample_domain

STEPS = 6


@pytest.fixture
def exact(make_teacher):
    return use_exact_group_attention(make_teacher(num_layers=2))


@pytest.fixture
def student(exact):
    return create_student_model(exact, StudentConfig(num_layers=1))


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
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def trained(student, *args, **kwargs):
    """Return the weights after training, and leave the student as it is."""
    before = weights(student)
    distil(student, *args, **kwargs)
    after = weights(student)
    student.load_state_dict(before)
    return after


def test_a_student_learns_its_teacher(student, exact, windows, tmp_path):
    config = settings(steps=25, checkpoint_steps=100, loss=LossConfig(soft_weight=1.0))
    curve = distil(student, windows, LiveTeacher(exact), config, tmp_path, validation=windows)
    assert curve["step"] == list(range(1, 26))
    assert sum(curve["soft_loss"][-5:]) < 0.8 * sum(curve["soft_loss"][:5])
    assert curve["loss"] == pytest.approx(curve["soft_loss"], abs=1e-3)
    assert curve["eval_step"] == [5, 10, 15, 20, 25]
    assert not student.training


@pytest.mark.parametrize("soft_weight", [0.0, 0.3])
def test_both_parts_are_reported_and_add_up(student, exact, windows, tmp_path, soft_weight):
    config = settings(loss=LossConfig(soft_weight=soft_weight))
    curve = distil(student, windows, LiveTeacher(exact), config, tmp_path)
    for total, soft, hard in zip(curve["loss"], curve["soft_loss"], curve["hard_loss"], strict=True):
        assert soft > 0
        assert hard > 0
        assert total == pytest.approx(soft_weight * soft + (1 - soft_weight) * hard, abs=1e-3)


def test_without_soft_targets_the_loss_is_the_hard_one(student, windows, tmp_path):
    curve = distil(student, windows, None, settings(steps=20), tmp_path)
    assert curve["loss"] == pytest.approx(curve["hard_loss"], abs=1e-3)
    assert curve["loss"][-1] < curve["loss"][0]


def test_the_evaluation_loss_is_the_hard_one_whatever_the_weights(student, exact, windows, tmp_path):
    curves = [
        distil(
            student,
            windows,
            soft,
            settings(steps=1, learning_rate=1e-12, loss=loss),
            tmp_path / name,
            validation=windows,
        )
        for name, soft, loss in (
            ("none", None, LossConfig()),
            ("soft", LiveTeacher(exact), LossConfig(soft_weight=1.0)),
        )
    ]
    assert curves[0]["eval_loss"] == pytest.approx(curves[1]["eval_loss"], rel=1e-5)


def test_store_and_live_teacher_give_the_same_training(student, exact, windows, tmp_path):
    store = SoftTargetStore.build(tmp_path / "store", exact, windows)
    live, stored = (
        trained(student, windows, soft, settings(learning_rate=3e-4), tmp_path / name)
        for name, soft in (("a", LiveTeacher(exact)), ("b", store))
    )
    start = weights(student)
    moved = sum((live[name] - start[name]).abs().sum() for name in live)
    apart = sum((live[name] - stored[name]).abs().sum() for name in live)
    assert 0 < apart < 0.1 * moved


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not(student, exact, windows, tmp_path):
    first, second, other = (
        trained(student, windows, LiveTeacher(exact), settings(seed=seed), tmp_path / str(run))
        for run, seed in enumerate((0, 0, 1))
    )
    assert_same_bits(first, second)
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


def test_training_in_bfloat16_is_training_but_for_rounding_and_leaves_a_student_of_float32(
    student, exact, windows, tmp_path
):
    soft, start = LiveTeacher(exact), weights(student)
    wide, narrow, again = (
        trained(student, windows, soft, settings(bf16=bf16), tmp_path / str(run))
        for run, bf16 in enumerate((False, True, True))
    )
    assert_same_bits(narrow, again)
    assert all(value.dtype == torch.float32 for value in narrow.values())
    apart = sum((wide[name] - narrow[name]).abs().sum() for name in wide)
    assert 0 < apart < 0.2 * sum((wide[name] - start[name]).abs().sum() for name in wide)
    student.load_state_dict(narrow)
    used = []
    student.encoder.block[0].layer[0].self_attention.q.register_forward_hook(lambda _, __, out: used.append(out.dtype))
    student(torch.from_numpy(windows[0].context))
    assert used == [torch.float32], "the type of training must not stay with the student"


@pytest.mark.parametrize("stopped_at", [2, 5])
def test_a_killed_run_ends_with_the_weights_of_one_left_alone(student, exact, windows, tmp_path, stopped_at):
    def stop(done, total):
        if done == stopped_at:
            raise KeyboardInterrupt

    soft = LiveTeacher(exact)
    whole = trained(student, windows, soft, settings(), tmp_path / "whole")
    start = weights(student)
    with pytest.raises(KeyboardInterrupt):
        distil(student, windows, soft, settings(), tmp_path / "cut", progress=stop)
    student.load_state_dict(start)
    steps = []
    distil(student, windows, soft, settings(), tmp_path / "cut", progress=lambda done, total: steps.append(done))
    assert steps[0] == (1 if stopped_at == 2 else 5)  # callbacks run before the step's checkpoint is written
    assert_same_bits(whole, weights(student))


@pytest.mark.parametrize("left", ["nothing", "half"])
def test_a_checkpoint_that_a_kill_cut_short_is_not_continued_from(student, exact, windows, tmp_path, left):
    def stop(done, total):
        if done == 5:
            raise KeyboardInterrupt

    soft, start = LiveTeacher(exact), weights(student)
    whole = trained(student, windows, soft, settings(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        distil(student, windows, soft, settings(), tmp_path / "cut", progress=stop)
    shutil.copytree(tmp_path / "cut" / "checkpoint-4", tmp_path / "cut" / "checkpoint-5")
    state = tmp_path / "cut" / "checkpoint-5" / "trainer_state.json"
    (tmp_path / "cut" / "checkpoint-5" / "optimizer.pt").unlink()
    state.unlink() if left == "nothing" else state.write_text(state.read_text()[:100])
    assert last_checkpoint(tmp_path / "cut") == str(tmp_path / "cut" / "checkpoint-4")
    student.load_state_dict(start)
    distil(student, windows, soft, settings(), tmp_path / "cut")
    assert_same_bits(whole, weights(student))


def test_a_folder_that_is_missing_has_no_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path / "missing") is None


def test_the_hidden_loss_draws_hidden_states_to_the_teachers(student, exact, windows, tmp_path):
    def gap():
        batch = collate([windows[0], windows[1]], patch_size=16)
        inputs = {"group_ids": batch["group_ids"], "num_output_patches": 1, "output_hidden_states": True}
        own, theirs = (model(batch["context"], **inputs).hidden_states[0] for model in (student, exact))
        return 1 - torch.nn.functional.cosine_similarity(own, theirs, dim=-1).mean().item()

    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    before, exact = gap(), exact.train()
    config = settings(steps=20, loss=LossConfig(hidden_weight=5.0, soft_weight=1.0))
    distil(student, windows, LiveTeacher(exact), config, tmp_path, hidden_teacher=exact)
    assert gap() < 0.7 * before
    assert not exact.training


@pytest.fixture
def pair(make_mixture, experts):
    return make_mixture(members={name: experts[name] for name in ("power", "retail")}, routing={"top_k": 2})


def test_joint_training_uses_two_learning_rates(pair, tmp_path):
    trainer = Chronos2DistillationTrainer(
        student_model=pair,
        learning_rates={"experts": 1e-5},
        args=training_arguments(str(tmp_path), learning_rate=1e-2, max_steps=1),
        data_collator=functools.partial(collate, patch_size=16),
    )
    groups = trainer.create_optimizer().param_groups
    router = {id(value) for value in pair.router.parameters()}
    for group in groups:
        assert {id(value) in router for value in group["params"]} == {group["lr"] == 1e-2}
        assert group["lr"] in (1e-2, 1e-5)
    assert sum(len(group["params"]) for group in groups) == len(list(pair.parameters()))


def test_joint_training_decays_neither_biases_nor_norms(pair, tmp_path):
    trainer = Chronos2DistillationTrainer(
        student_model=pair,
        learning_rates={"experts": 1e-5},
        args=training_arguments(str(tmp_path), weight_decay=0.1, max_steps=1),
        data_collator=functools.partial(collate, patch_size=16),
    )
    groups = trainer.create_optimizer().param_groups
    decayed = {id(value) for group in groups if group["weight_decay"] for value in group["params"]}
    names = {name for name, value in pair.named_parameters() if id(value) in decayed}
    assert names
    assert not {name for name in names if name.endswith("bias") or "layer_norm" in name}


def test_a_mixture_trains_jointly_and_its_experts_move_less(pair, exact, windows, tmp_path):
    before = weights(pair)
    config = settings(steps=20, checkpoint_steps=100, learning_rate=1e-2, loss=LossConfig(soft_weight=1.0))
    curve = distil(pair, windows, LiveTeacher(exact), config, tmp_path, learning_rates={"experts": 1e-3})
    assert sum(curve["loss"][-5:]) < 0.9 * sum(curve["loss"][:5])
    moved = {
        part: max(
            (value - before[name]).abs().max() for name, value in pair.named_parameters() if name.startswith(part)
        )
        for part in ("router.", "experts.0.", "experts.1.")
    }
    assert 0 < max(moved["experts.0."], moved["experts.1."]) < 0.3 * moved["router."]


def test_two_processes_agree_on_the_weights_and_see_their_own_windows(tmp_path):
    script = Path(__file__).parents[1].joinpath("distil_in_processes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, tmp_path]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"weights-{rank}.pt") for rank in range(2)]
    assert_same_bits(*ranks)
    start = torch.load(tmp_path / "start.pt")
    assert any(not torch.equal(value, start[name]) for name, value in ranks[0].items())
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(2)]
    assert [len(windows) for windows in seen] == [12, 12]
    assert set(seen[0]).isdisjoint(seen[1])
    assert len(set(seen[0] + seen[1])) == 24


def test_averaged_weights_are_what_is_validated_and_kept(student, exact, windows, tmp_path):
    config, soft = settings(steps=10, checkpoint_steps=100), LiveTeacher(exact)
    plain = trained(student, windows, soft, config, tmp_path / "plain")
    averaging = replace(config, ema_decay=0.8)
    curve = distil(student, windows, soft, averaging, tmp_path / "averaged", validation=windows)
    assert any(not torch.equal(value, plain[name]) for name, value in weights(student).items())
    assert curve["eval_loss"][-1] == validation_loss(student, windows, batch_size=4)


def test_parts_of_a_model_may_have_learning_rates_of_their_own(student, tmp_path):
    trainer = Chronos2DistillationTrainer(
        student_model=student,
        learning_rates={"encoder": 1e-5, "output_patch_embedding": 1e-3},
        args=training_arguments(str(tmp_path), learning_rate=1e-2, max_steps=1),
    )
    rates = {id(value): group["lr"] for group in trainer.create_optimizer().param_groups for value in group["params"]}
    wanted = {"encoder": 1e-5, "output_patch_embedding": 1e-3}
    for name, value in student.named_parameters():
        assert rates[id(value)] == wanted.get(name.split(".")[0], 1e-2)
    assert trainer.create_optimizer() is trainer.optimizer
