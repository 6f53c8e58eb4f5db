"""Files in, forecasts out; ``predict_df`` gives the same."""

import errno
import os
import shutil
import weakref
from collections import Counter

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from chronomoe import ChronoMoEPipeline
from chronomoe.data import parquet
from chronomoe.data.forecasts import find_unit
from chronomoe.errors import InputError
from chronomoe.models.chronos2 import use_exact_group_attention
from chronomoe.models.mixture.mixture import MixtureConfig, build_mixture
from chronomoe.predict import files
from chronomoe.predict.files import Forecaster

HORIZON = 5


@pytest.fixture(scope="module")
def moe(make_teacher, tmp_path_factory):
    """Checkpoint of a mixture of two experts."""
    members = {name: use_exact_group_attention(make_teacher(seed=seed, num_layers=1)) for seed, name in enumerate("ab")}
    folder = tmp_path_factory.mktemp("moe") / "moe"
    ChronoMoEPipeline(build_mixture(members, MixtureConfig()).eval()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(moe):
    return ChronoMoEPipeline.from_pretrained(moe)


def predicted(model, frame, folder, *, future=None, **options):
    """Write a frame (and the future of covariates), forecast it from the files and read the forecasts."""
    frame.to_csv(folder / "past.csv", index=False)
    if future is not None:
        future.to_parquet(folder / "future.parquet", index=False)
        options["future"] = folder / "future.parquet"
    out = folder / "new" / "forecasts.parquet"
    count = Forecaster(str(model), **{"horizon": 5} | options).write(folder / "past.csv", out)
    found = pd.read_parquet(out)
    assert len(found) == count
    return found


def test_predictions_are_those_of_the_pipeline(moe, make_frame, tmp_path):
    frame = make_frame(2, 100)
    found = predicted(moe, frame, tmp_path, levels=[0.2, 0.5])
    pipeline = ChronoMoEPipeline.from_pretrained(moe)
    expected = pipeline.predict_df(frame, prediction_length=5, quantile_levels=[0.2, 0.5])
    pd.testing.assert_frame_equal(found, expected, check_dtype=False, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_forecasts_in_a_narrower_type_stay_near_those_in_float32(moe, make_frame, tmp_path, dtype):
    frame = make_frame(2, 100)
    want = predicted(moe, frame, tmp_path).predictions
    found = predicted(moe, frame, tmp_path, dtype=dtype).predictions
    assert (found - want).abs().max() < 0.05 * frame.target.std()
    if dtype == "bfloat16":
        assert (found != want).any()


def test_a_type_that_no_model_computes_in_is_refused(moe, make_frame, tmp_path):
    with pytest.raises(InputError, match="dtype must be one of auto, float32, bfloat16, got 'int8'"):
        predicted(moe, make_frame(2, 100), tmp_path, dtype="int8")


def test_known_covariates_change_the_forecast(moe, make_frame, tmp_path):
    past = make_frame(2, 100, freq="D", season=7, covariate="promo")
    future = make_frame(2, 105, freq="D", season=7, covariate="promo").groupby("item_id").tail(5)
    future = future.drop(columns="target").assign(promo=1.0)
    with_promo = predicted(moe, past, tmp_path, future=future)
    without = predicted(moe, past, tmp_path, future=future.assign(promo=0.0))
    assert (with_promo.timestamp == without.timestamp).all()
    assert not np.allclose(with_promo.predictions, without.predictions)


def test_item_ids_that_are_numbers_match_those_of_the_future(moe, make_frame, tmp_path):
    past = make_frame(2, 60, covariate="promo").assign(item_id=lambda frame: frame.item_id.str[1:].astype(int))
    future = make_frame(2, 70, covariate="promo").groupby("item_id").tail(10).drop(columns="target")
    future["item_id"] = future.item_id.str[1:].astype(int)
    assert set(predicted(moe, past, tmp_path, future=future).item_id) == {"0", "1"}  # 10 steps given, 5 needed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda future: future[future.item_id == "s0"], "of item 's1', got none"),
        (lambda future: future.groupby("item_id").tail(4), "cover the 5 steps from .* to .* of item 's0'"),
        (lambda future: future.drop(columns="promo"), "needs a column for at least one known covariate"),
        (lambda future: future.rename(columns={"promo": "prmo"}), "got 'prmo'. Did you mean 'promo'"),
        (lambda future: future.assign(target=1.0), "known covariates must be covariate columns"),
        (lambda future: future.drop(columns="item_id"), "missing column 'item_id'"),
        (lambda future: future.assign(promo=np.inf), "column 'promo' must hold finite"),
    ],
)
def test_a_future_that_does_not_fit_is_refused(moe, make_frame, tmp_path, change, message):
    future = make_frame(2, 105, covariate="promo").groupby("item_id").tail(5).drop(columns="target")
    with pytest.raises(InputError, match=message):
        predicted(moe, make_frame(2, 100, covariate="promo"), tmp_path, future=change(future))
    assert not (tmp_path / "new").exists()


