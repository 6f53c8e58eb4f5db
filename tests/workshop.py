"""A folder with all that the code of a page names, small: files, checkpoints, a finished run; and small recipes."""

import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import numpy as np
import pandas as pd
import pytest
import yaml

import chronomoe.recipe
from chronomoe import ChronoMoEPipeline, StudentConfig, build_mixture, create_student_model, load_teacher
from chronomoe.cli.app import main
from chronomoe.recipe import RECIPES

SIZE = {"num_layers": 1, "d_model": 32, "num_heads": 1, "d_ff": 32}
SMALL = {
    "student": SIZE,
    "budget": {"steps": 6, "batch_size": 2, "windows": 8},
    "router_windows": 8,
    "router": {"epochs": 1},
    "baselines": [],
    "upcycling": {"layers": {"num_experts": 2, "top_k": 1}},
    "expanding": {"probe_steps": 1, "max_layers": 1},
    "evaluation": {"windows_per_domain": 2, "bootstrap_draws": 5, "latency_repeats": 1, "top_k": [1]},
}
"""What a recipe becomes so that it takes seconds; its windows get shorter, its teacher and data are those at hand."""


def small(values):
    """Shrink a recipe of a run."""
    horizon = values.get("windows", {}).get("horizon", 48)
    domains = [
        domain | ({"data": "demo:web"} if domain["data"].startswith("hub:") else {}) for domain in values["domains"]
    ]
    changes = {"domains": domains[:2], "teacher": "tiny", "windows": {"context_length": 96, "horizon": horizon}}
    return values | changes | SMALL


def call(words):
    """Run the command line in this process; return its status."""
    before, sys.argv = sys.argv, ["chronomoe", *words]
    try:
        main()
    except SystemExit as left:
        return left.code or 0
    finally:
        sys.argv = before


def long_frame(items, *, freq, steps=600, target="target", covariates=(), seed=0):
    """Draw a long frame of waves with covariates."""
    rng, time = np.random.default_rng(seed), np.arange(steps)
    parts = [
        pd.DataFrame(
            {
                "item_id": item,
                "timestamp": pd.date_range("2024-01-01", periods=steps, freq=freq),
                target: (20 + 5 * np.sin(2 * np.pi * time / 7) + rng.standard_normal(steps)).round(3),
            }
            | {name: rng.integers(0, 2, steps) for name in covariates}
        )
        for item in items
    ]
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="session")
def small_recipes(tmp_path_factory):
    """Folder of the recipes that ship, shrunk."""
    folder = tmp_path_factory.mktemp("recipes")
    for file in RECIPES.iterdir():
        values = yaml.safe_load(file.read_text())
        (folder / file.name).write_text(yaml.safe_dump(small(values) if "domains" in values else values))
    return folder


@pytest.fixture(scope="session")
def furnished(small_recipes, tmp_path_factory):
    """The folder as it is before a page begins; not to be changed."""
    folder = tmp_path_factory.mktemp("workshop")
    known = ("promotion", "price")
    sales = long_frame(["shop-1", "shop-2"], freq="D", steps=660, covariates=known)
    split = sales["timestamp"] < sales["timestamp"].unique()[600]
    for name in ("past", "sales"):
        sales[split].to_csv(folder / f"{name}.csv", index=False)
        sales[split].to_parquet(folder / f"{name}.parquet", index=False)
    sales.to_parquet(folder / "actuals.parquet", index=False)
    (folder / "parts").mkdir()
    for name, part in sales[split].groupby("item_id"):
        part.to_parquet(folder / "parts" / f"{name}.parquet", index=False)
    sales[~split].drop(columns="target").to_csv(folder / "future.csv", index=False)
    for name in ("traffic", "energy"):
        long_frame([f"{name}-1", f"{name}-2"], freq="h").to_csv(folder / f"{name}.csv", index=False)
    long_frame(["new-1", "new-2"], freq="D").to_parquet(folder / "new.parquet", index=False)
    long_frame(["meter"], freq="h", target="kwh").to_csv(folder / "meters.csv", index=False)
    teacher = load_teacher("tiny")
    students = {
        name: create_student_model(teacher, StudentConfig(**SIZE)) for name in ("traffic", "web", "sales", "generalist")
    }
    for name, student in students.items():
        ChronoMoEPipeline(student).save_pretrained(folder / "students" / name)
    ChronoMoEPipeline(build_mixture(students)).save_pretrained(folder / "moe")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        patch.setattr(chronomoe.recipe, "RECIPES", small_recipes)
        assert call(["run", "demo", "--out", str(folder / "runs" / "demo")]) == 0
    for name in ("mine", "unseen"):
        shutil.copytree(folder / "moe", folder / "runs" / name / "moe")
    return folder


@pytest.fixture
def workshop(furnished, small_recipes, tmp_path, monkeypatch):
    """A copy to work in, which is the current folder."""
    monkeypatch.setattr(chronomoe.recipe, "RECIPES", small_recipes)
    shutil.copytree(furnished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def names(workshop):
    """What the Python of pages takes as given."""
    sales = pd.read_csv("sales.csv", parse_dates=["timestamp"])
    values = sales["target"].to_numpy("float32")[:200]
    return {
        "frame": sales[["item_id", "timestamp", "target"]],
        "past": sales,
        "future": pd.read_csv("future.csv", parse_dates=["timestamp"]),
        "values": values,
        "sales": values,
        "price": values,
        "next_price": values[:28],
        "teacher_pipeline": ChronoMoEPipeline.from_pretrained("tiny"),
        "load_student": ChronoMoEPipeline.from_pretrained("students/web"),
    }
