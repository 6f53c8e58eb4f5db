"""Series of many requests in one batch: a queue, and the thread that forecasts."""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from chronomoe.serving.config import ServingConfig

clock = time.monotonic


class QueueFull(Exception):
    """Too many rows wait; ``seconds`` is when a place is likely to be free."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the queue is full; try again in {seconds} s")
        self.seconds = seconds


@dataclass(eq=False)
class Job:
    """A series that waits. Jobs of one ``key`` may share a batch."""

    key: Hashable
    rows: int
    task: Any
    request: Hashable
    future: "asyncio.Future[Any]"
    since: float = field(default_factory=clock)


class Batcher:
    """Forecasts what is submitted, in batches, on a thread of its own.

    The longest waiting series goes first, with those of its key, the oldest first, up to ``max_batch`` rows. A batch
    that is not full waits for ``max_wait_ms`` where the batch before held several requests: a lone client never waits.

    Args:
        run: forecasts tasks of one key, in their order.
        config: sizes.
        observe: is told of each batch: its jobs, when it began, and the seconds it took.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Any]], Sequence[Any]],
        config: ServingConfig,
        *,
        observe: Callable[[Sequence[Job], float, float], None] = lambda jobs, begin, seconds: None,
    ) -> None:
        self.config, self._run, self._observe = config, run, observe
        self._waiting: dict[Hashable, deque[Job]] = {}
        self._changed = threading.Condition()
        self._closing, self._company = False, False
        self._seconds_a_row = 0.0
        self.rows = 0
        self._thread = threading.Thread(target=self._work, name="forecasts", daemon=True)
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all jobs or none.

        Raises:
            QueueFull: there is no room for them.
        """
        rows = sum(job.rows for job in jobs)
        with self._changed:
            if self.rows + rows > self.config.queue:
                raise QueueFull(max(1, math.ceil(self.rows * self._seconds_a_row)))
            for job in jobs:
                self._waiting.setdefault(job.key, deque()).append(job)
            self.rows += rows
            self._changed.notify()

    def close(self) -> None:
        """Forecast what waits, then stop."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while jobs := self._next():
            begin = clock()
            answers = self._answers(jobs)
            seconds = clock() - begin
            rows = sum(job.rows for job in jobs)
            pace = seconds / rows
            self._seconds_a_row = 0.8 * self._seconds_a_row + 0.2 * pace if self._seconds_a_row else pace
            self._observe(jobs, begin, seconds)
            loop = jobs[0].future.get_loop()
            if not loop.is_closed():
                loop.call_soon_threadsafe(_deliver, jobs, answers)

    def _answers(self, jobs: Sequence[Job]) -> Sequence[Any]:
        """Forecast together; if that fails, each alone, so that one series fails no other. Errors stand as answers."""
        try:
            return self._run([job.task for job in jobs])
        except Exception as error:  # whatever it is belongs to a request, and the thread must live
            if len(jobs) == 1:
                return [error]
            return [answer for job in jobs for answer in self._answers([job])]

    def _next(self) -> list[Job]:
        """Wait for jobs; return none to stop."""
        with self._changed:
            while not (self._closing and not self._waiting):
                if not self._waiting:
                    self._changed.wait()
                    continue
                key, queue = min(self._waiting.items(), key=lambda item: item[1][0].since)
                patience = queue[0].since + self.config.max_wait_ms / 1000 - clock()
                full = sum(job.rows for job in queue) >= self.config.max_batch
                if not (self._closing or full or not self._company or patience <= 0):
                    self._changed.wait(patience)
                elif jobs := self._take(key):
                    return jobs
        return []

    def _take(self, key: Hashable) -> list[Job]:
        """Take a batch off a queue, without the jobs that nobody waits for any more."""
        queue, rows = self._waiting[key], 0
        taken: list[Job] = []
        while queue and (not taken or rows + queue[0].rows <= self.config.max_batch):
            job = queue.popleft()
            self.rows -= job.rows
            if not job.future.cancelled():
                taken.append(job)
                rows += job.rows
        if not queue:
            del self._waiting[key]
        self._company = len({job.request for job in taken}) > 1
        return taken


def _deliver(jobs: Sequence[Job], answers: Sequence[Any]) -> None:
    for job, answer in zip(jobs, answers, strict=True):
        if not job.future.done():
            if isinstance(answer, Exception):
                job.future.set_exception(answer)
            else:
                job.future.set_result(answer)
