import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

LEVELS = st.one_of(
    st.just([0.1, 0.5, 0.9]),
    st.lists(st.sampled_from([0.5, 0.05, 0.99, 0.0, 1.0, -0.1, 0.5, float("nan")]), min_size=0, max_size=4),
)
STARTS = ["2024-01-01", "2023-12-31 23:59:59.5", "2024-03-31 01:00", "1970-01-01", "1700-01-01", "2261-12-01"]
STEPS = ["h", "D", "15min", "MS", "ME", "W-SUN", "QS", "B", "YS", "s", "7h"]


@st.composite
def targets(draw, steps):
    """Draw a column: ordinary values, values at the edge of their type, gaps, or no numbers at all."""
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    kind = draw(st.sampled_from(["wave", "huge", "tiny", "high", "constant", "counts", "bool", "text", "empty", "inf"]))
    time = np.arange(steps, dtype=float)
    values = {
        "wave": np.sin(time / 4) + 0.1 * rng.normal(size=steps),
        "huge": rng.normal(size=steps) * 10.0 ** draw(st.integers(30, 307)),
        "tiny": rng.normal(size=steps) * 10.0 ** -draw(st.integers(30, 320)),
        "high": 1e9 + np.sin(time),
        "constant": np.full(steps, draw(st.sampled_from([0.0, -3.0, 1e30, 7.7]))),
        "counts": rng.poisson(0.3, size=steps),
        "bool": rng.random(steps) < 0.5,
        "text": np.array([draw(st.sampled_from(["1", "1,5", "x", "", "2020-01-01"]))] * steps, dtype=object),
        "empty": np.full(steps, np.nan),
        "inf": np.where(rng.random(steps) < 0.1, np.inf, time),
    }[kind]
    if kind not in ("bool", "text") and draw(st.booleans()):
        values = np.where(rng.random(steps) < draw(st.sampled_from([0.1, 0.9])), np.nan, values)
    cast = draw(st.sampled_from([None, None, None, "float32", "float16", "Float64", "object", "category"]))
    column = pd.Series(values)
    return column if cast is None or kind == "text" else column.astype(cast)


@st.composite
def series(draw, name):
    steps = draw(st.integers(1, 60))
    start, freq = draw(st.sampled_from(STARTS)), draw(st.sampled_from(STEPS))
    try:
        times = pd.Series(pd.date_range(start, periods=steps, freq=freq, tz=draw(st.sampled_from([None, None, "UTC"]))))
    except (pd.errors.OutOfBoundsDatetime, OverflowError):
        times = pd.Series(pd.date_range("2024-01-01", periods=steps, freq=freq))
    spoil = draw(st.sampled_from(["", "", "", "gap", "twice", "lost", "text", "epoch", "unsorted"]))
    if spoil == "gap" and steps > 4:
        times = times.drop(index=2)
    elif spoil == "twice":
        times = pd.concat([times, times[-1:]])
    elif spoil == "lost":
        times.iloc[0] = pd.NaT
    elif spoil == "text":
        times = times.astype(str)
    elif spoil == "epoch":
        times = times.astype("int64")
    elif spoil == "unsorted":
        times = times[::-1]
    frame = pd.DataFrame({"item_id": [name] * len(times), "timestamp": times.to_numpy()})
    frame["target"] = draw(targets(len(frame))).to_numpy()
    return frame


@st.composite
def frames(draw):
    ids = draw(st.lists(st.sampled_from(["a", "b", 1, 1.0, "1", None, "", np.nan, True]), min_size=1, max_size=3))
    frame = pd.concat([draw(series(name)) for name in ids], ignore_index=draw(st.booleans()))
    if draw(st.booleans()):
        frame["extra"] = draw(targets(len(frame))).to_numpy()
    for column in draw(st.lists(st.sampled_from(["item_id", "timestamp", "target"]), max_size=1)):
        if draw(st.integers(0, 9)) == 0:
            frame = frame.drop(columns=column)
    if draw(st.integers(0, 9)) == 0:
        frame = frame[:0]
    if "item_id" in frame and draw(st.integers(0, 4)) == 0:
        frame["item_id"] = frame["item_id"].astype("category")
    return frame


@given(frame=frames(), horizon=st.sampled_from([1, 5, 16, 64, 65, 0, -1]), levels=LEVELS)
def test_a_frame_is_forecast_or_refused_and_never_changed(
    mixture_pipeline, refused_in_one_line, frame, horizon, levels
):
    before = frame.copy(deep=True)
    with refused_in_one_line():
        forecast = mixture_pipeline.predict_df(frame, prediction_length=horizon, quantile_levels=levels)
        check(forecast, frame, horizon, levels)
    pd.testing.assert_frame_equal(frame, before)


def check(forecast, frame, horizon, levels):
    assert len(forecast) == horizon * forecast["item_id"].nunique()
    if "item_id" in frame and "target" in frame:
        seen = frame[pd.to_numeric(frame["target"], errors="coerce").notna()]
        assert forecast["item_id"].nunique() == seen["item_id"].nunique()
    quantiles = forecast[[str(level) for level in sorted(levels)]].to_numpy(dtype=float)
    assert np.isfinite(quantiles).all()
    assert (np.diff(quantiles, axis=1) >= 0).all()
    assert np.isfinite(forecast["predictions"].to_numpy(dtype=float)).all()
