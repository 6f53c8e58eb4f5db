import gzip
import json
import os
import pickle
import warnings

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chronomoe.data.files import read_series, stream_series
from chronomoe.data.frames import frame_to_series
from chronomoe.data.intake import dataset_to_series
from chronomoe.data.table import SeriesTable
from chronomoe.errors import InputError
from sample_series import series_to_frame

STEPS = 6
TIMES = pd.date_range("2024-01-01", periods=STEPS, freq="h")


@pytest.fixture(autouse=True)
def quiet_and_local_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache of datasets")
    datasets.disable_progress_bars()


@pytest.fixture
def frame():
    return pd.DataFrame(
        {
            "item_id": np.repeat(["a", "b"], STEPS),
            "timestamp": np.tile(TIMES, 2),
            "target": np.arange(2.0 * STEPS),
            "price": np.arange(2.0 * STEPS) * 2,
        }
    )


@pytest.fixture
def wide():
    return pd.DataFrame({"date": TIMES, "x": np.arange(STEPS), "y": np.arange(STEPS) * 2.0})


def rows(**columns):
    """One row a series, as fev and Chronos have them."""
    return {
        "id": ["a", "b"],
        "timestamp": [list(TIMES), list(TIMES[:4])],
        "target": [[0.0, 1, None, 3, 4, 5], [6.0, 7, 8, 9]],
        "category": ["static", "static"],
    } | columns


def same(one, other):
    pd.testing.assert_frame_equal(series_to_frame(one), series_to_frame(other), check_dtype=False)


@pytest.mark.parametrize("name", ["long.csv", "long.csv.gz", "long.parquet"])
def test_a_long_file_gives_the_series_of_its_frame(frame, tmp_path, name):
    save(frame, tmp_path / name)
    series = read_series(tmp_path / name, known_covariates=["price"])
    pd.testing.assert_frame_equal(series_to_frame(series), frame, check_dtype=False)
    assert series[0].known == ("price",)


@pytest.mark.parametrize("name", ["wide.csv", "wide.parquet"])
def test_a_wide_file_has_a_series_in_each_column(wide, tmp_path, name):
    save(wide, tmp_path / name)
    assert [series.item_id for series in read_series(tmp_path / name)] == ["x", "y"]
    (group,) = read_series(tmp_path / name, target=["x", "y"])
    assert group.target.shape == (2, STEPS)


def test_row_numbers_that_pandas_writes_are_no_series(wide, tmp_path):
    for first in (0, 1, 50):
        wide.set_index(np.arange(STEPS) + first).to_csv(tmp_path / "wide.csv")
        assert [series.item_id for series in read_series(tmp_path / "wide.csv")] == ["x", "y"]


def test_an_empty_column_that_a_spreadsheet_left_is_no_covariate(frame, tmp_path):
    (tmp_path / "long.csv").write_text("".join(f"{line},,\n" for line in frame.to_csv(index=False).splitlines()))
    assert list(read_series(tmp_path / "long.csv")[0].covariates) == ["price"]


