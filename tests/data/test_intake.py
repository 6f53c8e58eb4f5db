import warnings

import numpy as np
import pandas as pd
import pytest

from chronomoe.data.frames import frame_to_series, is_wide, to_long
from chronomoe.data.frequency import default_seasonality
from chronomoe.data.intake import Wish
from chronomoe.data.series import Series
from chronomoe.errors import InputError
from sample_series import series_to_frame


def long_frame(items=("a", "b"), steps=6, freq="h", **columns):
    frames = []
    for position, item in enumerate(items):
        times = pd.date_range("2024-01-01", periods=steps, freq=freq)
        frames.append(pd.DataFrame({"item_id": item, "timestamp": times, "target": np.arange(steps) + 10.0 * position}))
    return pd.concat(frames, ignore_index=True).assign(**columns)


def wide_frame(steps=6, freq="h"):
    times = pd.date_range("2024-01-01", periods=steps, freq=freq)
    return pd.DataFrame({"timestamp": times, "x": np.arange(steps), "y": np.arange(steps) * 2.0})


def refused(frame, match, **options):
    with pytest.raises(InputError, match=match) as info:
        frame_to_series(frame, **options)
    message = str(info.value)
    assert "\n" not in message
    return message


def test_a_long_frame_gives_one_series_for_each_item():
    first, second = frame_to_series(long_frame())
    assert (first.item_id, first.freq, first.start, len(first)) == ("a", "h", pd.Timestamp("2024-01-01"), 6)
    assert first.target.shape == (1, 6)
    np.testing.assert_array_equal(second.target[0], np.arange(6) + 10)


def test_rows_of_items_may_alternate():
    frame = long_frame().sort_values("timestamp", kind="stable")
    np.testing.assert_array_equal(frame_to_series(frame)[1].target[0], np.arange(6) + 10)


def test_items_keep_the_order_of_first_appearance_and_numbers_become_names():
    assert [item.item_id for item in frame_to_series(long_frame(items=(7, 3)))] == ["7", "3"]


def test_several_targets_make_one_multivariate_series():
    frame = long_frame(load=1.0, wind=2.0)
    series = frame_to_series(frame, target=["load", "target"], known_covariates=["wind"])[0]
    assert series.target_names == ("load", "target")
    np.testing.assert_array_equal(series.target, [np.ones(6), np.arange(6)])
    assert list(series.covariates) == ["wind"]
    assert series.known == ("wind",)


def test_past_only_covariates_are_carried_but_not_known():
    series = frame_to_series(long_frame(price=np.arange(12.0)))[1]
    np.testing.assert_array_equal(series.covariates["price"], np.arange(6) + 6)
    assert series.known == ()


def test_missing_values_stay_missing():
    frame = long_frame()
    frame.loc[[0, 4], "target"] = np.nan
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(frame_to_series(frame)[0].target[0])), [0, 4])


def test_a_frame_without_item_id_is_one_series_and_its_other_columns_covariates():
    frame = wide_frame().rename(columns={"x": "target"})
    (series,) = frame_to_series(frame)
    assert series.item_id == "series"
    assert list(series.covariates) == ["y"]
    (named,) = frame_to_series(wide_frame(), target=["x", "y"])
    assert named.target_names == ("x", "y")


def test_a_wide_frame_gives_the_series_of_its_long_form():
    wide = wide_frame()
    assert is_wide(wide)
    assert not is_wide(long_frame())
    for one, other in zip(frame_to_series(wide), frame_to_series(to_long(wide, Wish())), strict=True):
        assert (one.item_id, one.start, one.freq) == (other.item_id, other.start, other.freq)
        np.testing.assert_array_equal(one.target, other.target)


def test_named_index_levels_are_columns():
    assert len(frame_to_series(long_frame().set_index(["item_id", "timestamp"]))) == 2
    assert len(frame_to_series(wide_frame().set_index("timestamp"))) == 2


