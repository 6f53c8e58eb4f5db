"""Series of many requests in one batch: a queue, and the threads that forecast."""

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from chronomoe.serving.config import ServingConfig
from chronomoe.serving.waiting import Job, Waiting

clock = time.monotonic


class Batcher:
    """Forecasts what is submitted, in batches, as many at once as the configuration says, on threads of its own.

    Args:
        run: forecasts tasks of one key, in their order; several threads call it.
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
        self._run, self._observe = run, observe
        self._waiting, self._changed = Waiting(config), threading.Condition()
        self._closing, self._idle = False, config.parallel
        self._threads = [
            threading.Thread(target=self._work, name=f"forecasts-{index}", daemon=True)
            for index in range(config.parallel)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def rows(self) -> int:
        """How many wait."""
        return self._waiting.rows

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all jobs of a request or none.

        Raises:
            QueueFull: there is no room for them.
        """
        with self._changed:
            self._waiting.add(jobs, now=clock())
            self._changed.notify_all()

    def close(self) -> None:
        """Forecast what waits, then stop."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while jobs := self._next():
            begin = clock()
            answers = self._answers(jobs)
            seconds = clock() - begin
            with self._changed:
                self._waiting.done(jobs, seconds)
                self._idle += 1
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
            while self._waiting or not self._closing:
                found = self._waiting.next(now=clock(), idle=self._idle, closing=self._closing)
                if isinstance(found, list):
                    self._idle -= 1
                    return found
                if self._waiting or not self._closing:
                    self._changed.wait(None if found == math.inf else found)
        return []


def _deliver(jobs: Sequence[Job], answers: Sequence[Any]) -> None:
    for job, answer in zip(jobs, answers, strict=True):
        if not job.future.done():
            if isinstance(answer, Exception):
                job.future.set_exception(answer)
            else:
                job.future.set_result(answer)