def test_item_ids_stay_as_written(frame, tmp_path):
    save(frame.replace({"item_id": {"a": "007", "b": "NA"}}), tmp_path / "long.csv")
    assert [series.item_id for series in read_series(tmp_path / "long.csv")] == ["007", "NA"]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("absent.csv", None, "no file or folder .*absent.csv'; the nearest folder that exists is"),
        ("data.xlsx", b"x", "told by its suffix .*got .*data.xlsx"),
        ("data.csv", b"", "is empty"),
        ("data.csv", b"item_id,timestamp,target\n", "the frame is empty"),
        ("data.csv", b"\xff\xfe\x00\x01", "cannot be read as .csv: .*save it in UTF-8"),
        (
            "data.csv",
            b"item_id;timestamp;target\na;2024-01-01;1\n",
            "separated by commas, .* seems to have ';' instead",
        ),
        ("data.csv", b"item_id\ttimestamp\ttarget\na\t2024-01-01\t1\n", "separated by commas, .* have '.t' instead"),
        ("data.csv", b"item_id,timestamp,target,target\na,2024-01-01,1,2\n", "used more than once: 'target'"),
        ("data.csv", b"timestamp,x,x\n2024-01-01,1,2\n", "used more than once: 'x'"),
        ("data.csv", b"item_id,timestamp,target\na,2024-01-01,1,2\n", "as many values as .* 3; a row of .* has more"),
        ("data.csv", b'a,b\n1,2\n1,2,3,4\n"', "cannot be read as .csv"),
        ("data.csv.gz", b"not gzip", "cannot be read as .csv.gz"),
        ("data.parquet", b"not parquet", "cannot be read as .parquet"),
        ("data.jsonl", b"", "is empty"),
        ("data.jsonl", b"{broken\n", "line 1 is not a JSON object"),
        ("data.jsonl", b"[1, 2]\n", "line 1 must be one JSON object"),
        ("data.jsonl.gz", b"not gzip", "cannot be read as JSON lines"),
    ],
)
def test_unreadable_files_are_refused_in_one_line(tmp_path, name, content, match):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=match) as info:
        read_series(tmp_path / name)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("name", ["long.csv", "long.csv.gz"])
def test_rows_that_end_in_a_comma_keep_their_columns(frame, tmp_path, name):
    head, *body = frame.drop(columns="price").to_csv(index=False).splitlines()
    text = "\n".join([head, *(line + "," for line in body)])
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    found = series_to_frame(read_series(tmp_path / name))
    pd.testing.assert_frame_equal(found, frame.drop(columns="price"), check_dtype=False)


def test_a_byte_order_mark_is_no_part_of_a_name(frame, tmp_path):
    frame.to_csv(tmp_path / "long.csv", index=False, encoding="utf-8-sig")
    found = series_to_frame(read_series(tmp_path / "long.csv"))
    pd.testing.assert_frame_equal(found, frame, check_dtype=False)


def test_an_index_of_a_parquet_file_is_read_as_columns(frame, tmp_path):
    frame.set_index(["item_id", "timestamp"]).to_parquet(tmp_path / "long.parquet")
    pd.testing.assert_frame_equal(series_to_frame(read_series(tmp_path / "long.parquet")), frame, check_dtype=False)


def test_mixed_columns_of_a_csv_file_are_refused(frame, tmp_path):
    frame["target"] = frame["target"].astype(object)
    frame.loc[2, "target"] = "n.a.?"
    save(frame, tmp_path / "long.csv")
    with pytest.raises(InputError, match="'target' mixes numbers and text: row 2 .* 'n.a.\\?'"):
        read_series(tmp_path / "long.csv")


@pytest.mark.parametrize("layout", ["saved", "saved splits", "file", "folder"])
def test_one_row_a_series_is_read_from_memory_mapped_tables(tmp_path, layout):
    dataset = datasets.Dataset.from_dict(rows(price=[[1.0] * 6, [2.0] * 4]))
    path = tmp_path / "data"
    if layout == "saved":
        dataset.save_to_disk(path)
    elif layout == "saved splits":
        datasets.DatasetDict({"train": dataset}).save_to_disk(path)
    elif layout == "file":
        path = tmp_path / "data.parquet"
        dataset.to_parquet(path)
    else:
        path.mkdir()
        dataset.select([0]).to_parquet(path / "train-00000-of-00002.parquet")
        dataset.select([1]).to_parquet(path / "train-00001-of-00002.parquet")
    series = read_series(path, known_covariates=["price"], cache_dir=tmp_path / "cache")
    assert isinstance(series, SeriesTable)
    assert series.parts[0].cache_files
    assert [item.item_id for item in series] == ["a", "b"]
    np.testing.assert_array_equal(series[0].target, [[0, 1, np.nan, 3, 4, 5]])
    np.testing.assert_array_equal(series[1].target, [[6, 7, 8, 9]])
    np.testing.assert_array_equal(series[-1].covariates["price"], [2] * 4)
    assert (series[1].start, series[1].freq, series[1].known) == (TIMES[0], "h", ("price",))
    assert len(series[:1]) == 1
    same(pickle.loads(pickle.dumps(series)), series)


