"""A stop or a restart under load loses nothing accepted, in one process and in several."""

import http.client
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("fastapi_offline", reason="needs the extra serve")

from chronomoe import ChronoMoEPipeline
from http_server import Client, one_series

NOT_ACCEPTED = (ConnectionRefusedError, ConnectionResetError, http.client.RemoteDisconnected, BrokenPipeError)


class Process:
    """``chronomoe serve`` in a process of its own."""

    def __init__(self, folder, *options):
        command = [sys.executable, "-m", "chronomoe", "serve", f"moe={folder}", "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines = []
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"serving moe at http://127.0.0.1:(\d+)", line):
                break
        else:
            pytest.fail("".join(self.lines))
        self.ask = Client(int(found[1]))
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True)
        self.reader.start()
        for _ in range(600):
            try:
                if self.ask.get("/v2/health/ready").status == 200:
                    return
            except NOT_ACCEPTED:
                time.sleep(0.1)
        pytest.fail("".join(self.lines))

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(120)
        self.reader.join(10)

    def counts(self):
        """Return what all processes accepted and answered."""
        pairs = re.findall(r"stopped: (\d+) accepted, (\d+) answered", "".join(self.lines))
        return tuple(sum(int(number) for number in side) for side in zip(*pairs, strict=True))


class Load:
    """Clients that ask one request after the other until told to stop, or refused."""

    def __init__(self, ask, clients=6):
        self.ask, self.going, self.replies, self.refused = ask, True, [], 0
        self.threads = [threading.Thread(target=self.run) for _ in range(clients)]
        for thread in self.threads:
            thread.start()

    def run(self):
        body = one_series([1.0, 5.0, 2.0, 4.0] * 20)
        while self.going:
            try:
                self.replies.append(self.ask.forecast(body))
            except NOT_ACCEPTED:
                self.refused += 1
                time.sleep(0.02)

    def end(self):
        self.going = False
        for thread in self.threads:
            thread.join(60)
        return self.replies

    def wait(self, more):
        enough = len(self.replies) + more
        for _ in range(1200):
            if len(self.replies) >= enough:
                return
            time.sleep(0.05)
        pytest.fail("the server no longer answers")


@pytest.fixture(scope="module")
def folder(make_teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "model"
    ChronoMoEPipeline(make_teacher(num_layers=1)).save_pretrained(folder)
    return folder


def test_a_stop_under_load_answers_all_that_was_accepted(folder):
    server = Process(folder, "--drain-s", "2")
    load = Load(server.ask)
    load.wait(20)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    ready = server.ask.get("/v2/health/ready")
    server.process.wait(120)
    server.reader.join(10)
    replies = load.end()
    assert (ready.status, ready.headers["connection"]) == (503, "close"), "load balancers turn away first"
    assert {reply.status for reply in replies} == {200}
    assert server.counts() == (len(replies), len(replies)), "".join(server.lines)


def test_workers_restart_one_by_one_under_load_and_add_up_their_metrics(folder):
    server = Process(folder, "--workers", "2", "--drain-s", "0.5")
    load = Load(server.ask)
    load.wait(40)
    server.process.send_signal(signal.SIGHUP)
    for _ in range(1200):
        if sum("stopped:" in line for line in server.lines) == 2:
            break
        time.sleep(0.05)
    load.wait(20)
    replies = load.end()
    text = server.ask.get("/metrics").body.decode()
    server.stop()
    assert {reply.status for reply in replies} == {200}
    assert re.search(rf'chronomoe_requests_total{{model="moe",status="200"}} {len(replies)}.0', text), text[:3000]
    assert sum("stopped:" in line for line in server.lines) == 4
    assert server.counts() == (len(replies), len(replies)), "".join(server.lines)


def test_a_taken_port_a_missing_model_and_two_of_one_name_are_one_line(folder):
    server = Process(folder)
    port = str(server.ask.port)
    wrong = {
        f"cannot listen at 127.0.0.1:{port}": [f"moe={folder}", "--port", port],
        "no checkpoint 'nowhere'": ["nowhere"],
        "every model needs a name of its own": [str(folder), str(folder)],
        "queue must be at least 1, got 0": [str(folder), "--queue", "0"],
    }
    for message, options in wrong.items():
        command = [sys.executable, "-m", "chronomoe", "serve", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
    server.stop()
