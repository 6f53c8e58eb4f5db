"""Fixtures of a tiny run: a teacher's checkpoint, files of two domains, a recipe, and the folder it ends with."""

import multiprocessing
import sys

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from chronomoe.cli.app import main
from chronomoe.models.configuration import parse
from chronomoe.pipeline import ChronoMoEPipeline
from chronomoe.recipe import RunConfig, dump
from chronomoe.run import run

LAYERS = {"num_experts": 4, "top_k": 2, "granularity": 2, "noise": 0.1}
ROUTES = {
    "routes": ["upcycle", "expand"],
    "moe": {"routing": {"threshold": None}},  # a student of that active compute has two layers
    "upcycling": {"teacher_share": 0.2, "dense_share": 0.4, "layers": LAYERS},
    "expanding": {"probe_steps": 1, "max_layers": 1, "base_share": 0.6},
}


@pytest.fixture(scope="session")
def processes():
    """Start processes that have imported what a run needs already, and can be killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["chronomoe.run"])
    return context


@pytest.fixture(scope="session")
def teacher_folder(make_teacher, tmp_path_factory):
    """Checkpoint of a tiny teacher of two layers."""
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    ChronoMoEPipeline(make_teacher(num_layers=2)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_frame():
    """Draw a long frame of noisy seasons: ``items`` series of ``steps`` steps, with a covariate if named."""

    def make(items=2, steps=300, *, freq="h", season=24, covariate=None, seed=0):
        rng, time = np.random.default_rng(seed), np.arange(steps)
        parts = []
        for item in range(items):
            push = (rng.random(steps) < 0.1).astype(float)
            wave = 2 * np.sin(2 * np.pi * time / season + item) + 0.3 * rng.standard_normal(steps) + 2 * push
            columns = {
                "item_id": f"s{item}",
                "timestamp": pd.date_range("2024-01-01", periods=steps, freq=freq),
                "target": (10 * (item + 1) + wave).round(3),
            }
            parts.append(pd.DataFrame(columns | ({covariate: push} if covariate else {})))
        return pd.concat(parts, ignore_index=True)

    return make


@pytest.fixture(scope="session")
def series_files(make_frame, tmp_path_factory):
    """An hourly domain in CSV and a daily one with a known covariate in Parquet, by name."""
    folder = tmp_path_factory.mktemp("series")
    files = {"power": folder / "power.csv", "sales": folder / "sales.parquet"}
    make_frame(3, 400).to_csv(files["power"], index=False)
    make_frame(2, 300, freq="D", season=7, covariate="promo", seed=1).to_parquet(files["sales"], index=False)
    return files


@pytest.fixture(scope="session")
def make_recipe(teacher_folder, series_files):
    """Build the configuration of a tiny run, with changes given as in a recipe."""

    def make(**changes):
        values = {
            "teacher": str(teacher_folder),
            "domains": [
                {"data": str(series_files["power"])},
                {"data": str(series_files["sales"]), "known_covariates": ["promo"]},
            ],
            "windows": {"context_length": 64, "horizon": 16},
            "student": {"num_layers": 1},
            "budget": {"steps": 60, "batch_size": 4, "windows": 24},
            "router_windows": 16,
            "router": {"epochs": 2},
            "evaluation": {"windows_per_domain": 5, "bootstrap_draws": 10, "latency_repeats": 1, "top_k": [1]},
        }
        return parse(values | changes, RunConfig, source="test")

    return make


@pytest.fixture(scope="session")
def finished_run(make_recipe, tmp_path_factory):
    """Folder of a finished tiny run; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    run(make_recipe(), folder, console=Console(quiet=True))
    return folder


@pytest.fixture(scope="session")
def grown_run(make_recipe, tmp_path_factory):
    """Folder of a finished tiny run of routes 2 and 3; not to be changed."""
    folder = tmp_path_factory.mktemp("routes") / "tiny"
    run(make_recipe(**ROUTES), folder, console=Console(quiet=True))
    return folder


@pytest.fixture
def chronomoe(monkeypatch, capsys):
    """Run the command line as its entry point does; return status, stdout and stderr."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["chronomoe", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        found = capsys.readouterr()
        return left.value.code or 0, found.out, found.err

    monkeypatch.setenv("COLUMNS", "200")
    return call


@pytest.fixture
def refused(chronomoe, tmp_path):
    """Run a command that must refuse its input: status 2, one line on stderr, no file changed; return the line."""

    def call(*words):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        status, out, err = chronomoe(*words)
        assert status == 2, (status, err)
        assert out == ""
        assert err.count("\n") == 1, err
        assert err.startswith("chronomoe: ")
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        return err

    return call


@pytest.fixture
def recipe(make_recipe, tmp_path):
    """Write a recipe of a tiny run, with changes."""

    def write(**changes):
        (tmp_path / "mine.yaml").write_text(dump(make_recipe(**changes)))
        return tmp_path / "mine.yaml"

    return write