def test_a_list_of_lists_or_several_columns_make_a_multivariate_series():
    nested = rows(target=[[[0.0] * 6, [1.0] * 6], [[2.0] * 4, [3.0] * 4]])
    series = dataset_to_series(datasets.Dataset.from_dict(nested))
    assert series[1].target_names == ("target_0", "target_1")
    np.testing.assert_array_equal(series[1].target, [[2] * 4, [3] * 4])
    columns = datasets.Dataset.from_dict(rows(wind=[[1] * 6, [2] * 4]))
    np.testing.assert_array_equal(
        dataset_to_series(columns, target=["target", "wind"])[1].target, [[6, 7, 8, 9], [2] * 4]
    )


@pytest.mark.parametrize("target", [[[1.0, 2, 3], [4.0, 5]], [[[1.0, 2, 3], [0.0] * 3], [[4.0, 5], [0.0] * 2]]])
@pytest.mark.parametrize("stated", [True, False])
def test_rows_may_state_a_start_and_a_step_instead_of_times(target, stated):
    columns = {"item_id": ["a", "b"], "start": [TIMES[0], TIMES[2]], "target": target}
    dataset = datasets.Dataset.from_dict(columns | ({"freq": ["h", "H"]} if stated else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        series = dataset_to_series(dataset, freq=None if stated else "h")
    assert [(item.start, item.freq, len(item)) for item in series] == [(TIMES[0], "h", 3), (TIMES[2], "h", 2)]
    np.testing.assert_array_equal(series[1].target[0], [4, 5])


def test_rows_that_state_a_start_need_one_step():
    columns = {"start": [TIMES[0], TIMES[2]], "target": [[1.0, 2, 3], [4.0, 5]]}
    with pytest.raises(InputError, match="say nothing of the step; pass freq="):
        dataset_to_series(datasets.Dataset.from_dict(columns))
    with pytest.raises(InputError, match="the same step, got 'h' and 'D'; pass freq="):
        dataset_to_series(datasets.Dataset.from_dict(columns | {"freq": ["h", "D"]}))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("layout", ["long", "lists"])
def test_part_files_of_other_columns_are_refused(frame, tmp_path, layout, cached):
    frames = [frame, frame.assign(item_id="c" + frame["item_id"]).drop(columns="price")]
    for number, part in enumerate(frames):
        rows = part.groupby("item_id").agg(list).reset_index() if layout == "lists" else part
        rows.to_parquet(tmp_path / f"part-{number}.parquet", index=False)
    with pytest.raises(InputError, match="every part of a table must have the columns of the first one.*'price'"):
        read_series(tmp_path, cache_dir=tmp_path / "cache") if cached else list(stream_series(tmp_path))


def test_json_lines_of_nothing_but_empty_series_are_refused(tmp_path):
    rows = [{"start": "2024-01-01", "freq": "1D", "target": []} for _ in range(2)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match="all 2 hold only missing values"):
        read_series(tmp_path / "data.jsonl")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_part_files_of_other_columns_are_refused_where_they_are_read_whole(frame, tmp_path, suffix):
    for number, part in enumerate((frame.iloc[:9], frame.iloc[9:].drop(columns="price"))):
        write = part.to_csv if suffix == "csv" else part.to_parquet
        write(tmp_path / f"part-{number}.{suffix}", index=False)
    with pytest.raises(InputError, match=f"the columns of the first one.*'price'.* in '.*part-1.{suffix}'"):
        read_series(tmp_path)


@pytest.mark.parametrize("other", ["int64", "float32", "str"])
def test_an_item_may_go_on_in_a_part_file_of_another_number_type(frame, tmp_path, other):
    frame.iloc[:9].to_parquet(tmp_path / "part-0.parquet", index=False)
    frame.iloc[9:].astype({"target": other}).to_parquet(tmp_path / "part-1.parquet", index=False)
    if other == "str":
        with pytest.raises(InputError, match="every part of a table must have the types of the first one"):
            list(stream_series(tmp_path))
    else:
        same([series for part in stream_series(tmp_path) for series in part], frame_to_series(frame))


def test_arrow_series_of_only_missing_values_are_dropped():
    dataset = datasets.Dataset.from_dict(rows(target=[[float("nan")] * 6, [6.0, 7, 8, 9]]))
    with pytest.warns(UserWarning, match="dropped 1 of 2 series.*'a'"):
        series = dataset_to_series(dataset)
    assert [item.item_id for item in series] == ["b"]


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"target": [[1.0] * 5, [1.0] * 4]}, "as long as its 'timestamp', got 5 values of 'target' for 6 .*'a'"),
        ({"target": [[[1.0] * 6], [[1.0] * 3]]}, "as long as its 'timestamp', got 3 values"),
        ({"target": [[[1.0] * 6], [[1.0] * 4] * 2]}, "must have the first one's 1 variates, got 2 for item 'b'"),
        ({"target": [[1.0] * 6, [1.0, float("inf"), 1, 1]]}, "'target' must hold finite.*item 'b' at row 1"),
        ({"shop": [["n"] * 6, ["s"] * 4]}, "column 'shop' must hold numbers.*encode"),
        ({"timestamp": [list(TIMES[::-1]), list(TIMES[:4])]}, "unsorted timestamps: item 'a'"),
        ({"timestamp": [list(TIMES), [*TIMES[:3], TIMES[5]]]}, "irregular frequency.*item 'b' at row 3"),
        ({"id": ["a", "a"]}, "an item id of its own, got 'a' again"),
        ({"id": ["a", None]}, "row 1 is empty"),
    ],
)
def test_bad_rows_of_a_data_set_are_refused_when_it_is_opened(columns, match):
    with pytest.raises(InputError, match=match):
        dataset_to_series(datasets.Dataset.from_dict(rows(**columns)))


