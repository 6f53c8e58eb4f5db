"""Who waits for how long, in simulated time: 70 % load, and single series beside requests of many."""

from concurrent.futures import Future

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from chronomoe.serving.config import ServingConfig
from chronomoe.serving.waiting import LEAST, Job, QueueFull, Waiting
from queue_simulation import Batches, percentile, poisson, simulate

BOTH_CORES = Batches(call=0.009, row=0.004)
"""Of a K = 1 mixture of slim students of full size, HTTP included: 13 ms alone, 233 requests a second of 32 clients."""
ONE_CORE = Batches(call=0.0075, row=0.0059)
TOGETHER = 32
"""Clients, each with one request under way, whose rate is full load."""


def p99(arrivals, batches, config, *, name="r"):
    found = simulate(arrivals, batches, config)
    return percentile([seconds for request, seconds in found.items() if request.startswith(name)], 0.99)


def jobs(number, *, request="r", key="k", rows=1):
    return [Job(key, rows, None, request, Future()) for _ in range(number)]


def learned(seconds_a_row, **options):
    """Return a queue that has seen a batch."""
    waiting = Waiting(ServingConfig(**options))
    waiting.done(jobs(10), 10 * seconds_a_row)
    return waiting


def sizes(waiting, *, idle=1):
    found = []
    while waiting:
        found.append(len(waiting.next(now=100.0, idle=idle)))
    return found


def test_two_batches_at_once_on_a_core_each_answer_sooner_than_one_on_both():
    rate = 0.7 * BOTH_CORES.rate(TOGETHER)
    arrivals = poisson(rate, requests=4000)
    one = p99(arrivals, BOTH_CORES, ServingConfig())
    assert 6 < one / BOTH_CORES.lone < 9  # arrivals at random do that: no choice of batches changes it
    assert p99(arrivals, ONE_CORE, ServingConfig(parallel=2)) < 0.8 * one


def test_single_series_wait_for_two_batches_and_not_for_all_of_a_large_request():
    bulk = [(0.3 + 1.5 * index, f"bulk{index}", 256) for index in range(40)]
    arrivals = bulk + poisson(20, requests=1000)
    longest = ServingConfig().max_batch_ms / 1000
    assert p99(arrivals, BOTH_CORES, ServingConfig()) < 2 * longest
    found = simulate(arrivals, BOTH_CORES, ServingConfig())
    assert max(found[name] for _, name, _ in bulk) < 1.3 * BOTH_CORES.seconds(256)


def test_a_large_request_is_not_held_up_for_ever_by_single_series():
    arrivals = [(0.5, "bulk", 256), *poisson(0.9 * BOTH_CORES.rate(TOGETHER), requests=4000)]
    assert simulate(arrivals, BOTH_CORES, ServingConfig(queue=4096))["bulk"] < 8


def test_a_batch_holds_what_fits_in_its_time():
    waiting = learned(0.005, max_batch_ms=100)
    waiting.add(jobs(70), now=0.0)
    assert sizes(waiting) == [20, 20, 20, 10]


def test_a_slow_model_still_gets_batches():
    waiting = learned(5.0, max_batch_ms=100)
    waiting.add(jobs(20), now=0.0)
    assert sizes(waiting) == [LEAST, LEAST, 20 - 2 * LEAST]
    waiting = learned(5.0, max_batch_ms=100, max_batch=2)
    waiting.add(jobs(3), now=0.0)
    assert sizes(waiting) == [2, 1]


def test_idle_threads_share_what_waits():
    waiting = Waiting(ServingConfig(parallel=4))
    waiting.add(jobs(9), now=0.0)
    assert [len(waiting.next(now=0.0, idle=idle)) for idle in (4, 3, 2, 1)] == [3, 2, 2, 2]
    waiting.add(jobs(4, key="a") + jobs(4, key="b"), now=0.0)
    assert [len(waiting.next(now=100.0, idle=idle)) for idle in (2, 1)] == [4, 4]


def test_the_series_of_a_request_are_due_one_after_the_other_in_the_time_that_they_take():
    waiting = learned(0.01, max_batch_ms=40, max_batch=4)
    waiting.add(jobs(8, request="bulk"), now=0.0)
    waiting.add(jobs(1, request="early"), now=0.015)
    waiting.add(jobs(1, request="late", key="other"), now=0.045)
    order = [[job.request for job in waiting.next(now=1.0, idle=1)] for _ in range(4)]
    assert order == [["bulk", "bulk", "early", "bulk"], ["bulk"] * 4, ["late"], ["bulk"]]


def test_a_full_queue_is_free_again_after_what_waits_has_been_forecast():
    for parallel, seconds in ((1, 4), (2, 2)):
        waiting = learned(0.5, queue=10, parallel=parallel)
        waiting.add(jobs(8), now=0.0)
        with pytest.raises(QueueFull) as refused:
            waiting.add(jobs(3), now=0.0)
        assert refused.value.seconds == seconds
        assert waiting.rows == 8