def test_a_future_without_values_is_one_that_is_not_known(moe, make_frame, tmp_path):
    past = make_frame(2, 100, covariate="promo")
    future = make_frame(2, 105, covariate="promo").groupby("item_id").tail(5).drop(columns="target")
    unknown = predicted(moe, past, tmp_path, future=future.assign(promo=np.nan))
    pd.testing.assert_frame_equal(unknown, predicted(moe, past, tmp_path), rtol=1e-4)


def test_several_targets_are_forecast_together(moe, make_frame, tmp_path):
    frame = make_frame(2, 60).assign(other=lambda frame: frame.target * -3)
    found = predicted(moe, frame, tmp_path, target=["target", "other"])
    assert found.groupby("item_id").target_name.unique().map(list).tolist() == [["target", "other"]] * 2


def test_a_wide_file_is_forecast_column_by_column(moe, make_frame, tmp_path):
    wide = make_frame(2, 60).pivot(index="timestamp", columns="item_id", values="target").reset_index()
    pd.testing.assert_frame_equal(predicted(moe, wide, tmp_path), predicted(moe, make_frame(2, 60), tmp_path))


def test_weeks_that_start_on_other_days_keep_their_days(moe, make_frame, tmp_path):
    frame = make_frame(2, 60, freq="W-MON")
    frame.loc[frame.item_id == "s1", "timestamp"] += pd.Timedelta(days=2)
    found = predicted(moe, frame, tmp_path)
    assert found.groupby("item_id").timestamp.agg(lambda times: set(times.dt.day_name())).tolist() == [
        {"Monday"},
        {"Wednesday"},
    ]


def test_items_keep_their_order_whatever_their_weekdays(moe, make_frame, tmp_path):
    frame = make_frame(3, 60, freq="W-MON")
    frame.loc[frame.item_id == "s1", "timestamp"] += pd.Timedelta(days=2)
    assert predicted(moe, frame, tmp_path).item_id.unique().tolist() == ["s0", "s1", "s2"]


@pytest.mark.parametrize("side", ["past", "future", "both", "neither"])
@pytest.mark.parametrize("time", ["timestamp", "date"])
def test_the_future_of_one_series_needs_no_item_id(moe, make_frame, tmp_path, side, time):
    past = make_frame(1, 80, covariate="promo")
    future = make_frame(1, 85, covariate="promo").tail(HORIZON).drop(columns="target")
    want = predicted(moe, past, tmp_path, future=future)
    if side in ("past", "both"):
        past = past.drop(columns="item_id").rename(columns={"timestamp": time})
    if side in ("future", "both"):
        future = future.drop(columns="item_id").rename(columns={"timestamp": time})
    found = predicted(moe, past, tmp_path, future=future)
    assert found.predictions.tolist() == want.predictions.tolist()


def test_a_future_file_may_hold_the_past_and_more_steps(moe, make_frame, tmp_path):
    past, whole = make_frame(2, 80, covariate="promo"), make_frame(2, 120, covariate="promo").drop(columns="target")
    want = predicted(moe, past, tmp_path, future=whole.groupby("item_id").nth(range(80, 85)))
    found = predicted(moe, past, tmp_path, future=whole.sample(frac=1, random_state=0))
    pd.testing.assert_frame_equal(found, want)