def test_series_to_frame_inverts_frame_to_series():
    frame = long_frame(price=np.arange(12.0))
    back = series_to_frame(frame_to_series(frame))
    pd.testing.assert_frame_equal(back, frame, check_dtype=False)


@pytest.mark.parametrize(
    "freq",
    ["h", "15min", "10min", "30s", "D", "2D", "B", "W-SUN", "W-WED", "2W-WED", "MS", "ME", "BMS", "QS-JAN", "QE-DEC"]
    + ["YS-JAN"],
)
def test_the_usual_frequencies_are_inferred(freq):
    steps = 24
    (series,) = frame_to_series(long_frame(items=("a",), steps=steps, freq=freq))
    times = pd.date_range("2024-01-01", periods=steps, freq=freq)
    pd.testing.assert_index_equal(series.timestamps(), times, exact="equiv", check_names=False)


def test_weekly_items_may_have_their_own_weekdays():
    frame = pd.concat([long_frame(("a",), freq="W-SUN"), long_frame(("b",), freq="W-WED")])
    assert [series.freq for series in frame_to_series(frame)] == ["W-SUN", "W-WED"]


def test_the_frequency_is_that_of_the_longest_item_and_short_ones_follow():
    frame = pd.concat([long_frame(("a",), steps=1), long_frame(("b",), steps=2), long_frame(("c",), steps=5)])
    assert [series.freq for series in frame_to_series(frame)] == ["h"] * 3


def test_series_too_short_to_show_a_frequency_need_it_stated():
    frame = long_frame(steps=2)
    refused(frame, "at least 3 rows.*item 'a'.*has 2; pass freq=")
    assert frame_to_series(frame, freq="h")[0].freq == "h"


def test_aliases_of_older_pandas_are_understood():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert frame_to_series(long_frame(), freq="H")[0].freq == "h"
        assert frame_to_series(long_frame(freq="ME"), freq="M")[0].freq == "ME"
    refused(long_frame(), "freq must be a pandas offset alias.*got 'hourly'", freq="hourly")
    refused(long_frame(), "got '-1h'", freq="-1h")


def test_text_times_are_read_and_zones_become_utc():
    frame = long_frame()
    frame["timestamp"] = frame["timestamp"].astype(str)
    assert frame_to_series(frame)[0].start == pd.Timestamp("2024-01-01")
    frame["timestamp"] = pd.to_datetime(frame["timestamp"]).dt.tz_localize("Europe/Berlin")
    assert frame_to_series(frame)[0].start == pd.Timestamp("2023-12-31 23:00")


@pytest.mark.parametrize("form", ["%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y"])
def test_days_and_months_are_told_apart_by_rows_that_leave_no_choice(form):
    frame = long_frame(("a",), steps=40, freq="D")
    series = frame_to_series(frame.assign(timestamp=frame["timestamp"].dt.strftime(form)))[0]
    assert series.timestamps().tolist() == frame["timestamp"].tolist()


def test_times_that_can_be_read_in_two_ways_are_refused():
    frame = long_frame(("a",), steps=5, freq="MS")
    text = frame["timestamp"].dt.strftime("%d/%m/%Y")  # with the month first, these would be days of January
    refused(frame.assign(timestamp=text), "the day or the month first: '01/02/2024' in row 1 .*ISO 8601")


def test_times_with_the_year_first_are_read_in_any_writing():
    frame = long_frame(("a",), steps=5, freq="D")
    for form in ("%Y/%m/%d", "%Y.%m.%d", "%Y-%m-%d %I:%M %p"):
        series = frame_to_series(frame.assign(timestamp=frame["timestamp"].dt.strftime(form)))[0]
        assert series.timestamps().tolist() == frame["timestamp"].tolist()


