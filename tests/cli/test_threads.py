"""Threads follow the processors of a process; control groups are files here."""

import os
import subprocess
import sys

import pytest
import torch

from chronomoe.cli import threads
from chronomoe.cli.threads import limit_threads, usable_cpus


@pytest.fixture
def eight(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)


def groups(folder, membership, limits):
    """Write what the kernel would: the groups of a process, and the limits of groups by path."""
    (folder / "membership").write_text(membership)
    for path, text in limits.items():
        file = folder / "groups" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder / "groups", folder / "membership"


V1 = "5:memory:/box\n4:cpu,cpuacct:/box\n"


@pytest.mark.parametrize(
    ("membership", "limits", "expected"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, 8),
        ("0::/pod/box\n", {"pod/cpu.max": "300000 100000\n", "pod/box/cpu.max": "max 100000\n"}, 3),
        ("0::/pod/box\n", {"pod/cpu.max": "300000 100000\n", "pod/box/cpu.max": "200000 100000\n"}, 2),
        (V1, {"cpu/box/cpu.cfs_quota_us": "400000\n", "cpu/box/cpu.cfs_period_us": "100000\n"}, 4),
        (V1, {"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "50000\n"}, 3),
        (V1, {"cpu/box/cpu.cfs_quota_us": "-1\n", "cpu/box/cpu.cfs_period_us": "100000\n"}, 8),
        ("0::/\n", {"cpu.max": "damaged"}, 8),
        ("0::/\n", {}, 8),
    ],
)
def test_a_container_s_quota_cuts_the_processors(eight, tmp_path, membership, limits, expected):
    assert usable_cpus(*groups(tmp_path, membership, limits)) == expected


def test_affinity_counts_where_there_is_no_quota(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert usable_cpus(tmp_path, tmp_path / "none") == 2


@pytest.mark.parametrize(("variable", "expected"), [(None, 2), ("OMP_NUM_THREADS", 6), ("MKL_NUM_THREADS", 6)])
def test_torch_gets_no_more_threads_unless_the_user_says_so(monkeypatch, variable, expected):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "6")
    monkeypatch.setattr(threads, "usable_cpus", lambda: 2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(6)
        limit_threads()
        assert torch.get_num_threads() == expected
        torch.set_num_threads(1)
        limit_threads()
        assert torch.get_num_threads() == 1  # never above what it was
    finally:
        torch.set_num_threads(before)


def test_commands_limit_threads_and_help_does_not_import_torch():
    code = (
        "import sys; from chronomoe.cli import threads, app; sys.argv = ['chronomoe', 'predict', *sys.argv[1:]];"
        "threads.limit_threads = app.limit_threads = lambda: print('limited');"
        "\ntry: app.main()\nexcept SystemExit: print('torch' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for arguments, said in (
        (["--help"], "False"),
        (["no-model", "no-file", "--horizon", "1", "--out", "o"], "limited"),
    ):
        argv = [sys.executable, "-c", "import sys; sys.argv[0] = 'chronomoe';" + code, *arguments]
        done = subprocess.run(argv, capture_output=True, text=True, env=env, check=False)
        assert said in done.stdout, done.stderr
