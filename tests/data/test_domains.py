import json

import datasets
import numpy as np
import pandas as pd
import pytest

from chronomoe.data import domains
from chronomoe.data.domains import BENCHMARKS, Domain, Split, demo_domains, load_domain
from chronomoe.data.frames import frame_to_series
from chronomoe.errors import InputError, nearest

STEPS = 50


@pytest.fixture(autouse=True)
def quiet_and_local_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache of datasets")
    datasets.disable_progress_bars()


@pytest.fixture
def wide():
    times = pd.date_range("2024-01-01", periods=STEPS, freq="h")
    return pd.DataFrame({"date": times, "x": np.arange(STEPS), "OT": np.arange(STEPS) * 2.0})


def hub_rows():
    times = pd.date_range("2024-01-01", periods=STEPS, freq="D")
    return datasets.Dataset.from_dict(
        {"id": ["a", "b"], "timestamp": [list(times)] * 2, "target": [[1.0] * STEPS, [2.0] * STEPS]}
    )


@pytest.mark.parametrize(
    ("length", "stops"),
    [
        (45335, (31734, 36268, 45335)),
        (26304, (18412, 21044, 26304)),
        (739, (517, 592, 739)),
        (52704, (36892, 42164, 52704)),
    ],
)
def test_the_default_split_is_70_10_20_percent_rounded_as_the_benchmarks_do(length, stops):
    assert tuple(Split().of(length)) == stops


def test_the_parts_of_a_split_follow_each_other():
    stops = Split().of(100)
    assert [stops.rows(part) for part in ("train", "validation", "test")] == [
        slice(0, 70),
        slice(70, 80),
        slice(80, 100),
    ]


def test_absolute_stops_leave_later_rows_unused():
    split = Split(stops=(5, 7, 9))
    assert tuple(split.of(20)) == (5, 7, 9)
    with pytest.raises(InputError, match="at least 9 rows, got 8"):
        split.of(8)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"train": 0.9}, "split shares must sum to at most 1, got train=0.9, test=0.2"),
        ({"train": 0.0}, "train must be above 0, got 0.0"),
        ({"test": -0.1}, "test must be at least 0, got -0.1"),
        ({"stops": (5, 4, 9)}, r"split stops must be three rows in order, .* got \(5, 4, 9\)"),
        ({"stops": (5, 9)}, r"stops\[2\] is required"),
    ],
)
def test_impossible_splits_are_refused(unchecked, shares, message):
    with pytest.raises(InputError, match=message):
        Split(**shares)


def test_a_file_is_a_domain_with_the_usual_seasonality(wide, tmp_path):
    wide.to_csv(tmp_path / "load.csv", index=False)
    domain = load_domain(tmp_path / "load.csv")
    assert (domain.name, domain.freq, domain.seasonality, len(domain.series)) == ("load", "h", 24, 2)
    assert tuple(domain.split(domain.series[0])) == (35, 40, 50)
    other = load_domain(
        str(tmp_path / "load.csv"), name="mine", seasonality=12, split=Split(stops=(10, 20, 30)), target="OT"
    )
    assert (other.name, other.seasonality, len(other.series)) == ("mine", 12, 1)
    assert list(other.series[0].covariates) == ["x"]
    assert other.split(other.series[0]).test == 30


def test_a_domain_needs_series_and_a_period(wide):
    series = frame_to_series(wide)
    with pytest.raises(InputError, match="seasonality must be at least 1"):
        Domain(name="a", series=series, seasonality=0)
    with pytest.raises(InputError, match="at least one series"):
        Domain(name="a", series=[], seasonality=1)


def test_benchmarks_are_found_in_nested_folders(wide, tmp_path):
    (tmp_path / "ETT-small").mkdir()
    wide.to_csv(tmp_path / "ETT-small" / "ETTh2.csv", index=False)
    domain = load_domain("ETTh2", folder=tmp_path)
    assert [series.item_id for series in domain.series] == ["x", "OT"]
    assert domain.cutoffs.stops == (8640, 11520, 14400)
    assert load_domain("ETTh2", folder=tmp_path, target=["x", "OT"]).series[0].target.shape == (2, STEPS)


def test_benchmark_rows_count_as_steps_where_times_are_missing(wide, tmp_path):
    wide.drop(index=[7, 8]).to_csv(tmp_path / "weather.csv", index=False)
    domain = load_domain("weather", folder=tmp_path)
    assert (domain.freq, domain.seasonality, len(domain.series[0])) == ("10min", 144, STEPS - 2)
    assert tuple(domain.split(domain.series[0])) == (33, 39, 48)


@pytest.mark.parametrize("name", ["ETTh1", "ETTh2", "ETTm1", "ETTm2"])
def test_ett_is_split_at_12_4_and_4_months(shared_data, name):
    domain = load_domain(name, folder=shared_data)
    assert [series.item_id for series in domain.series] == ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"]
    per_hour = 1 if name.startswith("ETTh") else 4
    assert tuple(domain.split(domain.series[0])) == (8640 * per_hour, 11520 * per_hour, 14400 * per_hour)
    assert domain.seasonality == 24 * per_hour
    assert domain.series[0].start == pd.Timestamp("2016-07-01")