@pytest.mark.parametrize("freq", ["D", "B", "W-MON", "MS", "QE"])
@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/New_York", "Asia/Kolkata", "UTC"])
def test_days_and_longer_steps_are_those_of_the_calendar_in_their_zone(zone, freq):
    local = pd.date_range("2024-01-01", periods=70, freq=freq).tz_localize(zone)
    frame = pd.DataFrame({"item_id": "a", "timestamp": local[:60], "target": np.arange(60.0)})
    table = frame_to_series(frame)
    assert table.layout.clock.show(table.horizon(10)).tolist() == local[60:].tolist()
    assert table[0].start == local[0].tz_localize(None)


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/New_York"])
def test_steps_within_a_day_pass_a_change_of_clocks(zone):
    times = pd.date_range("2024-03-01", periods=24 * 60, freq="h", tz="UTC").tz_convert(zone)
    table = frame_to_series(pd.DataFrame({"item_id": "a", "timestamp": times[:900], "target": np.arange(900.0)}))
    assert table.layout.clock.show(table.horizon(100)).tolist() == times[900:1000].tolist()


def test_days_of_utc_shown_in_a_zone_stay_days_of_utc():
    times = pd.date_range("2024-01-01", periods=100, freq="D", tz="UTC").tz_convert("America/New_York")
    table = frame_to_series(pd.DataFrame({"item_id": "a", "timestamp": times[:30], "target": np.arange(30.0)}))
    assert table.layout.clock.show(table.horizon(70)).tolist() == times[30:].tolist()


def test_local_days_whose_offsets_change_are_refused_with_the_reason():
    days = pd.date_range("2024-01-01", periods=120, freq="D").tz_localize("Europe/Berlin")
    frame = long_frame(("a",), steps=120).assign(timestamp=days.map(lambda day: day.isoformat()))
    assert "a change of clocks" in refused(frame, "irregular frequency.*'D'.*row 91")
    assert "clocks" not in refused(long_frame(("a",), steps=40).drop(index=[9]), "irregular frequency.*'h'")


@pytest.mark.parametrize("freq", ["h", "2D", "B", "W-SAT", "MS", "BME", "QE-DEC", "YS-JAN", "SMS"])
def test_later_steps_are_those_of_pandas(freq):
    whole = pd.date_range("2020-02-29", periods=40, freq=freq)
    lengths = [5, 30, 17]
    parts = [pd.DataFrame({"item_id": i, "timestamp": whole[:n], "target": 1.0}) for i, n in enumerate(lengths)]
    expected = np.concatenate([whole[n : n + 10] for n in lengths])
    assert frame_to_series(pd.concat(parts), freq=freq).horizon(10).tolist() == pd.DatetimeIndex(expected).tolist()


@pytest.mark.parametrize("freq", ["h", "W-SUN", "YS"])
def test_steps_after_the_year_2262_are_refused(freq):
    frame = long_frame(("a",), steps=5, freq=freq)
    with pytest.raises(InputError, match="between the years 1678 and 2262.*shorten the horizon"):
        frame_to_series(frame).horizon(3_000_000 if freq == "h" else 20_000)


@pytest.mark.parametrize(("form", "freq"), [("%Y", "YS"), ("%Y%m", "MS"), ("%Y%m%d", "D")])
@pytest.mark.parametrize("kind", [int, float, str])
def test_years_months_and_days_written_as_numbers_are_read(form, freq, kind):
    times = pd.date_range("2003-01-01", periods=20, freq=freq)
    numbers = times.strftime(form).astype(int).astype(kind)
    if kind is str and form == "%Y":
        numbers = numbers.astype(object)
    series = frame_to_series(long_frame(("a",), steps=20).assign(timestamp=numbers))[0]
    assert series.timestamps().tolist() == times.tolist()


@pytest.mark.parametrize(
    ("first", "remedy"),
    [(1_700_000_000, "unit='s'"), (1_700_000_000_000, "unit='ms'"), (1_700_000_000_000_000_000, "unit='ns'")]
    + [(0, "format='%Y'"), (9000, "format='%Y'")],
)
def test_other_numbers_for_times_are_refused_with_a_remedy_that_fits(first, remedy):
    frame = long_frame(("a",)).assign(timestamp=first + np.arange(6))
    assert remedy in refused(frame, f"got the number {first}")


