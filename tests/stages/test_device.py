"""A whole run on one device, with a pretended GPU that refuses to meet tensors of the CPU."""

import pytest
import torch

from chronomoe.data.clusters import embed_series
from chronomoe.data.soft_targets import SoftTargetStore
from chronomoe.data.windows import TrainingWindows, WindowConfig
from chronomoe.errors import InputError
from chronomoe.evaluation.cost import compare
from chronomoe.evaluation.routing import task_routing
from chronomoe.evaluation.tasks import forecast, make_task
from chronomoe.models.chronos2 import use_exact_group_attention
from chronomoe.models.mixture.mixture import MixtureConfig
from chronomoe.models.mixture.router import RoutingConfig
from chronomoe.models.student import StudentConfig, create_student_model
from chronomoe.stages.evaluation import _upstream
from chronomoe.stages.mixture import route, seeded_mixture
from chronomoe.stages.processes import choose_device
from chronomoe.stages.soft_targets import Material
from chronomoe.stages.workspace import Workspace
from chronomoe.training.arguments import DistilConfig, training_arguments
from chronomoe.training.distillation import distil
from chronomoe.training.losses import LossConfig
from chronomoe.training.routing import RouterTrainingConfig, forecast_with_experts, train_router
from chronomoe.training.validation import validation_loss
from pretend_gpu import GPU, pretend_gpu
from sample_series import sample_domain

WINDOWS = WindowConfig(context_length=48, horizon=16, min_context_length=32)


@pytest.fixture
def cpu(make_teacher):
    return use_exact_group_attention(make_teacher(num_layers=2))


@pytest.fixture
def gpu():
    with pretend_gpu() as device:
        yield device


@pytest.fixture
def domain():
    return sample_domain("spikes", variates=2, known=("k",))


@pytest.fixture
def windows(domain):
    return TrainingWindows([domain, sample_domain("wave")], WINDOWS, size=12, seed=0)


@pytest.fixture
def students(cpu):
    return {str(layers): create_student_model(cpu, StudentConfig(num_layers=layers)) for layers in (1, 2)}


def test_the_pretended_gpu_refuses_to_meet_the_cpu(gpu):
    there = torch.ones(2).to(gpu)
    assert (there + 1).sum().item() == 4
    with pytest.raises(RuntimeError, match="on the same device"):
        there + torch.ones(2)


def test_soft_targets_are_computed_where_the_teacher_is(gpu, cpu, windows, tmp_path):
    here = SoftTargetStore.build(tmp_path / "cpu", cpu, windows)
    there = SoftTargetStore.build(tmp_path / "gpu", cpu.to(gpu), windows)
    assert cpu.device == GPU
    found, expected = (torch.from_numpy(store.values[:]).view(torch.bfloat16).float() for store in (there, here))
    assert torch.allclose(found, expected, atol=0.05)  # the last bit of bf16


def test_students_are_cut_and_watched_where_the_teacher_is(gpu, cpu, windows):
    expected = validation_loss(create_student_model(cpu, StudentConfig(num_layers=1)), windows, batch_size=4)
    student = create_student_model(cpu.to(gpu), StudentConfig(num_layers=1))
    assert student.device == GPU
    assert validation_loss(student, windows, batch_size=4) == pytest.approx(expected)


