"""What the tests of clients share: a checkpoint, and series with a covariate that is known ahead."""

import pytest
import torch

from chronomoe.models.mixture.mixture import MixtureConfig, build_mixture
from chronomoe.pipeline import ChronoMoEPipeline

HORIZON = 8
LEVELS = [0.1, 0.5, 0.9]


@pytest.fixture(scope="session")
def mixture_folder(make_teacher, tmp_path_factory):
    """Checkpoint of a mixture of two experts whose router takes sides."""
    experts = {name: make_teacher(seed=seed, num_layers=1) for seed, name in enumerate(("power", "retail"))}
    mixture = build_mixture(experts, MixtureConfig())
    with torch.no_grad():
        mixture.router.network[-1].weight.mul_(20)
    folder = tmp_path_factory.mktemp("client") / "moe"
    ChronoMoEPipeline(mixture).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def promotions(make_frame):
    """A long frame of three daily series and the covariate ``promo``, and the same frame cut before the last steps."""
    frame = make_frame(3, 96 + HORIZON, freq="D", season=7, covariate="promo")
    return frame, frame[frame.groupby("item_id").cumcount() < 96].reset_index(drop=True)
