import csv
import io
import json

import pandas as pd
from hypothesis import example, given
from hypothesis import strategies as st

CELLS = st.one_of(
    st.sampled_from(
        [
            "",
            "a",
            "b",
            "1",
            "1.5",
            "1,5",
            "-1e308",
            "nan",
            "inf",
            "2024-01-01",
            "2024-01-02 05:00",
            "01/02/24",
            "é\x00",
            '"',
        ]
    ),
    st.floats().map(str),
    st.text(max_size=5),
)
HEADS = st.sampled_from(["item_id", "timestamp", "target", "promo", "", "target", "Timestamp", "unique_id"])


@st.composite
def tables(draw):
    """Draw the text of a CSV file: an ordinary one with some cells, a head or a separator spoilt."""
    rows = draw(st.integers(0, 40))
    times = pd.date_range("2024-01-01", periods=rows, freq=draw(st.sampled_from(["h", "D", "MS"])))
    table = [["item_id", "timestamp", "target"], *([["a", str(time), f"{time.dayofyear % 7}.5"] for time in times])]
    for _ in range(draw(st.integers(0, 3))):
        row, column = draw(st.integers(0, len(table) - 1)), draw(st.integers(0, 2))
        table[row][column] = draw(HEADS if row == 0 else CELLS)
    text = io.StringIO()
    csv.writer(text, delimiter=draw(st.sampled_from([",", ",", ",", ";", "\t"]))).writerows(table)
    data = text.getvalue().encode(draw(st.sampled_from(["utf-8", "utf-8", "utf-16", "utf-8-sig"])), "surrogatepass")
    return data[: len(data) - draw(st.sampled_from([0, 0, 0, 1, 30]))]


def forecast(chronomoe, teacher_folder, path):
    """Forecast a file by the command line; a refusal is one line and status 2, and writes nothing."""
    out = path.with_name("forecast.csv")
    out.unlink(missing_ok=True)
    before = path.read_bytes()
    status, _, err = chronomoe("predict", teacher_folder, path, "--horizon", 4, "--out", out)
    assert path.read_bytes() == before
    assert status in (0, 2), err
    if status == 2:
        assert err.startswith("chronomoe: ")
        assert err.count("\n") == 1, err
        assert not out.exists()
        return
    frame = pd.read_csv(out)
    quantiles = frame[["0.1", "0.5", "0.9"]]
    assert quantiles.notna().all(axis=None)
    assert (quantiles.diff(axis=1).iloc[:, 1:] >= 0).all(axis=None)


@given(data=tables())
def test_a_table_is_forecast_or_refused(chronomoe, teacher_folder, tmp_path, data):
    (tmp_path / "past.csv").write_bytes(data)
    forecast(chronomoe, teacher_folder, tmp_path / "past.csv")


@given(suffix=st.sampled_from(["csv", "parquet", "jsonl", "json", "txt", ""]), data=st.binary(max_size=80))
def test_any_bytes_are_refused_or_forecast(chronomoe, teacher_folder, tmp_path, suffix, data):
    path = tmp_path / f"past.{suffix}"
    path.write_bytes(data)
    forecast(chronomoe, teacher_folder, path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "start": st.just("2024-01-01") | JSON,
                "target": st.lists(st.floats(-9, 9), min_size=30, max_size=40) | JSON,
                "freq": st.sampled_from(["h", "D", "1D", "nonsense"]) | JSON,
                "item_id": st.text(max_size=3) | JSON,
                "feat_dynamic_real": JSON,
            },
        ),
        max_size=3,
    )
)
@example(rows=[{"start": "2024-01-01", "freq": "D", "item_id": "a", "target": [1.0, 2.0] * 20, "feat_dynamic_real": 3}])
def test_json_lines_are_forecast_or_refused(chronomoe, teacher_folder, tmp_path, rows):
    (tmp_path / "past.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    forecast(chronomoe, teacher_folder, tmp_path / "past.jsonl")