def test_a_data_set_without_the_target_is_refused_with_the_nearest_column():
    data = rows()
    data["targets"] = data.pop("target")
    with pytest.raises(InputError, match="missing column 'target'.*Did you mean 'targets'"):
        dataset_to_series(datasets.Dataset.from_dict(data))


@pytest.mark.parametrize("batch", [1, 4, 6, 7, 100])
def test_a_streamed_parquet_file_equals_the_one_read_into_memory(frame, tmp_path, batch, monkeypatch):
    monkeypatch.setattr("chronomoe.data.parquet.BATCH_ROWS", batch)
    path = tmp_path / "long.parquet"
    frame = pd.concat([frame, frame.assign(item_id="c" + frame["item_id"]).iloc[:7]])
    save(frame, path)
    streamed = read_series(path, freq="h", cache_dir=tmp_path / "cache")
    assert isinstance(streamed, SeriesTable)
    same(streamed, read_series(path, freq="h"))
    (made,) = (tmp_path / "cache").iterdir()
    time = made.stat().st_mtime_ns
    read_series(path, freq="h", cache_dir=tmp_path / "cache")
    assert made.stat().st_mtime_ns == time


def test_streaming_refuses_items_whose_rows_do_not_stand_together(frame, tmp_path):
    save(frame.sort_values("timestamp", kind="stable"), tmp_path / "long.parquet")
    with pytest.raises(InputError, match="item '[ab]' appears again.*sort the file"):
        read_series(tmp_path / "long.parquet", cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_streaming_refuses_text_columns(frame, tmp_path):
    save(frame.assign(shop="north"), tmp_path / "long.parquet")
    with pytest.raises(InputError, match="column 'shop' must hold numbers"):
        read_series(tmp_path / "long.parquet", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.json.gz"])
def test_gluonts_json_lines_are_read(tmp_path, name):
    lines = [
        {
            "item_id": "a",
            "start": "2024-01-01 00:00:00",
            "target": [1, None, "NaN", 4],
            "feat_dynamic_real": [[0, 1, 2, 3, 4, 5]],
            "past_feat_dynamic_real": [[5, 6, 7, 8]],
            "feat_static_cat": [0],
        },
    ]
    save_lines(lines, tmp_path / name)
    (first,) = read_series(tmp_path / name, freq="H")
    np.testing.assert_array_equal(first.target, [[1, np.nan, np.nan, 4]])
    np.testing.assert_array_equal(first.covariates["feat_dynamic_real_0"], [0, 1, 2, 3])
    assert first.known == ("feat_dynamic_real_0",)
    assert list(first.covariates) == ["feat_dynamic_real_0", "past_feat_dynamic_real_0"]
    save_lines([{"start": "2024-01-01", "target": [[1, 2], [3, 4]]}], tmp_path / name)
    (second,) = read_series(tmp_path / name, freq="H")
    assert (second.item_id, second.target_names, second.freq) == ("0", ("target_0", "target_1"), "h")


@pytest.mark.parametrize(
    "other",
    [{"target": [[1, 2], [3, 4]]}, {"target": [1, 2], "feat_dynamic_real": [[1, 2]]}],
    ids=["variates", "known"],
)
def test_json_lines_that_differ_in_variates_or_covariates_are_refused(tmp_path, other):
    lines = [{"start": "2024-01-01", "target": [1, 2]}, {"start": "2024-01-01"} | other]
    save_lines(lines, tmp_path / "data.jsonl")
    with pytest.raises(InputError, match="line 2: .* the same variates and covariates"):
        read_series(tmp_path / "data.jsonl", freq="h")


def test_gluonts_metadata_tells_the_frequency(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "metadata.json").write_text(json.dumps({"freq": "M"}))
    save_lines([{"start": "2024-01-15", "target": [1, 2, 3]}], tmp_path / "train" / "data.json")
    (series,) = read_series(tmp_path / "train")
    assert (series.freq, series.start) == ("ME", pd.Timestamp("2024-01-31"))


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ({"start": "2024-01-01", "target": [1, 2]}, "line 1 states only when the series starts; pass freq="),
        ({"start": "2024-01-01", "freq": "h"}, "line 1: missing field 'target'"),
        ({"start": "soon", "target": [1], "freq": "h"}, "line 1: start must be a date or time, got 'soon'"),
        ({"start": None, "target": [1], "freq": "h"}, "line 1: start must be a date or time, got None"),
        ({"start": "2024-01-01", "target": ["x"], "freq": "h"}, "line 1: target must be a list of numbers"),
        ({"start": "2024-01-01", "target": 3, "freq": "h"}, "line 1: target must be a list of numbers"),
        ({"start": "2024-01-01", "target": [1, 1e300], "freq": "h"}, "finite.*item '0' at row 1"),
        ({"start": "2024", "target": [1, 2], "freq": "h", "feat_dynamic_real": [[1]]}, "each of the target's 2 steps"),
        ({"start": "2024", "target": [1], "freq": "h", "feat_dynamic_real": 7}, "must be a list of lists of numbers"),
        ({"start": "2024", "target": [None], "freq": "h"}, "only missing values"),
    ],
)
def test_bad_json_lines_are_refused(tmp_path, line, match):
    save_lines([line], tmp_path / "data.jsonl")
    with pytest.raises(InputError, match=match):
        read_series(tmp_path / "data.jsonl")