@pytest.mark.parametrize("form", ["%y-%m-%d", "%d.%m.%y", "%m/%d/%y", "%y/%m/%d %H:%M"])
@pytest.mark.parametrize("steps", [3, 40])
def test_years_of_two_digits_are_refused_as_such(form, steps):
    frame = long_frame(("a",), steps=steps, freq="D")
    refused(frame.assign(timestamp=frame.timestamp.dt.strftime(form)), "years of two digits")


@pytest.mark.parametrize("values", [["10,03"] * 6, ["1,234.50"] * 6, ["1.234,5"] * 6, [1, 2, "10,03", 4, 5, 6]])
def test_numbers_in_another_notation_are_refused_as_such(values):
    message = refused(long_frame(("a",)).assign(target=values), "decimal comma or thousands")
    assert "cat.codes" not in message
    refused(long_frame(("a",)).assign(target="high"), "'target' must hold numbers.*make them numbers")


@pytest.mark.parametrize("name", ["Unnamed: 0", "Unnamed: 3.1", "", " ", "__index_level_0__"])
def test_a_column_without_a_name_is_no_data(name):
    frame = long_frame().assign(**{name: np.arange(12) + 7})
    assert list(frame_to_series(frame)[0].covariates) == []
    assert len(frame_to_series(wide_frame().assign(**{name: np.arange(6) + 7}))) == 2


@pytest.mark.parametrize("categories", [["a", "b"], ["b", "a"], ["z", "b", "q", "a"]])
def test_ids_may_be_categories_in_any_order(categories):
    frame = long_frame(("b", "a"))
    frame["item_id"] = pd.Categorical(frame["item_id"], categories=categories)
    table = frame_to_series(frame)
    assert [series.item_id for series in table] == ["b", "a"]
    assert table[1].target[0, 0] == 10


def test_values_keep_the_digits_they_came_with():
    frame = long_frame(("a",)).assign(target=1e8 + np.arange(6) / 8)
    assert frame_to_series(frame)[0].target.dtype == np.float64
    np.testing.assert_array_equal(frame_to_series(frame)[0].target[0] - 1e8, np.arange(6) / 8)
    assert frame_to_series(frame.astype({"target": "float32"}))[0].target.dtype == np.float32


def test_series_of_only_missing_values_are_dropped_with_a_count():
    frame = long_frame(items=("a", "b", "c"))
    frame.loc[frame["item_id"] == "b", "target"] = np.nan
    with pytest.warns(UserWarning, match="dropped 1 of 3 series.*'b'"):
        assert [series.item_id for series in frame_to_series(frame)] == ["a", "c"]
    with pytest.warns(UserWarning, match="dropped 1 of 2 series.*'y'"):
        assert len(frame_to_series(wide_frame().assign(y=np.nan))) == 1
    refused(frame.assign(target=np.nan), "all 3 hold only missing values")


def test_constant_series_are_fine():
    assert len(frame_to_series(long_frame(target=1))) == 2


@pytest.mark.parametrize(
    ("renamed", "match"),
    [
        ({"target": "Target"}, "missing column 'target'.*Did you mean 'Target'"),
        ({"target": "value"}, "missing column 'target'.*Did you mean 'value'"),
        ({"timestamp": "timestmp"}, "missing column 'timestamp'.*Did you mean 'timestmp'"),
        ({"timestamp": "ds"}, "missing column 'timestamp'.*Did you mean 'ds'"),
        ({"item_id": "Item ID"}, "missing column 'item_id'.*Did you mean 'Item ID'"),
        ({"item_id": "unique_id"}, "missing column 'item_id'.*Did you mean 'unique_id'"),
        ({"item_id": "unique_id", "target": "y"}, "missing column 'item_id'.*Did you mean 'unique_id'"),
    ],
)
def test_misnamed_columns_are_refused_with_the_nearest_name(renamed, match):
    refused(long_frame().rename(columns=renamed), match)


