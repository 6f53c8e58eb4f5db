"""A batch holds what waits and fits together; nothing is lost, and nobody waits longer than the latency budget."""

import asyncio
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from chronomoe.serving.batching import Batcher
from chronomoe.serving.config import ServingConfig
from chronomoe.serving.waiting import Job, QueueFull


class Forecaster:
    """Answers tasks with themselves, notes its batches, and can be held up."""

    def __init__(self, *, fails_on=None):
        self.batches, self.fails_on = [], fails_on
        self.free = threading.Event()
        self.free.set()

    def __call__(self, tasks):
        self.free.wait(10)
        if self.fails_on in tasks:
            raise ValueError(f"cannot forecast {self.fails_on}")
        self.batches.append(list(tasks))
        return list(tasks)


def serve(forecaster, play, **options):
    """Run a play with a batcher and what submits to it."""

    async def main():
        batcher = Batcher(forecaster, ServingConfig(**{"max_wait_ms": 0} | options))
        loop = asyncio.get_running_loop()

        def submit(*tasks, key="k", rows=1):
            request = object()
            jobs = [Job(key, rows, task, request, loop.create_future()) for task in tasks]
            batcher.submit(jobs)
            return [job.future for job in jobs]

        try:
            return await play(batcher, submit)
        finally:
            forecaster.free.set()
            await asyncio.to_thread(batcher.close)

    return asyncio.run(main())


async def busy(forecaster, submit):
    """Let the thread take a first job and hold it there."""
    forecaster.free.clear()
    first = submit("first")
    await asyncio.sleep(0.05)
    return first


def test_requests_that_wait_share_a_batch_up_to_its_size():
    forecaster = Forecaster()

    async def play(batcher, submit):
        futures = await busy(forecaster, submit)
        for task in range(5):
            futures += submit(task)
        forecaster.free.set()
        return await asyncio.gather(*futures)

    assert serve(forecaster, play, max_batch=3) == ["first", 0, 1, 2, 3, 4]
    assert forecaster.batches == [["first"], [0, 1, 2], [3, 4]]


def test_only_jobs_of_one_key_share_a_batch_and_the_longest_waiting_goes_first():
    forecaster = Forecaster()

    async def play(batcher, submit):
        futures = await busy(forecaster, submit)
        for task, key in enumerate("abab"):
            futures += submit(task, key=key)
        forecaster.free.set()
        await asyncio.gather(*futures)

    serve(forecaster, play)
    assert forecaster.batches == [["first"], [0, 2], [1, 3]]


def test_a_series_of_many_rows_counts_as_many():
    forecaster = Forecaster()

    async def play(batcher, submit):
        futures = await busy(forecaster, submit)
        futures += submit("wide", rows=3) + submit("also", rows=2)
        forecaster.free.set()
        await asyncio.gather(*futures)

    serve(forecaster, play, max_batch=4)
    assert forecaster.batches == [["first"], ["wide"], ["also"]]


def test_a_lone_client_never_waits_for_company():
    async def play(batcher, submit):
        begin = time.monotonic()
        for _ in range(3):
            await asyncio.gather(*submit("several", "series"))
        return time.monotonic() - begin

    assert serve(Forecaster(), play, max_wait_ms=5000) < 4


def test_after_a_shared_batch_the_next_waits_for_others_within_its_budget():
    forecaster = Forecaster()

    async def play(batcher, submit):
        futures = await busy(forecaster, submit)
        futures += submit(0) + submit(1)
        forecaster.free.set()
        await asyncio.gather(*futures)
        early = submit(2)
        await asyncio.sleep(0.05)
        await asyncio.gather(*early, *submit(3))

    serve(forecaster, play, max_wait_ms=400)
    assert forecaster.batches == [["first"], [0, 1], [2, 3]]


def test_a_full_queue_refuses_all_of_a_request_and_says_when_to_try_again():
    forecaster = Forecaster()

    async def play(batcher, submit):
        futures = await busy(forecaster, submit)
        futures += submit(0, 1)
        with pytest.raises(QueueFull) as refused:
            submit(2, 3)
        assert refused.value.seconds >= 1
        futures += submit(4)
        forecaster.free.set()
        return await asyncio.gather(*futures)

    assert serve(forecaster, play, queue=3) == ["first", 0, 1, 4]


def test_one_series_that_fails_fails_no_other():
    forecaster = Forecaster(fails_on=1)

    async def play(batcher, submit):
        futures = await busy(forecaster, submit)
        futures += submit(0) + submit(1) + submit(2)
        forecaster.free.set()
        return await asyncio.gather(*futures, return_exceptions=True)

    first, zero, one, two = serve(forecaster, play)
    assert (first, zero, two) == ("first", 0, 2)
    assert str(one) == "cannot forecast 1"


def test_what_nobody_waits_for_any_more_is_not_forecast():
    forecaster = Forecaster()

    async def play(batcher, submit):
        futures = await busy(forecaster, submit)
        gone, stays = submit("gone", "stays")
        gone.cancel()
        forecaster.free.set()
        await asyncio.gather(*futures, stays)
        assert batcher.rows == 0

    serve(forecaster, play)
    assert forecaster.batches == [["first"], ["stays"]]


def test_closing_forecasts_what_waits():
    forecaster = Forecaster()

    async def play(batcher, submit):
        futures = await busy(forecaster, submit)
        futures += submit(0, 1) + submit(2, key="other")
        closing = asyncio.create_task(asyncio.to_thread(batcher.close))
        forecaster.free.set()
        await closing
        return await asyncio.gather(*futures)

    assert serve(forecaster, play, max_wait_ms=5000) == ["first", 0, 1, 2]
