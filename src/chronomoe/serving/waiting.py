"""Which of the series that wait are forecast next: no threads, and no clock of its own."""

import heapq
import itertools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from chronomoe.serving.config import ServingConfig

FORGET = 0.8
"""What a batch leaves of those before it in the measured pace."""
LEAST = 8
"""Rows that a batch may have whatever they take: with fewer, most of a batch's time is what it takes in any case."""


class QueueFull(Exception):
    """Too many rows wait; ``seconds`` is when a place is likely to be free."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the queue is full; try again in {seconds} s")
        self.seconds = seconds


@dataclass(eq=False)
class Job:
    """A series that waits ``since`` a time. Jobs of one ``key`` may share a batch."""

    key: Hashable
    rows: int
    task: Any
    request: Hashable
    future: Any
    """Has ``cancelled()``."""
    since: float = 0.0


class Waiting:
    """The queue. Whoever is due first goes first, with those of its key, as many rows as a batch may have.

    A series is due when it comes, each further one of its request later by the time of a forecast: a request of many
    series counts like its series sent one after the other. It holds up nobody for long, and nobody holds it up for
    ever. That is start-time fair queueing (Goyal, Vin & Cheng, 1997, https://doi.org/10.1109/90.649569).
    """

    def __init__(self, config: ServingConfig) -> None:
        self.config, self.rows = config, 0
        self._queues: dict[Hashable, list[tuple[float, int, Job]]] = {}
        self._number = itertools.count()
        self._spent: dict[Hashable, tuple[float, float]] = {}  # seconds and rows of a key's batches, the last ones most
        self._company = False

    def __bool__(self) -> bool:
        return bool(self._queues)

    def add(self, jobs: Sequence[Job], *, now: float) -> None:
        """Queue all jobs of a request or none.

        Raises:
            QueueFull: there is no room for them.
        """
        rows = sum(job.rows for job in jobs)
        if self.rows + rows > self.config.queue:
            pending = (job for queue in self._queues.values() for *_, job in queue)
            raise QueueFull(max(1, math.ceil(sum(self._seconds(job) for job in pending))))
        due = now
        for job in jobs:
            job.since = now
            heapq.heappush(self._queues.setdefault(job.key, []), (due, next(self._number), job))
            due += self._seconds(job)
        self.rows += rows

    def next(self, *, now: float, idle: int, closing: bool = False) -> list[Job] | float:
        """Take a batch, or say how many seconds to wait for one.

        A batch that is not full waits for others where the one before held several requests, not while ``closing``.

        Args:
            now: the time.
            idle: batches that could begin now; they share what waits.
            closing: whether nothing more will come.
        """
        while self._queues:
            key, queue = min(self._queues.items(), key=lambda item: item[1][0])
            limit = self._limit(key)
            rows = sum(job.rows for *_, job in queue)
            patience = queue[0][2].since + self.config.max_wait_ms / 1000 - now
            if self._company and rows < limit and patience > 0 and not closing:
                return patience
            share = max(1, idle - len(self._queues) + 1)
            if jobs := self._take(key, min(limit, math.ceil(rows / share))):
                self._company = len({job.request for job in jobs}) > 1
                return jobs
        return math.inf

    def done(self, jobs: Sequence[Job], seconds: float) -> None:
        """Learn the pace from what a batch took."""
        before, rows = self._spent.get(jobs[0].key, (0.0, 0.0))
        self._spent[jobs[0].key] = FORGET * before + seconds, FORGET * rows + sum(job.rows for job in jobs)

    def _seconds(self, job: Job) -> float:
        seconds, rows = self._spent.get(job.key, (0.0, 1.0))
        return job.rows * seconds / rows / self.config.parallel

    def _limit(self, key: Hashable) -> int:
        seconds, rows = self._spent.get(key, (0.0, 1.0))
        fit = self.config.max_batch_ms / 1000 * rows / seconds if seconds else math.inf
        return int(min(self.config.max_batch, max(LEAST, fit)))

    def _take(self, key: Hashable, limit: int) -> list[Job]:
        """Take jobs of a key, those that nobody waits for any more out of the queue and not along."""
        queue, rows = self._queues[key], 0
        taken: list[Job] = []
        while queue and (not taken or rows + queue[0][2].rows <= limit):
            *_, job = heapq.heappop(queue)
            self.rows -= job.rows
            if not job.future.cancelled():
                taken.append(job)
                rows += job.rows
        if not queue:
            del self._queues[key]
        return taken