def test_a_folder_joins_its_files_and_names_items_after_them(frame, wide, tmp_path):
    save(frame.drop(columns="price"), tmp_path / "first.csv")
    save(wide, tmp_path / "second.parquet")
    datasets.Dataset.from_dict(rows()).save_to_disk(tmp_path / "third")
    (tmp_path / "README.md").write_text("not data")
    series = read_series(tmp_path)
    names = ["first/a", "first/b", "second/x", "second/y", "third/a", "third/b"]
    assert [item.item_id for item in series] == names
    assert series[-1].item_id == series[len(series) - 1].item_id == "third/b"
    assert [item.item_id for item in series[1:3]] == names[1:3]
    with pytest.raises(IndexError):
        series[6]


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("past.parquet", "part-{:05d}-x.snappy.parquet"),
        ("past", "part.{}.parquet"),
        ("past", "train-{}-of-00012.parquet"),
    ]
    + [("past", "{}.parquet"), ("past.csv", "day {}.csv")],
)
def test_a_table_in_part_files_is_one_table(frame, tmp_path, folder, name):
    frame = pd.concat([frame, frame.assign(item_id="c" + frame["item_id"])])
    (tmp_path / folder).mkdir()
    for number in range(12):  # by number: part.10 comes after part.9
        save(frame.iloc[number * 2 : number * 2 + 2], tmp_path / folder / name.format(number))
    for cache in (None, tmp_path / "cache"):
        found = series_to_frame(read_series(tmp_path / folder, freq="h", cache_dir=cache))
        pd.testing.assert_frame_equal(found, frame.reset_index(drop=True), check_dtype=False)