def test_a_horizon_past_the_year_2262_is_refused_before_anything_is_forecast(moe, make_frame, tmp_path):
    with pytest.raises(InputError, match="between the years 1678 and 2262.*shorten the horizon"):
        predicted(moe, make_frame(1, 60, freq="YS"), tmp_path, horizon=250)
    assert not (tmp_path / "new").exists()


@pytest.fixture
def large(make_frame, tmp_path, monkeypatch):
    """A Parquet file of ragged series that is read in several parts."""
    monkeypatch.setattr(parquet, "BATCH_ROWS", 150)
    frames = [make_frame(1, 30 + 17 * (number % 5), seed=number).assign(item_id=f"i{number}") for number in range(12)]
    frame = pd.concat(frames, ignore_index=True)
    frame.to_parquet(tmp_path / "past.parquet")
    return frame


@pytest.mark.parametrize("layout", ["long", "rows", "csv", "saved"])
def test_a_file_forecast_in_parts_gives_what_it_gives_at_once(moe, pipeline, large, tmp_path, layout):
    path = tmp_path / ("past.csv" if layout == "csv" else "past.parquet")
    if layout == "csv":
        large.to_csv(path, index=False)
    elif layout != "long":
        found = [(name, list(part.timestamp), list(part.target)) for name, part in large.groupby("item_id", sort=False)]
        table = pd.DataFrame(found, columns=["id", "timestamp", "target"])
        path = tmp_path / "saved" if layout == "saved" else path
        datasets.Dataset.from_pandas(table).save_to_disk(path) if layout == "saved" else table.to_parquet(path)
    Forecaster(str(moe), horizon=HORIZON).write(path, tmp_path / "out.parquet")
    found = pd.read_parquet(tmp_path / "out.parquet")
    want = pipeline.predict_df(large, prediction_length=HORIZON, quantile_levels=[0.1, 0.5, 0.9])
    pd.testing.assert_frame_equal(found, want, rtol=1e-4)
    assert pq.ParquetFile(tmp_path / "out.parquet").num_row_groups > 2
    assert not (tmp_path / "out.parquet.parts").exists()


class KilledError(BaseException):
    """Ends a forecast as a signal would."""


def test_a_killed_forecast_goes_on_where_it_was(moe, large, tmp_path, monkeypatch):
    Forecaster(str(moe), horizon=HORIZON).write(tmp_path / "past.parquet", tmp_path / "want.parquet")
    calls = []
    plain = ChronoMoEPipeline.predict_quantiles

    def counted(self, inputs, *args, **options):
        calls.append(len(inputs))
        if len(calls) == 3:
            raise KilledError
        return plain(self, inputs, *args, **options)

    monkeypatch.setattr(ChronoMoEPipeline, "predict_quantiles", counted)
    out = tmp_path / "out.parquet"
    with pytest.raises(KilledError):
        Forecaster(str(moe), horizon=HORIZON).write(tmp_path / "past.parquet", out)
    assert not out.exists()
    shutil.copytree(tmp_path / "out.parquet.parts", tmp_path / "other.parquet.parts")
    Forecaster(str(moe), horizon=HORIZON).write(tmp_path / "past.parquet", out)
    assert out.read_bytes() == (tmp_path / "want.parquet").read_bytes()
    assert sum(calls) == large.item_id.nunique() + calls[2]  # the part that was cut short is made again, no other
    before = len(calls)
    Forecaster(str(moe), horizon=HORIZON + 1).write(tmp_path / "past.parquet", tmp_path / "other.parquet")
    assert sum(calls[before:]) == large.item_id.nunique()  # of another horizon, nothing is used