def test_an_unknown_target_or_covariate_is_refused_with_the_nearest_name():
    refused(long_frame(), "missing column 'targte'.*Did you mean 'target'", target="targte")
    refused(
        long_frame(price=1), "known covariates must be.*got 'prize'. Did you mean 'price'", known_covariates=["prize"]
    )
    refused(long_frame(), "there are none.*got 'target'", known_covariates=["target"])
    refused(long_frame(), "different value columns", target=["target", "target"])
    refused(wide_frame(), "a wide frame has no covariates", known_covariates=["x"])


def test_rows_may_come_in_any_order():
    for frame in (long_frame(), wide_frame()):
        shuffled = frame.sample(frac=1, random_state=0)
        want = {series.item_id: series.target.tolist() for series in frame_to_series(frame)}
        assert {series.item_id: series.target.tolist() for series in frame_to_series(shuffled)} == want


def test_duplicated_timestamps_are_refused():
    frame = long_frame()
    frame.loc[8, "timestamp"] = frame.loc[7, "timestamp"]
    refused(frame, r"duplicated timestamp: item 'b' at row 2 of the item \(2024-01-01 01:00:00\).*drop_duplicates")


@pytest.mark.parametrize("freq", ["h", "B", "MS", "W-SUN"])
@pytest.mark.parametrize("given", [False, True])
def test_missing_rows_are_refused_as_irregular_with_the_first_place(freq, given):
    frame = long_frame(steps=30, freq=freq).drop(index=[50, 55])
    time = str(pd.date_range("2024-01-01", periods=30, freq=freq)[21])
    message = refused(frame, f"irregular frequency.*'{freq}'.*item 'b' at row 20.*{time}", freq=freq if given else None)
    assert "Reindex" in message


def test_a_gap_in_every_item_is_named_too():
    message = refused(long_frame(("a",), steps=40, freq="MS").drop(index=[25]), "irregular frequency")
    assert "'MS'" in message
    assert "2026-03-01" in message


def test_items_of_different_frequencies_are_refused():
    frame = pd.concat([long_frame(("a",)), long_frame(("b",), steps=5, freq="D")])
    refused(frame, "irregular frequency.*'h'.*item 'b'.*split items of different frequencies")


def test_times_off_the_stated_calendar_are_refused():
    frame = long_frame(("a",), steps=4, freq="MS")
    frame["timestamp"] += pd.Timedelta(days=14)
    refused(frame, "'MS' \\(given\\).*item 'a' at row 0", freq="MS")


def test_an_empty_frame_is_refused():
    refused(long_frame().iloc[:0], "the frame is empty")
    refused(pd.DataFrame(), "the frame is empty")


@pytest.mark.parametrize("value", [np.inf, -np.inf, 1e300])
def test_infinite_values_are_refused_with_item_and_row(value):
    frame = long_frame(price=1.0)
    frame.loc[8, "target"] = value
    refused(frame, "column 'target' must hold finite.*item 'b' at row 2")
    frame = long_frame(price=1.0)
    frame.loc[9, "price"] = value
    refused(frame, "column 'price' must hold finite.*item 'b' at row 3")
    wide = wide_frame()
    wide.loc[2, "y"] = value
    refused(wide, "must hold finite.*item 'y' at row 2")


def test_mixed_text_and_numbers_are_refused_with_column_and_value():
    frame = long_frame()
    frame["target"] = frame["target"].astype(object)
    frame.loc[8, "target"] = "broken"
    refused(frame, r"column 'target' mixes numbers and text: row 8 .* holds 'broken'")


