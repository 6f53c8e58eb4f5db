import numpy as np
import pytest

from chronomoe.data.batching import PADDING, runs_of_similar


def padded(shapes, runs, *, batch_size, patch_size=16):
    """Count the tokens that padding adds to the batches of runs, as a pipeline cuts them."""
    wasted = 0
    for run in runs:
        batch = []
        for place in run:
            rows, steps = shapes[place]
            if sum(r for r, _ in batch) >= batch_size:
                batch = []
            batch.append((rows, -(-steps // patch_size)))
            if place == run[-1] or sum(r for r, _ in batch) >= batch_size:
                longest = max(tokens for _, tokens in batch)
                wasted += sum(r * (longest - tokens) for r, tokens in batch)
    return wasted


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_every_series_is_in_one_run_and_short_ones_are_hardly_padded(batch_size):
    rng = np.random.default_rng(0)
    shapes = [(int(rows), int(steps)) for rows, steps in rng.integers(1, [4, 8192], (900, 2))]
    runs = runs_of_similar(shapes, batch_size=batch_size, patch_size=16)
    assert sorted(place for run in runs for place in run) == list(range(900))
    whole = sum(rows * -(-steps // 16) for rows, steps in shapes)
    assert padded(shapes, runs, batch_size=batch_size) < 0.1 * whole
    assert padded(shapes, [list(range(900))], batch_size=256) > 0.3 * whole  # what the order of a file would cost


def test_groups_of_equal_size_stand_together():
    shapes = [(1 + place % 3, 100) for place in range(12)]
    (run,) = runs_of_similar(shapes, batch_size=256, patch_size=16)
    assert [shapes[place][0] for place in run] == [1] * 4 + [2] * 4 + [3] * 4


def test_one_long_series_is_not_worth_padding_many_short_ones_for():
    shapes = [(1, 32)] * 100 + [(1, 512)]
    runs = runs_of_similar(shapes, batch_size=256, patch_size=16)
    assert [len(run) for run in runs] == [100, 1]
    few = [(1, 32)] * (PADDING // 30 - 1) + [(1, 512)]
    assert len(runs_of_similar(few, batch_size=256, patch_size=16)) == 1  # a batch of its own would cost more
