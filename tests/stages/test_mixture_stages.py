import io
import json

import pytest
import torch
from rich.console import Console

from chronomoe import ChronoMoEPipeline, RoutingConfig
from chronomoe.data.domains import load_domain
from chronomoe.data.windows import TrainingWindows, WindowConfig
from chronomoe.models.mixture.mixture import MixtureConfig
from chronomoe.models.mixture.router import RouterConfig
from chronomoe.models.student import StudentConfig, create_student_model
from chronomoe.stages.mixture import route
from chronomoe.stages.soft_targets import Material
from chronomoe.stages.workspace import Workspace
from chronomoe.training.routing import RouterTrainingConfig, forecast_with_experts

WINDOWS = WindowConfig(context_length=64, horizon=16)


def too_high(student):
    """Return a student whose forecasts are far too high: worse than any other."""
    with torch.no_grad():
        student.output_patch_embedding.output_layer.bias.add_(50.0)
    return student


@pytest.fixture
def experts(teacher_folder):
    teacher = ChronoMoEPipeline.from_pretrained(teacher_folder).model
    drawn = [
        create_student_model(
            teacher, StudentConfig(num_layers=1, init="random"), generator=torch.Generator().manual_seed(seed)
        )
        for seed in range(3)
    ]
    return {"worst": too_high(drawn[0]), "one": drawn[1], "two": drawn[2]}


def test_a_router_on_patch_embeddings_is_trained_on_those_of_the_experts_that_stay(experts, series_files, tmp_path):
    domain = load_domain(series_files["power"])
    material = Material.of([domain], WINDOWS, size=8, seed=0, facts={})
    windows = TrainingWindows([domain], WINDOWS, size=8, seed=0)
    routed = route(
        Workspace(tmp_path / "run", console=Console(file=io.StringIO())),
        experts,
        windows,
        material.watched(),
        MixtureConfig(router=RouterConfig(use_patch_embedding=True, hidden_sizes=(8,)), routing=RoutingConfig(top_k=2)),
        RouterTrainingConfig(epochs=1),
        inputs={},
        select=2,
    )
    assert set(json.loads((routed / "router.json").read_text())["validation"]["experts"]) == {"one", "two"}
    model = ChronoMoEPipeline.from_pretrained(routed / "model").model
    features = forecast_with_experts(model, windows, domain_of=[0] * len(windows)).features
    torch.testing.assert_close(model.router.mean, features.mean(dim=0), rtol=1e-3, atol=1e-3)
