"""Tiny real Chronos-2 models and batches. Shapes are checked by jaxtyping and beartype: see pytest's options."""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch
from chronos.chronos2 import Chronos2Model
from chronos.chronos2.config import Chronos2CoreConfig

from chronomoe.models.balancing import BalanceConfig
from chronomoe.models.chronos2 import use_exact_group_attention
from chronomoe.models.mixture.mixture import MixtureConfig, build_mixture
from chronomoe.models.mixture.router import RouterConfig, RoutingConfig
from chronomoe.models.student import StudentConfig, create_student_model
from moe_models import take_sides

os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
torch.set_num_threads(1)  # sums in one order, so that the same seed gives the same bits; tiny models are faster, too

SHARED = ("finished_run", "stock_forecasts")
"""Fixtures of a session that are worth making once, not once in every process."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tell pytest-xdist to keep a file in one process, and all tests of a shared fixture in one."""
    for item in items:
        shared = next((name for name in SHARED if name in item.fixturenames), None)
        item.add_marker(pytest.mark.xdist_group(shared or item.nodeid.split("::")[0]))


SIZES = {"d_model": 48, "d_kv": 16, "d_ff": 96, "num_layers": 4, "num_heads": 4}
FORECASTING = {
    "context_length": 128,
    "input_patch_size": 16,
    "input_patch_stride": 16,
    "output_patch_size": 16,
    "max_output_patches": 4,
    "quantiles": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
    "use_reg_token": True,
    "use_arcsinh": True,
}
pytest_plugins = ("tiny_run", "fuzzing", "client_data", "workshop")
EXPERTS = ("power", "traffic", "generalist", "retail")


@pytest.fixture(scope="session")
def make_teacher():
    """Build a stock ``Chronos2Model`` whose weights are large enough for every part to matter."""

    def make(seed=0, *, forecasting=None, **sizes):
        core = Chronos2CoreConfig(**SIZES | sizes)
        core.chronos_config = copy.deepcopy(FORECASTING | (forecasting or {}))
        model = Chronos2Model(core).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if name.endswith("layer_norm.weight"):
                    parameter.copy_(1 + 0.2 * noise)
                elif parameter.ndim == 1:
                    parameter.copy_(0.1 * noise)
                else:
                    parameter.copy_(0.7 * noise / math.sqrt(parameter.shape[1]))
        return model

    return make


@pytest.fixture
def teacher(make_teacher):
    return make_teacher()


@pytest.fixture(scope="session")
def make_context():
    """Draw walks, seasons and counts, one a row, of different units."""

    def make(batch=6, length=100, *, seed=0):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(batch, length, generator=generator)
        time = torch.arange(length)
        walk = noise.cumsum(dim=1)
        season = torch.sin(2 * torch.pi * time / 12) + 0.3 * noise
        counts = (noise.clamp(min=0.5) - 0.5).mul(5).round()
        rows = torch.stack([(walk, season, counts)[row % 3][row] for row in range(batch)])
        unit = torch.rand(batch, 1, generator=generator) * 10 + 0.1
        return rows * unit + 3 * unit

    return make


@pytest.fixture
def context(make_context):
    return make_context()


@pytest.fixture
def gappy(context):
    """Rows with leading NaN of several lengths, gaps inside, and a last row that was never observed."""
    gappy = context.clone()
    gappy[0, :20] = torch.nan
    gappy[1, 40:60] = torch.nan
    gappy[2, ::3] = torch.nan
    gappy[3, :90] = torch.nan
    gappy[5] = torch.nan
    return gappy


@pytest.fixture
def experts(make_teacher):
    """Experts of other weights, depths and widths."""
    sizes = ({"num_layers": 1}, {"num_layers": 2, "d_ff": 64}, {"num_layers": 3, "num_heads": 2}, {"num_layers": 1})
    return {
        name: use_exact_group_attention(make_teacher(seed=seed, **size))
        for seed, (name, size) in enumerate(zip(EXPERTS, sizes, strict=True))
    }


@pytest.fixture
def make_mixture(experts):
    """Build a mixture in evaluation mode whose router tells the rows apart; K is fixed unless ``routing`` says."""

    def build(*, routing=None, router=None, balance=None, members=experts):
        config = MixtureConfig(
            routing=RoutingConfig(**{"threshold": None} | (routing or {})),
            router=RouterConfig(**router or {}),
            balance=BalanceConfig(**balance or {}),
        )
        return take_sides(build_mixture(members, config).eval())

    return build


@pytest.fixture
def batch(make_context):
    """A batch of interleaved groups with known covariates, gaps and a row never observed."""
    context, future = make_context(batch=8, seed=1), make_context(batch=8, length=32, seed=2)
    context[1, :50] = torch.nan
    context[5] = torch.nan
    known = torch.tensor([1, 0, 0, 1, 0, 0, 0, 0]).bool()[:, None]
    return {
        "context": context,
        "group_ids": torch.tensor([7, 2, 7, 0, 2, 0, 7, 5]),
        "future_covariates": torch.where(known, future, torch.nan),
        "future_target": future,
        "num_output_patches": 2,
    }


STOCK_PIPELINES = """
import sys
import torch
from chronos import BaseChronosPipeline, Chronos2Pipeline

context = torch.load(sys.argv[1] + "/context.pt")
for folder in sys.argv[2:]:
    forecasts = []
    for pipeline in (Chronos2Pipeline, BaseChronosPipeline):
        loaded = pipeline.from_pretrained(folder)
        assert type(loaded) is Chronos2Pipeline, type(loaded)
        forecasts.append(torch.cat(loaded.predict(context[:, None], prediction_length=32)))
    torch.save(torch.stack(forecasts), folder + "/forecasts.pt")
assert not any(name.startswith("chronomoe") for name in sys.modules)
"""


@pytest.fixture(scope="session")
def stock_forecasts(make_teacher, make_context, tmp_path_factory):
    """Save models, forecast 32 steps with both stock pipelines in a process that never imports this package.

    Returns by name the saved model's forecast, and both pipelines' in one tensor. One process: importing takes seconds.
    """
    models = {
        "exact": use_exact_group_attention(make_teacher()),
        "shallow": create_student_model(make_teacher(), StudentConfig(num_layers=2)),
        "narrow": create_student_model(make_teacher(), StudentConfig(num_layers=1, d_model=32, num_heads=2, d_ff=40)),
        "random": create_student_model(make_teacher(), StudentConfig(num_layers=1, init="random")),
    }
    root, context = tmp_path_factory.mktemp("checkpoints"), make_context()
    torch.save(context, root / "context.pt")
    for name, model in models.items():
        model.eval().save_pretrained(root / name)
    command = [sys.executable, "-c", STOCK_PIPELINES, str(root), *(str(root / name) for name in models)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        return {
            name: (model(context, num_output_patches=2).quantile_preds, torch.load(root / name / "forecasts.pt"))
            for name, model in models.items()
        }


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real series, too large to ship: ``shared/data`` beside the checkout or further up."""
    folders = [parent / "shared" / "data" for parent in Path(__file__).resolve().parents]
    found = next((folder for folder in folders if folder.is_dir()), None)
    if found is None:
        pytest.skip("there is no shared/data beside the checkout or further up, which holds the real series")
    return found


@pytest.fixture
def unchecked(monkeypatch):
    """Run without jaxtyping and beartype, as users do: what a type refuses in the tests must refuse itself."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