@pytest.mark.parametrize(
    ("name", "count", "seasonality"),
    [("weather_jena", 21, 144), ("retail_online", 100, 7), ("traffic_metrla_week", 207, 288)],
)
def test_real_wide_files_load_by_path(shared_data, name, count, seasonality):
    domain = load_domain(shared_data / f"{name}.parquet")
    assert (domain.name, len(domain.series), domain.seasonality) == (name, count, seasonality)


def test_benchmarks_say_what_they_need(tmp_path):
    with pytest.raises(InputError, match="pass folder=, where ETTh1.csv lies"):
        load_domain("ETTh1")
    with pytest.raises(InputError, match="no ETTh1.csv or ETTh1.parquet in"):
        load_domain("ETTh1", folder=tmp_path)
    with pytest.raises(InputError, match="no file or folder"):
        load_domain("ETTh1", folder=tmp_path / "absent")


def test_an_unknown_domain_is_refused_with_the_nearest_and_all_names():
    with pytest.raises(InputError, match="Unknown domain 'etth1'. Available: .*Did you mean 'ETTh1'") as info:
        load_domain("etth1")
    assert all(name in str(info.value) for name in BENCHMARKS)
    with pytest.raises(InputError, match="no file or folder 'absent/file.csv'"):
        load_domain("absent/file.csv")


def test_the_nearest_name_is_found_whatever_the_case():
    assert nearest("PEDESTRIAN", ["Web", "Pedestrians"]) == " Did you mean 'Pedestrians'?"
    assert nearest("x", ["Web"]) == ""


def test_a_domain_cannot_take_the_name_of_all_domains(tmp_path):
    wide = pd.DataFrame({"timestamp": pd.date_range("2024", periods=90, freq="h"), "a": np.arange(90.0)})
    wide.to_csv(tmp_path / "overall.csv", index=False)
    with pytest.raises(InputError, match="cannot be named 'overall'"):
        load_domain(str(tmp_path / "overall.csv"))
    assert load_domain(str(tmp_path / "overall.csv"), name="mine").name == "mine"


def test_the_hub_layout_is_read_with_its_configs(tmp_path):
    for config in ("daily", "other"):
        (tmp_path / "repo" / config).mkdir(parents=True)
        hub_rows().to_parquet(tmp_path / "repo" / config / "train-00000-of-00001.parquet")
    configs = [{"config_name": name, "data_files": f"{name}/train-*.parquet"} for name in ("daily", "other")]
    (tmp_path / "repo" / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    domain = load_domain(f"hub:{tmp_path}/repo/daily", cache_dir=tmp_path / "cache")
    assert (domain.name, domain.freq, domain.seasonality) == ("daily", "D", 7)
    np.testing.assert_array_equal(domain.series[1].target, np.full((1, STEPS), 2))
    with pytest.raises(InputError, match="cannot be loaded: .*daily"):
        load_domain(f"hub:{tmp_path}/repo/weekly", cache_dir=tmp_path / "cache")


def test_a_hub_folder_without_configs_is_read(tmp_path):
    (tmp_path / "repo").mkdir()
    hub_rows().to_parquet(tmp_path / "repo" / "train-00000-of-00001.parquet")
    assert len(load_domain(f"hub:{tmp_path}/repo", cache_dir=tmp_path / "cache").series) == 2


@pytest.mark.parametrize("spec", ["hub:", "hub:one", "hub:a/b/c/d"])
def test_malformed_hub_ids_are_refused(spec):
    with pytest.raises(InputError, match="a hub id must be hub:<owner>/<repo>"):
        load_domain(spec)


def test_a_dataset_in_memory_is_a_domain():
    assert load_domain(hub_rows(), name="mine").name == "mine"


def test_demo_domains_are_read_from_their_index(wide, tmp_path, monkeypatch):
    wide.to_parquet(tmp_path / "load.parquet", index=False)
    entry = {"file": "load.parquet", "freq": "h", "seasonality": 168, "description": "load of two regions"}
    monkeypatch.setattr(domains, "_demo_folder", lambda: tmp_path)
    with pytest.raises(InputError, match="the demo series are not installed"):
        load_domain("demo:electricity")
    (tmp_path / "domains.json").write_text(json.dumps({"electricity": entry}))
    assert demo_domains() == ["electricity"]
    domain = load_domain("demo:electricity")
    assert (domain.name, domain.seasonality, domain.description) == ("electricity", 168, "load of two regions")
    with pytest.raises(InputError, match="Unknown demo domain 'electric'. Available: 'electricity'. Did you mean"):
        load_domain("demo:electric")
    with pytest.raises(InputError, match="Unknown domain 'electricty'.*demo:electricity"):
        load_domain("electricty")


def test_every_shipped_demo_domain_loads():
    try:
        names = demo_domains()
    except InputError:
        pytest.skip("this installation has no demo series")
    for name in names:
        domain = load_domain(f"demo:{name}")
        assert len(domain.series) > 0
        assert all(0 < domain.split(series).train < len(series) for series in domain.series)