@pytest.mark.parametrize("last", [12, 48])
def test_no_more_than_three_parts_are_in_memory_whatever_the_size_of_the_file(
    moe, make_frame, tmp_path, monkeypatch, last
):
    """One is read, one is forecast, one is written."""
    monkeypatch.setattr(parquet, "BATCH_ROWS", 150)
    frame = pd.concat([make_frame(1, 60, seed=number).assign(item_id=f"i{number}") for number in range(last)])
    frame.to_parquet(tmp_path / "past.parquet")
    alive, most, plain = Counter(), Counter(), files.stream_series

    def counted(*args, **options):
        for part in plain(*args, **options):
            alive["series"] += len(part)
            most["series"] = max(most["series"], alive["series"])
            most["part"] = max(most["part"], len(part))
            weakref.finalize(part, alive.subtract, {"series": len(part)})
            yield part
            del part

    monkeypatch.setattr(files, "stream_series", counted)
    Forecaster(str(moe), horizon=HORIZON).write(tmp_path / "past.parquet", tmp_path / "out.parquet")
    assert most["series"] <= 3 * most["part"] < last


def test_a_part_that_cannot_be_written_ends_the_forecast(moe, large, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    with pytest.raises(InputError, match="the disk that holds .* is full"):
        Forecaster(str(moe), horizon=HORIZON).write(tmp_path / "past.parquet", tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_a_part_that_breaks_a_rule_leaves_nothing_behind(moe, large, tmp_path):
    large.loc[len(large) - 3, "target"] = np.inf
    large.to_parquet(tmp_path / "past.parquet")
    with pytest.raises(InputError, match="must hold finite.*'i11'"):
        Forecaster(str(moe), horizon=HORIZON).write(tmp_path / "past.parquet", tmp_path / "out.parquet")
    assert os.listdir(tmp_path) == ["past.parquet"]


@pytest.mark.parametrize("unit", [1e-30, 1e-25, 1e-10, 1e18, 1e24, 1e34])
def test_the_unit_of_a_series_and_of_a_covariate_does_not_matter(pipeline, make_frame, unit):
    past = make_frame(2, 100).assign(x=lambda frame: np.arange(len(frame)) % 7 * 1.0)
    want = pipeline.predict_df(past, prediction_length=HORIZON)
    found = pipeline.predict_df(past.assign(target=past.target * unit), prediction_length=HORIZON)
    np.testing.assert_allclose(found.predictions / unit, want.predictions, rtol=1e-4)
    found = pipeline.predict_df(past.assign(x=past.x * unit), prediction_length=HORIZON)
    np.testing.assert_allclose(found.predictions, want.predictions, rtol=1e-4)


@pytest.mark.parametrize("level", [-1e12, 1e4, 1e7, 1e8])
def test_the_level_of_a_series_costs_no_digits(pipeline, make_frame, level):
    past = make_frame(2, 100)
    want = pipeline.predict_df(past, prediction_length=HORIZON).predictions
    found = pipeline.predict_df(past.assign(target=past.target + level), prediction_length=HORIZON).predictions
    np.testing.assert_allclose(found - level, want, atol=2e-2)


def test_rows_of_usual_size_keep_their_bits():
    rows = np.random.default_rng(0).normal(size=(3, 50)) * np.array([[1e-9], [1.0], [1e9]])
    rows[1, ::3] = np.nan
    level, size = find_unit(rows)
    assert level.tolist() == [0, 0, 0]
    assert size.tolist() == [1, 1, 1]


IDS = {
    "categories in another order": lambda ids: pd.Categorical(ids, categories=["s0", "x", "s2", "s1"]),
    "whole numbers": lambda ids: ids.str[1:].astype(int),
    "arrow text": lambda ids: ids.astype("string[pyarrow]"),
}


@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("freq", [None, "h"])
@pytest.mark.parametrize("checked", [True, False])
def test_ids_of_any_type_come_back_as_they_were(pipeline, make_frame, kind, freq, checked):
    frame = make_frame(3, 60).sort_values("item_id", ascending=False, kind="stable")
    options = {"prediction_length": HORIZON, "freq": freq, "validate_inputs": checked}
    want = pipeline.predict_df(frame, **options)
    given = pd.Series(IDS[kind](frame.item_id), index=frame.index)
    found = pipeline.predict_df(frame.assign(item_id=given), **options)
    assert found.item_id.dtype == given.dtype
    assert found.item_id.drop_duplicates().tolist() == given.drop_duplicates().tolist()
    pd.testing.assert_frame_equal(found.drop(columns="item_id"), want.drop(columns="item_id"))


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Europe/Berlin"])
@pytest.mark.parametrize("arrow", [False, True])
def test_times_come_back_in_their_zone(pipeline, make_frame, zone, arrow):
    frame = make_frame(2, 60)
    frame["timestamp"] += pd.Timedelta(days=299)  # clocks change in Berlin
    want = pipeline.predict_df(frame, prediction_length=HORIZON)
    times = frame.timestamp.dt.tz_localize("UTC").dt.tz_convert(zone)
    given = times.astype(f"timestamp[us, tz={zone}][pyarrow]") if arrow else times
    found = pipeline.predict_df(frame.assign(timestamp=given), prediction_length=HORIZON)
    assert str(found.timestamp.dt.tz) == zone
    assert found.timestamp.dt.tz_convert("UTC").dt.tz_localize(None).tolist() == want.timestamp.tolist()
    np.testing.assert_array_equal(found.predictions, want.predictions)


def test_a_file_with_a_zone_is_forecast_in_it(moe, pipeline, make_frame, tmp_path):
    frame = make_frame(2, 88, freq="D")
    frame["timestamp"] = frame.timestamp.dt.tz_localize("Europe/Berlin")  # clocks change in the horizon
    frame.to_parquet(tmp_path / "past.parquet")
    Forecaster(str(moe), horizon=HORIZON).write(tmp_path / "past.parquet", tmp_path / "out.parquet")
    found = pd.read_parquet(tmp_path / "out.parquet")
    assert found.timestamp[:HORIZON].tolist() == list(pd.date_range("2024-03-29", periods=5, tz="Europe/Berlin"))
    pd.testing.assert_frame_equal(
        found, pipeline.predict_df(frame, prediction_length=HORIZON, quantile_levels=[0.1, 0.5, 0.9]), rtol=1e-4
    )


@pytest.mark.parametrize("past", ["bool", "boolean", "int64", "float32", "object"])
@pytest.mark.parametrize("ahead", ["bool", "boolean", "int64", "float32", "object"])
def test_true_is_one_on_both_sides(pipeline, make_frame, past, ahead):
    frame = make_frame(2, 60, covariate="promo")
    future = make_frame(2, 65, covariate="promo").groupby("item_id").tail(HORIZON).drop(columns="target")
    want = pipeline.predict_df(frame, future_df=future, prediction_length=HORIZON)
    given = frame.assign(promo=frame.promo.astype(bool).astype(past))
    found = pipeline.predict_df(
        given, future_df=future.assign(promo=future.promo.astype(bool).astype(ahead)), prediction_length=HORIZON
    )
    pd.testing.assert_frame_equal(found, want)


def test_booleans_of_a_file_count_as_those_of_a_frame(moe, pipeline, make_frame, tmp_path):
    frame = make_frame(2, 60, covariate="promo").astype({"promo": bool})
    frame.to_parquet(tmp_path / "past.parquet")
    Forecaster(str(moe), horizon=HORIZON).write(tmp_path / "past.parquet", tmp_path / "out.parquet")
    want = pipeline.predict_df(frame, prediction_length=HORIZON, quantile_levels=[0.1, 0.5, 0.9])
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out.parquet"), want, rtol=1e-4)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("targets", [["target"], ["target", "other"]])
def test_categories_are_encoded_as_upstream_does_it(pipeline, make_frame, known, targets):
    def with_shops(frame):
        shops = np.array(["north", "south", "east"])[np.arange(len(frame)) % 3]
        return frame.assign(other=frame.target * 2, shop=shops, price=np.arange(len(frame)) % 5 * 1.0)

    past = with_shops(make_frame(2, 60))
    future = with_shops(make_frame(2, 65)).groupby("item_id").tail(HORIZON).drop(columns=["target", "other"])
    options = {"future_df": future if known else None, "target": targets, "prediction_length": HORIZON}
    found = pipeline.predict_df(past, **options)
    want = super(ChronoMoEPipeline, pipeline).predict_df(past, **options)
    np.testing.assert_allclose(found["0.9"], want["0.9"], rtol=1e-4, atol=1e-4)
    given = past.assign(shop=past.shop.astype("category"))
    pd.testing.assert_frame_equal(pipeline.predict_df(given, **options), found)


def test_a_frame_of_other_names_comes_back_under_them(pipeline, make_frame):
    frame = make_frame(2, 60).rename(columns={"item_id": "sku", "timestamp": "day", "target": "sold"})
    found = pipeline.predict_df(
        frame, id_column="sku", timestamp_column="day", target="sold", prediction_length=HORIZON, quantile_levels=[0.5]
    )
    assert list(found.columns) == ["sku", "day", "target_name", "predictions", "0.5"]
    assert set(found.target_name) == {"sold"}


@pytest.mark.parametrize("cross_learning", [False, True])
def test_callers_that_have_checked_get_a_forecast_of_every_item(pipeline, make_frame, cross_learning):
    frame = make_frame(4, 60, covariate="promo")
    frame.loc[frame.item_id == "s1", "target"] = np.nan
    future = make_frame(4, 65, covariate="promo").groupby("item_id").tail(HORIZON).drop(columns="target")
    batches = []
    found = pipeline.predict_df(
        frame,
        future_df=future,
        target="target",
        prediction_length=HORIZON,
        quantile_levels=[0.1, 0.5, 0.9],
        batch_size=4,
        cross_learning=cross_learning,
        validate_inputs=False,
        after_batch=lambda: batches.append(1),
    )
    assert found.item_id.drop_duplicates().tolist() == ["s0", "s1", "s2", "s3"]
    assert np.isfinite(found.predictions).all()
    assert len(batches) == 2


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prediction_length": 0}, "horizon must be at least 1 step, got 0"),
        ({"context_length": -1}, "context_length must be at least 1 step, got -1"),
        ({"quantile_levels": [0.5, 1.0]}, "levels must lie between 0 and 1"),
        ({"quantile_levels": [0.5, float("nan")]}, "levels must lie between 0 and 1"),
        ({"quantile_levels": [0.5, 0.5]}, "each given once"),
    ],
)
def test_a_forecast_that_cannot_be_asked_for_is_refused(pipeline, make_frame, asked, message):
    with pytest.raises(InputError, match=message):
        pipeline.predict_df(make_frame(1, 60), **{"prediction_length": HORIZON} | asked)


