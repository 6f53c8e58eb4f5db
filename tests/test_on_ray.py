"""A real cluster of two workers of one core: the bits of one machine, whoever is killed."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from chronomoe.data.soft_targets import SoftTargetStore
from chronomoe.data.windows import TrainingWindows, WindowConfig
from chronomoe.errors import InputError
from chronomoe.models.chronos2 import use_exact_group_attention
from chronomoe.predict.files import Forecaster
from chronomoe.predict.parts import DONE, UNFINISHED, predict_parts
from chronomoe.stages import cluster
from sample_series import sample_domain

ray = pytest.importorskip("ray", reason="needs the extra ray")
HORIZON, PARTS, SERIES = 16, 6, 40


@pytest.fixture(scope="module")
def two_cores():
    """A cluster of two cores."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    found = ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", found.address_info["gcs_address"])  # of processes that tests start
        yield
    ray.shutdown()


@pytest.fixture
def doubling():
    """A task for workers, which cannot import it from here; a negative number ends its process."""

    class Doubling:
        def prepare(self):
            self.ready = True

        def __call__(self, number, /):
            assert self.ready
            if number < 0:
                os._exit(1)
            return number * 2

    return Doubling()


@pytest.fixture(scope="module")
def forecaster(teacher_folder):
    return Forecaster(str(teacher_folder), horizon=HORIZON)


@pytest.fixture(scope="module")
def folder(make_frame, tmp_path_factory):
    """Parts that take a worker long enough to be killed at one."""
    found = tmp_path_factory.mktemp("past")
    for number in range(PARTS):
        frame = make_frame(SERIES, 200, seed=number)
        frame.assign(item_id=f"{number}-" + frame.item_id).to_parquet(found / f"part-{number}.parquet", index=False)
    return found


@pytest.fixture(scope="module")
def want(forecaster, folder, tmp_path_factory):
    """What one process writes."""
    out = tmp_path_factory.mktemp("want") / "out"
    predict_parts(forecaster, folder, out)
    return contents(out)


def contents(out):
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.parquet"))}


def wait_for(find, seconds=120):
    """Return the first true value of ``find``."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := find():
            return found
        time.sleep(0.002)
    raise TimeoutError


def at_work(out):
    """List the processes of workers that are at a part, which the names of their folders tell."""
    return [int(path.name.split(".")[-2]) for path in (out / UNFINISHED).glob("part-*")]


def test_a_worker_that_is_killed_at_a_part_costs_nothing_but_time(two_cores, forecaster, folder, want, tmp_path):
    out, killed = tmp_path / "out", []

    def kill():
        killed.extend(wait_for(lambda: at_work(out))[:1])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    rows = predict_parts(forecaster, folder, out, engine="ray", workers=2)
    killer.join()
    assert not psutil.pid_exists(killed[0])
    assert rows == HORIZON * SERIES * PARTS
    assert contents(out) == want
    assert (out / DONE).exists()
    assert not (out / UNFINISHED).exists()


def test_a_killed_job_goes_on_where_it_was(two_cores, forecaster, folder, want, tmp_path):
    out = tmp_path / "out"
    words = ["predict", forecaster.model, folder, "--horizon", HORIZON, "--out", out, "--engine", "ray", "--workers", 1]
    command = [sys.executable, "-m", "chronomoe", *map(str, words)]
    with subprocess.Popen(command) as job:
        wait_for(lambda: len(contents(out)) >= 2)
        job.kill()
    assert not (out / DONE).exists()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    predict_parts(forecaster, folder, out, engine="ray", workers=1)
    assert contents(out) == want
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def test_labels_of_a_worker_that_is_killed_are_those_of_this_process(two_cores, make_teacher, tmp_path):
    teacher = use_exact_group_attention(make_teacher())
    domains = [sample_domain("wave"), sample_domain("spikes", variates=2, past_only=("p",), known=("k",))]
    windows = TrainingWindows(domains, WindowConfig(context_length=64, horizon=20), size=11, seed=0)
    killed = []

    def kill_once(done, total):
        if not killed:
            here = psutil.Process().children(recursive=True)
            killed.append(next(process for process in here if "_Worker" in " ".join(process.cmdline())))
            killed[0].kill()

    elsewhere = functools.partial(cluster.in_order, workers=1)
    for name, options in {"here": {}, "there": {"engine": elsewhere, "progress": kill_once}}.items():
        SoftTargetStore.build(tmp_path / name, teacher, windows, batch_size=2, **options)
    here, there = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("here", "there"))
    assert killed
    assert here == there


def test_an_item_that_ends_every_worker_is_named(two_cores, doubling, monkeypatch):
    monkeypatch.setattr(cluster, "ATTEMPTS", 1)
    found = cluster.spread(doubling, [1, -1], workers=1)
    assert next(found) == (0, 2)
    with pytest.raises(InputError, match="item -1 ended 1 workers .* as too little memory does"):
        next(found)


def test_a_mistake_in_a_part_is_that_of_the_command(two_cores, folder, teacher_folder, tmp_path):
    wrong = Forecaster(str(teacher_folder), horizon=HORIZON, target=["load"])
    with pytest.raises(InputError, match="^part 'part-.': missing column 'load'"):
        predict_parts(wrong, folder, tmp_path / "out", engine="ray", workers=1)


def test_a_cluster_that_does_not_answer_is_refused_soon(two_cores, doubling, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(InputError, match="no Ray cluster answers at '127.0.0.1:1' .*; start one with ray start --head"):
        next(cluster.spread(doubling, [1]))
