"""How many threads torch may use: no more than the processors that this process has."""

import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
"""Which control groups this process is in."""


def limit_threads() -> None:
    """Give torch at most as many threads as there are processors to use; ``OMP_NUM_THREADS`` has the last word."""
    import torch

    if not os.environ.keys() & {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}:
        torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))


def usable_cpus(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Return how many processors this process may keep busy, at least 1.

    Those of its CPU affinity, cut to the quota of its control group (v1 or v2) or of any above it: threads beyond a
    container's quota only wait for their next share of time.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cpus, *(int(quota) for quota in _quotas(cgroups, membership))]))


def _quotas(cgroups: Path, membership: Path) -> Iterator[float]:
    for line in membership.read_text().splitlines() if membership.exists() else []:
        _, controllers, group = line.split(":", maxsplit=2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        own = cgroups / ("cpu" if controllers else "") / group.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(cgroups) and (share := _share(folder)) is not None:
                yield share


def _share(folder: Path) -> float | None:
    """Return the processors that a control group may keep busy; None without a limit: no file, "max" or -1."""
    newer = folder / "cpu.max"
    files = [newer] if newer.exists() else [folder / f"cpu.cfs_{part}_us" for part in ("quota", "period")]
    try:
        quota, period = " ".join(file.read_text() for file in files).split()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):
        return None
