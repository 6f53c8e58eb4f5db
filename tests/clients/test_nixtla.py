import numpy as np
import pandas as pd
import pytest

from chronomoe import ChronoMoEPipeline, InputError
from chronomoe.integrations.nixtla import ChronoMoEForecast
from client_data import HORIZON

NAMES = {"item_id": "unique_id", "timestamp": "ds", "target": "y"}


@pytest.fixture(scope="module")
def model(mixture_folder):
    return ChronoMoEForecast(mixture_folder)


@pytest.fixture
def frame(promotions):
    return promotions[0].rename(columns=NAMES)


@pytest.fixture
def past(promotions):
    return promotions[1].rename(columns=NAMES)


def test_forecasts_have_the_columns_and_order_of_statsforecast(model, past):
    found = model.forecast(past, HORIZON, level=[80, 95])
    names = ["lo-80", "lo-95", "hi-80", "hi-95"]
    assert list(found) == ["unique_id", "ds", "ChronoMoE", *(f"ChronoMoE-{name}" for name in names)]
    assert found["unique_id"].tolist() == sorted(past["unique_id"].unique().repeat(HORIZON))
    values = found[["ChronoMoE-lo-95", "ChronoMoE-lo-80", "ChronoMoE", "ChronoMoE-hi-80", "ChronoMoE-hi-95"]]
    assert (np.diff(values.to_numpy()) >= 0).all()


def test_covariates_in_x_df_are_known_ahead(model, past, frame):
    ahead = frame[~frame["ds"].isin(past["ds"])].drop(columns="y")
    known, unknown = model.forecast(past, HORIZON, X_df=ahead), model.forecast(past, HORIZON)
    assert not np.allclose(known["ChronoMoE"], unknown["ChronoMoE"])
    pipeline = ChronoMoEPipeline.from_pretrained(model.pipeline.model.config._name_or_path)
    back = {new: old for old, new in NAMES.items()}
    expected = pipeline.predict_df(past.rename(columns=back), ahead.rename(columns=back), prediction_length=HORIZON)
    np.testing.assert_allclose(known["ChronoMoE"], expected["predictions"], rtol=1e-4)


def test_a_window_of_cross_validation_is_the_forecast_from_its_cutoff(model, frame, past):
    windows = model.cross_validation(frame, 4, n_windows=3, step_size=2, level=[80])
    assert list(windows) == ["unique_id", "ds", "cutoff", "y", "ChronoMoE", "ChronoMoE-lo-80", "ChronoMoE-hi-80"]
    assert len(windows) == 3 * 3 * 4
    assert windows.groupby("unique_id")["cutoff"].unique().map(len).tolist() == [3, 3, 3]
    first = windows[windows["cutoff"] == past["ds"].max()]
    ahead = frame[~frame["ds"].isin(past["ds"])].drop(columns="y")
    expected = model.forecast(past, 4, X_df=ahead, level=[80])
    for name in ("ChronoMoE", "ChronoMoE-lo-80", "ChronoMoE-hi-80"):
        np.testing.assert_allclose(first[name], expected[name], rtol=1e-4)
    merged = windows.merge(frame, on=["unique_id", "ds"], suffixes=("", "_true"))
    assert merged["y"].tolist() == merged["y_true"].tolist()


def test_rows_may_come_in_any_order_and_columns_have_other_names(model, frame):
    names = {"id_col": "store", "time_col": "day", "target_col": "sold"}
    shuffled = frame.sample(frac=1, random_state=0).rename(columns=dict(unique_id="store", ds="day", y="sold"))
    found = model.cross_validation(shuffled, 4, **names)
    assert list(found) == ["store", "day", "cutoff", "sold", "ChronoMoE"]
    np.testing.assert_allclose(found["ChronoMoE"], model.cross_validation(frame, 4)["ChronoMoE"], rtol=1e-6)


def test_columns_equal_those_of_statsforecast(model, frame):
    statsforecast = pytest.importorskip("statsforecast", reason="statsforecast is not installed; run make clients")
    from statsforecast.models import SeasonalNaive

    frame = frame.drop(columns="promo")
    options = {"h": 4, "n_windows": 2, "step_size": 3, "level": [80, 95]}
    theirs = statsforecast.StatsForecast([SeasonalNaive(7, alias="ChronoMoE")], freq="D").cross_validation(
        df=frame, **options
    )
    ours = model.cross_validation(frame, **options)
    assert list(ours) == list(theirs)
    pd.testing.assert_frame_equal(
        ours[["unique_id", "ds", "cutoff", "y"]], theirs[["unique_id", "ds", "cutoff", "y"]], check_dtype=False
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"h": 4, "n_windows": 0}, "n_windows must be at least 1, got 0"),
        ({"h": 4, "step_size": -1}, "step_size must be at least 1, got -1"),
        (
            {"h": 102, "n_windows": 3},
            "3 windows of 102 steps, 1 apart, need series of at least 105 steps; 's0' has 104",
        ),
        ({"h": 4, "level": [0.8, 120]}, r"level must lie between 0 and 100 percent, got \[0.8, 120\]"),
    ],
)
def test_what_cannot_be_cross_validated_is_refused(model, frame, options, message):
    with pytest.raises(InputError, match=message):
        model.cross_validation(frame, **options)


def test_categories_without_a_row_are_no_series(model, frame):
    names = [*frame["unique_id"].unique(), "gone"]
    categories = frame.assign(unique_id=pd.Categorical(frame["unique_id"], categories=names))
    assert len(model.cross_validation(categories, 4)) == 4 * frame["unique_id"].nunique()
