"""The server's queue in simulated time: requests come, and batches take what they are said to take."""

import heapq
import random
from concurrent.futures import Future
from typing import NamedTuple

from chronomoe.serving.waiting import Job, Waiting


class Batches(NamedTuple):
    """What a batch costs, in seconds, and how many are computed at once."""

    call: float
    row: float

    def seconds(self, rows):
        return self.call + self.row * rows

    @property
    def lone(self):
        return self.seconds(1)

    def rate(self, clients, parallel=1):
        """Return requests a second of clients that ask one after the other."""
        return clients / self.seconds(clients / parallel)


def poisson(rate, *, requests, series=1, name="r", seed=0):
    """Return arrivals: their time, a name and the number of their series."""
    chance, time, arrivals = random.Random(seed), 0.0, []
    for index in range(requests):
        time += chance.expovariate(rate)
        arrivals.append((time, f"{name}{index}", series))
    return arrivals


def simulate(arrivals, batches, config):
    """Return the seconds from arrival to the end of the last batch, of each request by name."""
    waiting, left, begun, ended = Waiting(config), {}, {}, {}
    events = [(time, 0, index, ("arrive", name, series)) for index, (time, name, series) in enumerate(sorted(arrivals))]
    heapq.heapify(events)
    idle, number = config.parallel, len(events)
    while events:
        now, _, _, (what, *facts) = heapq.heappop(events)
        if what == "arrive":
            name, series = facts
            left[name], begun[name] = series, now
            waiting.add([Job("k", 1, None, name, Future()) for _ in range(series)], now=now)
        elif what == "end":
            jobs, seconds = facts
            waiting.done(jobs, seconds)
            idle += 1
            for job in jobs:
                left[job.request] -= 1
                if not left[job.request]:
                    ended[job.request] = now - begun[job.request]
        while idle and waiting:
            found = waiting.next(now=now, idle=idle)
            number += 1
            if not isinstance(found, list):
                heapq.heappush(events, (now + found + 1e-9, 1, number, ("look",)))
                break
            idle -= 1
            seconds = batches.seconds(len(found))
            heapq.heappush(events, (now + seconds, 1, number, ("end", found, seconds)))
    return ended


def percentile(seconds, share):
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
