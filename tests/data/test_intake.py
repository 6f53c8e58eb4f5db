import numpy as np
import pandas as pd
import pytest

from chronomoe.data.intake import frames_to_forecast
from chronomoe.errors import InputError

HORIZON = 3


@pytest.fixture
def past():
    """Three items of other lengths, in no order of name."""
    parts = [
        pd.DataFrame(
            {
                "item_id": item,
                "timestamp": pd.date_range("2024-01-01", periods=steps, freq="D"),
                "target": np.arange(steps) % 7 + 10.0 * steps,
                "promo": np.arange(steps) % 2,
            }
        )
        for item, steps in (("b", 20), ("a", 30), ("c", 12))
    ]
    return pd.concat(parts, ignore_index=True)


@pytest.fixture
def future(past):
    """The known promotions of the steps that follow."""
    last = past.groupby("item_id", sort=False).timestamp.max()
    parts = [
        pd.DataFrame({"item_id": item, "timestamp": pd.date_range(time, periods=HORIZON + 1)[1:], "promo": [0, 1, 0]})
        for item, time in last.items()
    ]
    return pd.concat(parts, ignore_index=True)


def same(one, other):
    pd.testing.assert_frame_equal(one.past, other.past, check_dtype=False)
    assert (one.future is None) == (other.future is None)
    if one.future is not None:
        pd.testing.assert_frame_equal(one.future, other.future, check_dtype=False)
    assert (one.times == other.times).all()


@pytest.mark.parametrize("categories", [["a", "b", "c"], ["z", "b", "a", "c"], ["b", "a", "c"]])
def test_the_order_of_categories_and_unused_ones_change_nothing(past, categories):
    ids = pd.Categorical(past.item_id, categories=categories)
    found = frames_to_forecast(past.assign(item_id=ids), None, horizon=HORIZON)
    same(found, frames_to_forecast(past, None, horizon=HORIZON))
    assert list(found.item_ids) == ["b", "a", "c"]


def test_rows_may_come_in_any_order_within_and_across_items(past, future):
    shuffled = past.sample(frac=1, random_state=0)
    first = list(shuffled.item_id.unique())
    found = frames_to_forecast(shuffled, future.iloc[::-1], horizon=HORIZON)
    assert list(found.item_ids) == first
    ordered = pd.concat([past[past.item_id == item] for item in first])
    same(found, frames_to_forecast(ordered, future, horizon=HORIZON))


@pytest.mark.parametrize("empty", [None, np.nan, ""])
def test_a_row_without_an_item_is_refused(past, empty):
    past.loc[3, "item_id"] = empty
    with pytest.raises(InputError, match="must name an item in every row, row 3"):
        frames_to_forecast(past, None, horizon=HORIZON)


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Europe/Berlin", "Asia/Kolkata"])
def test_hours_with_a_zone_are_the_same_instants_and_come_back_in_it(zone):
    times = pd.date_range("2024-10-26", periods=48, freq="h", tz="UTC").tz_convert(zone)
    frame = pd.DataFrame({"item_id": "x", "timestamp": times, "target": np.arange(48.0)})
    found = frames_to_forecast(frame, None, horizon=HORIZON)
    assert (found.times == pd.date_range(times[-1], periods=HORIZON + 1, freq="h")[1:]).all()
    assert str(found.times.tz) == zone


@pytest.mark.parametrize("freq", ["D", "B", "W-MON", "MS"])
@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/New_York", "Asia/Kolkata"])
def test_steps_of_a_local_calendar_are_local_midnights(freq, zone):
    local = pd.date_range("2024-01-01", periods=60, freq=freq)
    frame = pd.DataFrame({"item_id": "x", "timestamp": local[:30].tz_localize(zone), "target": np.arange(30.0)})
    found = frames_to_forecast(frame, None, horizon=30)
    assert (found.times == local[30:].tz_localize(zone)).all()


def test_text_that_ends_in_an_offset_is_a_time_with_a_zone(past):
    found = frames_to_forecast(past.assign(timestamp=past.timestamp.dt.strftime("%FT%TZ")), None, horizon=HORIZON)
    plain = frames_to_forecast(past, None, horizon=HORIZON)
    assert (found.times.tz_localize(None) == plain.times).all()
    assert found.times.tz is not None
    assert plain.times.tz is None


@pytest.mark.parametrize(
    ("form", "how"), [("%Y", "format='%Y'"), ("%Y%m", "format='%Y%m'"), ("%Y%m%d", "format='%Y%m%d'")]
)
def test_times_that_are_numbers_are_refused_with_the_remedy_that_reads_them(form, how):
    times = pd.date_range("2003-01-01", periods=20, freq="YS").strftime(form).astype(int)
    frame = pd.DataFrame({"item_id": "x", "timestamp": times, "target": np.arange(20.0)})
    with pytest.raises(InputError, match=f"got the number .*{how}"):
        frames_to_forecast(frame, None, horizon=HORIZON)


@pytest.mark.parametrize(("unit", "count"), [("s", 10**9), ("ms", 10**6), ("us", 10**3), ("ns", 1)])
def test_epochs_are_refused_with_their_unit(past, unit, count):
    epochs = past.timestamp.astype("int64") // count
    with pytest.raises(InputError, match=f"unit='{unit}'"):
        frames_to_forecast(past.assign(timestamp=epochs), None, horizon=HORIZON)


@pytest.mark.parametrize("form", ["%y-%m-%d", "%d/%m/%y", "%m.%d.%y"])
def test_years_of_two_digits_are_refused(past, form):
    with pytest.raises(InputError, match="year has two digits"):
        frames_to_forecast(past.assign(timestamp=past.timestamp.dt.strftime(form)), None, horizon=HORIZON)


