"""What is in memory while a file is streamed does not grow with the file."""

import numpy as np
import pandas as pd
import pyarrow as pa

from chronomoe.data.files import stream_series
from chronomoe.data.parquet import scattered

STEPS = 1000


def test_row_groups_that_were_read_are_let_go(tmp_path, monkeypatch):
    monkeypatch.setattr("chronomoe.data.parquet.BATCH_ROWS", 5 * STEPS)
    items, path = 400, tmp_path / "long.parquet"
    frame = pd.DataFrame(
        {
            "item_id": np.repeat([f"item {number}" for number in range(items)], STEPS),
            "timestamp": np.tile(pd.date_range("2024-01-01", periods=STEPS, freq="h"), items),
            "target": np.random.default_rng(0).normal(size=items * STEPS),
        }
    )
    frame.to_parquet(path, row_group_size=5 * STEPS)
    del frame
    before, held, found = pa.total_allocated_bytes(), [], 0
    for part in stream_series(path):
        found += len(part)
        held.append(pa.total_allocated_bytes() - before)
    assert found == items
    assert max(held) < path.stat().st_size / 2


def test_the_first_item_that_comes_again_is_found_across_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("chronomoe.data.parquet.BATCH_ROWS", 4)
    times = pd.date_range("2024-01-01", periods=20, freq="h")

    def first_again(items):
        frame = pd.DataFrame({"item_id": items, "timestamp": times[: len(items)], "target": 1.0})
        frame.to_parquet(tmp_path / "long.parquet")
        return scattered([tmp_path / "long.parquet"])

    assert first_again([*"aaaaaabbccccccd"]) is None
    assert first_again([*"aabbbbcccbbaacc"]) == "b"
    assert first_again([3, 3, 3, 3, 3, 1, 2, 2, 3]) == "3"