def test_a_frame_that_breaks_a_rule_is_refused_as_a_file_is(pipeline, make_frame):
    frame = make_frame(2, 60)
    for bad, message in (
        (frame.drop(index=7), "irregular frequency"),
        (frame.assign(item_id=frame.item_id.where(frame.index > 3)), "must name an item in every row, row 0"),
        (frame.assign(timestamp=1_700_000_000 + 3600 * np.arange(120)), "unit='s'"),
        (frame.assign(target=np.inf), "must hold finite"),
        (frame.assign(target=1j), "must hold numbers"),
    ):
        with pytest.raises(InputError, match=message):
            pipeline.predict_df(bad, prediction_length=HORIZON)


def test_the_main_expert_of_each_series_can_stand_beside_its_forecast(moe, pipeline, make_frame, tmp_path):
    frame = make_frame(3, 100)
    found = predicted(moe, frame, tmp_path, experts=True)
    series = [part.target.to_numpy() for _, part in frame.groupby("item_id", sort=False)]
    expected = [next(iter(gates)) for gates in pipeline.routing(series)]
    assert found.groupby("item_id", sort=False).expert.unique().map(list).tolist() == [[name] for name in expected]


def test_a_model_without_experts_cannot_name_them(teacher_folder, make_frame, tmp_path):
    with pytest.raises(InputError, match="routing needs a mixture of distilled experts"):
        predicted(teacher_folder, make_frame(1, 100), tmp_path, experts=True)