@pytest.mark.parametrize("unit", [1e20, 1e30, 1e-20, 1e-30])
def test_the_unit_of_values_changes_no_number_that_the_model_sees(past, unit):
    found = frames_to_forecast(past.assign(target=past.target * unit), None, horizon=HORIZON)
    values = found.past.groupby("item_id").target
    assert np.isfinite(found.past.target).all()
    assert (values.max() - values.min()).between(0.1, 1e6).all()
    forecast = np.ones((3, 1, HORIZON, 2), dtype=np.float32)
    answer = found.answer(forecast, targets=["target"], levels=[0.5])
    expected = (found.level + found.unit).ravel().repeat(HORIZON)
    np.testing.assert_allclose(answer["0.5"], expected, rtol=1e-12)


@pytest.mark.parametrize("level", [1e6, 1e8, -1e12])
def test_small_changes_on_a_high_level_keep_their_digits(level):
    wave = np.sin(np.arange(50))
    frame = pd.DataFrame({"item_id": "x", "timestamp": pd.date_range("2024-01-01", periods=50), "target": wave + level})
    found = frames_to_forecast(frame, None, horizon=HORIZON)
    digits = abs(level) * 1e-15
    np.testing.assert_allclose(
        found.past.target * found.unit[0] + found.level[0], wave + level, rtol=0, atol=1e-6 + digits
    )
    assert found.past.target.dtype == np.float32


def test_ordinary_values_stay_as_they_are(past):
    found = frames_to_forecast(past, None, horizon=HORIZON)
    assert (found.level == 0).all()
    assert (found.unit == 1).all()
    np.testing.assert_array_equal(found.past.target, past.target.astype(np.float32))


def test_a_known_covariate_is_scaled_with_its_future(past, future):
    huge = frames_to_forecast(past.assign(promo=past.promo * 1e21), future.assign(promo=future.promo * 1e21), horizon=3)
    for frame in (huge.past, huge.future):
        assert set(np.round(frame.promo, 5)) <= {-1, 1}


@pytest.mark.parametrize(
    ("kind", "ahead"), [(bool, bool), (bool, int), (int, bool), (bool, float), ("boolean", "Int64")]
)
def test_true_is_one_whatever_the_type_on_either_side(past, future, kind, ahead):
    found = frames_to_forecast(
        past.assign(promo=past.promo.astype(kind)), future.assign(promo=future.promo.astype(ahead)), horizon=HORIZON
    )
    same(found, frames_to_forecast(past, future, horizon=HORIZON))


def test_text_stays_a_category_and_numbers_in_another_notation_are_refused(past):
    found = frames_to_forecast(past.assign(colour="red"), None, horizon=HORIZON)
    assert set(found.past.colour) == {"red"}
    for text in ("1,5", "1,234.50"):
        with pytest.raises(InputError, match="decimal"):
            frames_to_forecast(past.assign(price=text), None, horizon=HORIZON)


@pytest.mark.parametrize("lacks", ["past", "future", "both"])
@pytest.mark.parametrize("name", ["timestamp", "date"])
def test_one_series_needs_no_item_id_on_either_side(past, future, lacks, name):
    past, future = past[past.item_id == "a"], future[future.item_id == "a"]
    expected = frames_to_forecast(past, future, horizon=HORIZON)
    if lacks in ("past", "both"):
        past = past.drop(columns="item_id").rename(columns={"timestamp": name})
    if lacks in ("future", "both"):
        future = future.drop(columns="item_id").rename(columns={"timestamp": name})
    found = frames_to_forecast(past, future, horizon=HORIZON)
    assert (found.times == expected.times).all()
    np.testing.assert_array_equal(found.future.promo, expected.future.promo)


def test_a_future_of_several_items_needs_their_ids(past, future):
    with pytest.raises(InputError, match="missing column 'item_id'"):
        frames_to_forecast(past, future.drop(columns="item_id"), horizon=HORIZON)


def test_a_future_that_lacks_a_step_is_refused_by_item(past, future):
    with pytest.raises(InputError, match="cover the 3 steps from .* of item 'c', got 2 steps"):
        frames_to_forecast(past, future.iloc[:-1], horizon=HORIZON)


def test_items_keep_their_order_whatever_weekday_their_weeks_start_on():
    days = {"a": "W-MON", "b": "W-SAT", "c": "W-MON"}
    parts = [
        pd.DataFrame({"item_id": item, "timestamp": pd.date_range("2024-01-01", periods=20, freq=freq), "target": 1.0})
        for item, freq in days.items()
    ]
    found = frames_to_forecast(pd.concat(parts), None, horizon=2)
    assert list(found.item_ids) == ["a", "b", "c"]
    assert found.times.day_name().tolist() == ["Monday"] * 2 + ["Saturday"] * 2 + ["Monday"] * 2


def test_a_horizon_past_the_year_2262_is_refused_before_anything_is_forecast():
    times = pd.date_range("1960-01-01", periods=60, freq="YS")
    frame = pd.DataFrame({"item_id": "tree", "timestamp": times, "target": np.arange(60.0)})
    with pytest.raises(InputError, match="between the years 1678 and 2262"):
        frames_to_forecast(frame, None, horizon=250)


def test_the_frames_of_the_caller_are_not_changed(past, future):
    before = past.copy(), future.copy()
    frames_to_forecast(past.assign(target=past.target * 1e25), future, horizon=HORIZON)
    frames_to_forecast(past, future, horizon=HORIZON)
    pd.testing.assert_frame_equal(past, before[0])
    pd.testing.assert_frame_equal(future, before[1])