def test_a_student_is_distilled_where_it_is(gpu, cpu, windows, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    config = DistilConfig(steps=2, batch_size=4, loss=LossConfig(hidden_weight=0.1))
    student = create_student_model(cpu.to(gpu), StudentConfig(num_layers=1))
    store = SoftTargetStore.build(tmp_path / "store", cpu, windows)
    before = student.encoder.block[0].layer[2].mlp.wi.weight.detach().cpu()
    curve = distil(student, windows, store, config, tmp_path / "own", validation=windows, hidden_teacher=cpu)
    assert student.device == cpu.device == GPU
    assert len(curve["eval_loss"]) > 0
    assert not torch.equal(student.encoder.block[0].layer[2].mlp.wi.weight.cpu(), before)


def test_clusters_are_found_where_the_teacher_is(gpu, cpu, domain):
    stops = [60] * len(domain.series)
    expected = embed_series(cpu, domain.series, stops=stops)
    assert torch.allclose(embed_series(cpu.to(gpu), domain.series, stops=stops), expected)


@pytest.mark.parametrize("routing", [{"top_k": 1}, {"top_k": 2, "gumbel": True}])
def test_a_router_learns_where_its_mixture_is(gpu, students, windows, routing):
    moe = MixtureConfig(routing=RoutingConfig(**routing))
    owner = [windows.domain_of(index) for index in range(len(windows))]
    curves, training = [], RouterTrainingConfig(epochs=2, batch_size=4)
    for device in ("cpu", gpu):
        mixture = seeded_mixture({name: one.to(device) for name, one in students.items()}, moe, seed=0)
        assert mixture.device == mixture.router.mean.device == torch.device(device)
        seen = forecast_with_experts(mixture, windows, domain_of=owner)
        curves.append(train_router(mixture, seen, seen, training))
    assert curves[0]["eval_loss"] == pytest.approx(curves[1]["eval_loss"])


def test_a_mixture_is_scored_routed_and_timed_where_it_is(gpu, cpu, students, domain):
    task = make_task(domain, WINDOWS, limit=4)
    mixture = seeded_mixture(students, MixtureConfig(), seed=0)
    forecasts, chosen = forecast(mixture, task), task_routing(mixture, task)
    mixture.to(gpu)
    assert forecast(mixture, task) == pytest.approx(forecasts, abs=1e-4)
    assert torch.equal(task_routing(mixture, task).expert, chosen.expert)
    context = torch.from_numpy(task.windows[0].context)
    upstream = _upstream(cpu.to(gpu))
    assert upstream.device == GPU
    assert compare({"a": mixture, "b": upstream}, context, horizon=16, repeats=1)["a"].parameters > 0


def test_the_stages_of_a_mixture_stay_on_the_device(gpu, students, domain, tmp_path):
    work = Workspace(tmp_path / "run")
    material = Material.of([domain], WINDOWS, size=8, seed=0, facts={})
    members = {name: one.to(gpu) for name, one in students.items()}
    options = {"inputs": {}, "select": 1}
    moe = MixtureConfig(routing=RoutingConfig(top_k=1))
    routed = route(work, members, material.windows, material.watched(), moe, RouterTrainingConfig(epochs=1), **options)
    assert (routed / "model" / "model.safetensors").exists()


@pytest.fixture
def gpus(monkeypatch):
    """Let torch find two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize(
    ("name", "found"), [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")]
)
def test_a_device_goes_by_its_name(gpus, name, found):
    assert choose_device(name) == torch.device(found)


def test_each_of_several_processes_takes_its_own_gpu(gpus, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device() == torch.device("cuda:1")
    with pytest.raises(InputError, match="each of several processes takes the GPU of its own number, got 'cuda:0'"):
        choose_device("cuda:0")


def test_without_a_gpu_everything_runs_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device() == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpu", "device must be auto, cpu, cuda, cuda:N or mps, got 'gpu'"),
        ("meta", "device must be auto, cpu, cuda, cuda:N or mps, got 'meta'"),
        ("cuda", "device 'cuda' needs a CUDA GPU, and torch .* finds none; use cpu"),
        ("mps", "device 'mps' needs an Apple GPU, and torch .* finds none; use cpu"),
    ],
)
def test_a_device_that_is_not_there_is_refused(monkeypatch, name, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match=words):
        choose_device(name)


def test_a_gpu_beyond_those_that_are_there_is_refused(gpus):
    with pytest.raises(InputError, match="device 'cuda:2' is not there: torch finds 2 GPUs, numbered from 0"):
        choose_device("cuda:2")


def test_a_trainer_uses_the_device_that_it_is_told(tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    arguments = training_arguments(str(tmp_path), device=torch.device("cuda:1"))
    assert (arguments.device, arguments.n_gpu, chosen) == (torch.device("cuda:1"), 1, [torch.device("cuda:1")])
    arguments = training_arguments(str(tmp_path), device=torch.device("cpu"))
    assert (arguments.device, arguments.n_gpu, arguments.use_cpu) == (torch.device("cpu"), 0, True)


def test_a_missing_device_is_refused_before_anything_is_written(refused, recipe, series_files, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sales = series_files["power"]
    for words in (
        ["run", recipe(), "--out", tmp_path / "run"],
        ["distil", "tiny", sales, "--out", tmp_path / "student"],
        ["compose", "a=tiny", "--data", sales, "--out", tmp_path / "moe"],
        ["expand", "tiny", sales, "--out", tmp_path / "grown"],
        ["evaluate", "tiny", "--data", sales, "--horizon", 16, "--out", tmp_path / "found.jsonl"],
        ["predict", "tiny", sales, "--horizon", 16, "--out", tmp_path / "found.csv"],
        ["pretrain", "tiny-teacher", "--out", tmp_path / "teacher"],
    ):
        assert "device 'cuda' needs a CUDA GPU" in refused(*words, "--device", "cuda")
