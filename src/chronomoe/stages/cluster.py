"""Work spread over a Ray cluster: each worker loads what it needs once, and a lost one costs the item it was at."""

import logging
import os
import reprlib
import socket
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from chronomoe.errors import InputError, extra

ENGINES = ("local", "ray")
ATTEMPTS = 3
"""Workers that one item may end before it is taken for the cause."""
Found = TypeVar("Found", covariant=True)


@runtime_checkable
class Task(Protocol[Found]):
    """What every worker gets a copy of, by pickle."""

    def prepare(self) -> None:
        """Load what is needed for all items."""
        ...

    def __call__(self, item: Any, /) -> Found:
        """Do one item; after a lost worker another one does it again, from the start."""
        ...


class _Worker:
    """One process of one core."""

    def __init__(self, task: Task[Any]) -> None:
        torch.set_num_threads(1)  # sums in one order wherever it runs
        self.task = task

    def prepare(self) -> None:
        self.task.prepare()

    def do(self, item: Any) -> Any:
        return self.task(item)


def check_engine(engine: str, workers: int | None) -> None:
    """Refuse an engine that is not known, or workers that it has not.

    Raises:
        InputError: that, or Ray is not installed.
    """
    if engine not in ENGINES:
        raise InputError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if engine == "local" and workers is not None:
        raise InputError(f"workers are those of the engine ray, got {workers} of {engine!r}; pass engine ray")
    if workers is not None and workers < 1:
        raise InputError(f"workers must be at least 1, got {workers}")
    if engine == "ray":
        with extra("ray"):
            import ray  # noqa: F401


def spread(
    task: Task[Found], items: Sequence[Any], *, workers: int | None = None, gpu: bool = False
) -> Generator[tuple[int, Found], None, None]:
    """Yield the number of every item and what ``task`` makes of it, in the order in which they are finished.

    Joins the cluster that RAY_ADDRESS names or that runs on this machine, and else starts one here. An item is handed
    only to a worker that is ready; where one is lost, with its machine or alone, its item goes back to the others and
    another worker is asked for. Ray's own pools hold an item until its worker is back, and start one that a lack of
    memory ends again and again.

    Args:
        task: is copied to each worker.
        items: each is taken when it is handed out, and again where its worker is lost.
        workers: how many; by default one a core of the cluster. More than it has room for wait until it grows.
        gpu: whether each needs a GPU.

    Raises:
        InputError: ``task`` raised it, one item ended several workers, or no cluster answers.
    """
    with extra("ray"):
        import ray
        from ray.exceptions import RayError, RayTaskError
    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            _knock(os.environ.get("RAY_ADDRESS", ""))
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except OSError as error:
            raise InputError(
                f"no Ray cluster answers at {os.environ.get('RAY_ADDRESS', 'auto')!r} ({error}); start one with "
                "ray start --head, or unset RAY_ADDRESS to use the cores of this machine"
            ) from None
    remote, copied = ray.remote(num_cpus=1, num_gpus=int(gpu))(_Worker), ray.put(task)
    count = min(workers or max(1, int(ray.cluster_resources().get("CPU", 1))), len(items))
    waiting, ended = deque(range(len(items))), Counter[int | None]()
    busy: dict[Any, tuple[Any, int | None]] = {}

    def start() -> None:
        worker = remote.remote(copied)
        busy[worker.prepare.remote()] = worker, None

    try:
        for _ in range(count):
            start()
        while waiting or any(item is not None for _, item in busy.values()):
            (done,), _ = ray.wait(list(busy), num_returns=1)
            worker, item = busy.pop(done)
            try:
                found = ray.get(done)
            except RayTaskError as error:  # of our code
                raise (error.cause if isinstance(error.cause, InputError) else error) from None
            except RayError as error:
                ended[item] += 1
                if ended[item] == ATTEMPTS:
                    what = "starting" if item is None else f"item {reprlib.repr(items[item])}"
                    reason = str(error).strip().splitlines()[-1].strip()
                    raise InputError(
                        f"{what} ended {ATTEMPTS} workers ({reason}), as too little memory does, or a machine without "
                        "chronomoe; what was finished stays: take smaller parts or fewer workers and run the same again"
                    ) from error
                if item is not None:
                    waiting.appendleft(item)
                start()
                continue
            ended[None] = 0
            if waiting:
                following = waiting.popleft()
                busy[worker.do.remote(items[following])] = worker, following
            if item is not None:
                yield item, found
    finally:
        for worker, _ in busy.values():
            ray.kill(worker)
        if started:
            ray.shutdown()


def in_order(
    task: Task[Found], items: Sequence[Any], *, workers: int | None = None, gpu: bool = False
) -> Iterator[Found]:
    """Yield what ``spread`` does in the order of the items, as ``map`` would."""
    early: dict[int, Found] = {}
    with closing(spread(task, items, workers=workers, gpu=gpu)) as answers:
        following = 0
        for number, found in answers:
            early[number] = found
            while following in early:
                yield early.pop(following)
                following += 1


def _knock(address: str) -> None:
    """Ask in seconds whether anyone listens where a cluster should: Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()