def test_a_folder_whose_files_differ_in_covariates_is_refused(frame, tmp_path):
    save(frame, tmp_path / "first.csv")
    save(frame.drop(columns="price"), tmp_path / "second.csv")
    with pytest.raises(InputError, match="'first' has .'price'., 'second' has none"):
        read_series(tmp_path)


@pytest.mark.parametrize("layout", ["long", "rows"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_file_that_was_replaced_is_read_again_whatever_its_time(frame, tmp_path, layout, cached):
    path = tmp_path / "data.parquet"
    for level in (0.0, 1000.0):
        if layout == "long":
            frame.assign(target=frame.target + level).to_parquet(path)
        else:
            datasets.Dataset.from_dict(rows(target=[[level] * 6, [level] * 4])).to_parquet(path)
        os.utime(path, (1, 1))
        series = read_series(path, cache_dir=tmp_path / "cache" if cached else None)
        assert series[0].target[0, 0] == level


def test_the_cache_can_be_named_by_the_environment(frame, tmp_path, monkeypatch):
    monkeypatch.setenv("CHRONOMOE_CACHE", str(tmp_path / "cache"))
    save(frame, tmp_path / "long.parquet")
    assert read_series(tmp_path / "long.parquet").parts[0].cache_files
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("layout", ["long", "rows", "scattered", "csv"])
def test_streamed_series_are_those_read_at_once(frame, tmp_path, monkeypatch, layout):
    monkeypatch.setattr("chronomoe.data.parquet.BATCH_ROWS", 7)
    frame = pd.concat([frame.assign(item_id=f"{number}" + frame["item_id"]) for number in range(4)])
    path = tmp_path / ("data.csv" if layout == "csv" else "data.parquet")
    if layout == "rows":
        found = [(name, list(part.timestamp), list(part.target)) for name, part in frame.groupby("item_id")]
        pd.DataFrame(found, columns=["id", "timestamp", "target"]).to_parquet(path)
    else:
        save(frame.sort_values("timestamp", kind="stable") if layout == "scattered" else frame, path)
    parts = list(stream_series(path, freq="h"))
    assert len(parts) > 2
    same([series for part in parts for series in part], read_series(path, freq="h"))


def test_a_folder_of_one_file_is_that_file(frame, tmp_path):
    save(frame, tmp_path / "only.csv")
    assert [item.item_id for item in read_series(tmp_path)] == ["a", "b"]


def test_a_folder_without_data_is_refused_with_what_it_holds(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(InputError, match="must hold files in a format that we know.*got 'train'"):
        read_series(tmp_path)


def test_a_wide_parquet_file_with_whole_number_types_is_read(tmp_path):
    table = pa.table({"timestamp": pa.array(TIMES), "x": pa.array([1, None, 3, 4, 5, 6], type=pa.int16())})
    pq.write_table(table, tmp_path / "wide.parquet")
    (series,) = read_series(tmp_path / "wide.parquet")
    assert np.isnan(series.target[0, 1])


def save(frame, path):
    if path.suffix == ".parquet":
        frame.to_parquet(path, index=False)
    else:
        frame.to_csv(path, index=False)


def save_lines(lines, path):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
