import numpy as np
import pandas as pd
import pytest

from chronomoe.errors import InputError
from chronomoe.pipeline import ChronoMoEPipeline
from chronomoe.predict import predict_file


@pytest.fixture(scope="module")
def moe(finished_run):
    return finished_run / "moe"


def predicted(model, frame, folder, *, future=None, **options):
    """Write a frame (and the future of covariates), forecast it from the files and read the forecasts."""
    frame.to_csv(folder / "past.csv", index=False)
    if future is not None:
        future.to_parquet(folder / "future.parquet", index=False)
        options["future"] = folder / "future.parquet"
    out = folder / "new" / "forecasts.parquet"
    count = predict_file(str(model), folder / "past.csv", out=out, **{"horizon": 5} | options)
    found = pd.read_parquet(out)
    assert len(found) == count
    return found


def test_predictions_are_those_of_the_pipeline(moe, make_frame, tmp_path):
    frame = make_frame(2, 100)
    found = predicted(moe, frame, tmp_path, levels=[0.2, 0.5])
    pipeline = ChronoMoEPipeline.from_pretrained(moe)
    expected = pipeline.predict_df(frame, prediction_length=5, quantile_levels=[0.2, 0.5])
    pd.testing.assert_frame_equal(found, expected, check_dtype=False, rtol=1e-4)


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
