"""The recipe for the real teacher: from hub ids to a mixture, on a local folder in the hub's layout."""

import json
from dataclasses import replace
from io import StringIO

import numpy as np
import pandas as pd
import pytest
from chronos import BaseChronosPipeline
from rich.console import Console

from chronomoe.data.windows import WindowConfig
from chronomoe.pipeline import ChronoMoEPipeline
from chronomoe.recipe import load_recipe
from chronomoe.run import run

HUB = "hub:autogluon/chronos_datasets"


@pytest.fixture
def recipe():
    return load_recipe("chronos-2")


@pytest.fixture
def hub(recipe, tmp_path):
    """The recipe's data sets as the hub lays them out: a folder and a config for each, one row a series."""
    folder, time = tmp_path / "chronos_datasets", pd.date_range("2024-01-01", periods=300, freq="h")
    names = [domain.data.rpartition("/")[2] for domain in recipe.domains]
    for seed, name in enumerate(names):
        noise = np.random.default_rng(seed).random((2, len(time)))
        waves = [np.sin(np.arange(len(time)) * 2 * np.pi / 24 + seed) + row for row in noise]
        rows = pd.DataFrame({"id": ["a", "b"], "timestamp": [time.to_numpy()] * 2, "target": waves})
        (folder / name).mkdir(parents=True)
        rows.to_parquet(folder / name / "train-00000-of-00001.parquet")
    configs = [{"config_name": name, "data_files": f"{name}/train-*"} for name in names]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    return folder


def test_the_recipe_for_chronos_2_runs_on_what_the_hub_holds(recipe, hub, make_teacher, tmp_path):
    ChronoMoEPipeline(make_teacher(num_layers=6)).save_pretrained(tmp_path / "amazon" / "chronos-2")
    assert recipe.teacher == "amazon/chronos-2"
    assert all(domain.data.startswith(HUB) for domain in recipe.domains)
    local = replace(
        recipe,
        teacher=str(tmp_path / "amazon" / "chronos-2"),
        domains=tuple(
            replace(domain, data=domain.data.replace(HUB, f"hub:{hub}"), cache_dir=str(tmp_path / "cache"))
            for domain in recipe.domains
        ),
        windows=WindowConfig(context_length=64, horizon=16),
        budget=replace(recipe.budget, steps=10, windows=40, batch_size=4),
        router_windows=20,
        evaluation=replace(recipe.evaluation, windows_per_domain=4, bootstrap_draws=10, latency_repeats=1),
    )
    run(local, tmp_path / "run", console=Console(file=StringIO()))
    mixture = BaseChronosPipeline.from_pretrained(tmp_path / "run" / "moe")
    assert set(mixture.model.config.expert_names) == {"generalist", *(domain.name for domain in recipe.domains)}
    assert mixture.predict([np.ones(50, dtype=np.float32)], prediction_length=16)[0].shape[-1] == 16