def test_numbers_written_as_text_are_read():
    frame = long_frame()
    frame["target"] = frame["target"].astype(str)
    np.testing.assert_array_equal(frame_to_series(frame)[0].target[0], np.arange(6))


def test_nullable_and_boolean_columns_are_numbers():
    frame = long_frame(holiday=[True, False] * 6)
    frame["target"] = frame["target"].astype("Float64")
    frame.loc[0, "target"] = pd.NA
    series = frame_to_series(frame)[0]
    assert np.isnan(series.target[0, 0])
    assert series.covariates["holiday"].tolist() == [1, 0] * 3


@pytest.mark.parametrize("dtype", [object, "category", "string"])
def test_categorical_covariates_are_refused_with_the_way_to_encode_them(dtype):
    frame = long_frame(shop=pd.Series(["north", "south"] * 6, dtype=dtype))
    refused(frame, "column 'shop' must hold numbers, got 'north'.*cat.codes")


@pytest.mark.parametrize(
    ("times", "match"),
    [
        (range(12), "must hold dates or times, got the number 0"),
        (["2024-01-01", "soon"] * 6, "got 'soon' in row 1"),
        ([None] * 12, "row 0 .* is empty"),
        (["9999-12-31"] * 12, "between the years 1678 and 2262"),
    ],
)
def test_timestamps_that_are_no_times_are_refused(times, match):
    refused(long_frame(timestamp=list(times)), match)


def test_rows_without_an_item_are_refused():
    frame = long_frame()
    frame.loc[3, "item_id"] = None
    refused(frame, "must name an item in every row, row 3")
    frame.loc[3, "item_id"] = ""  # as an empty cell of a CSV file is read
    refused(frame, "must name an item in every row, row 3")
    frame["item_id"] = [1] * 6 + ["1"] * 6
    refused(frame, "must hold names or numbers, not both")


def test_a_missing_column_comes_with_a_remedy_that_fits():
    refused(long_frame().drop(columns="target"), "Rename the one that holds the values to 'target'")
    refused(long_frame(), "missing column 'load'; .* Name one of these", target="load")


def test_columns_of_the_same_name_are_refused():
    frame = long_frame(x=1).rename(columns={"x": "target"})
    refused(frame, "a name of its own.*'target'")


def test_a_series_checks_its_shapes():
    values = np.zeros((2, 4), dtype=np.float32)
    start = pd.Timestamp("2024-01-01")
    with pytest.raises(InputError, match="one variate for each"):
        Series(item_id="a", start=start, freq="h", target=values)
    with pytest.raises(InputError, match="covariate 'x'.*4 steps"):
        Series(item_id="a", start=start, freq="h", target=values[:1], covariates={"x": values[0, :2]})
    with pytest.raises(InputError, match="known covariates"):
        Series(item_id="a", start=start, freq="h", target=values[:1], known=("x",))


@pytest.mark.parametrize(
    ("freq", "period"),
    [("h", 24), ("2h", 12), ("15min", 96), ("10min", 144), ("5min", 288), ("D", 7), ("B", 5), ("W-SUN", 52), ("MS", 12)]
    + [("ME", 12), ("QS-OCT", 4), ("QE", 4), ("YS", 1), ("7min", 1), ("s", 3600), ("H", 24), ("14D", 1)],
)
def test_a_frequency_has_its_usual_seasonality(freq, period):
    assert default_seasonality(freq) == period


def test_a_million_rows_take_seconds_not_a_loop_over_rows():
    items, steps = 1000, 1000
    times = pd.date_range("2024-01-01", periods=steps, freq="h").to_numpy()
    frame = pd.DataFrame(
        {
            "item_id": np.repeat([f"item {i}" for i in range(items)], steps),
            "timestamp": np.tile(times, items),
            "target": np.random.default_rng(0).random(items * steps),
        }
    )
    series = frame_to_series(frame)
    assert len(series) == items
    assert series[-1].target[0, -1] == frame["target"].iloc[-1]
