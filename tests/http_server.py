"""A server in this process, and asking it over real HTTP."""

import contextlib
import http.client
import json
import socket
import threading
from typing import NamedTuple

import uvicorn


class Reply(NamedTuple):
    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)


class Client:
    """Sends one request a connection, and is safe to share between threads."""

    def __init__(self, port, host="127.0.0.1"):
        self.host, self.port = host, port

    def __call__(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            reply = connection.getresponse()
            found = {name.lower(): value for name, value in reply.getheaders()}
            return Reply(reply.status, found, reply.read())
        finally:
            connection.close()

    def get(self, path):
        return self("GET", path)

    def forecast(self, request, *, kind="application/json", **headers):
        body = request if isinstance(request, bytes) else json.dumps(request)
        return self("POST", "/v1/timeseries/forecast", body, Content_Type=kind, **headers)


@contextlib.contextmanager
def running(app):
    """Serve an app on a free port."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    client = Client(listening.getsockname()[1])
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    yield client
    server.should_exit = True
    thread.join(30)
    listening.close()
    assert not thread.is_alive()


def one_series(values, *, model="moe", horizon=8, name="a", **fields):
    """Return the body of a request."""
    options = {"horizon": horizon, "quantiles": fields.pop("quantiles", [0.1, 0.5, 0.9])}
    options |= {key: fields.pop(key) for key in ("explain",) if key in fields}
    series = {"type": "univariate_time_series", "name": name, "series": values, "frequency": "D"} | fields
    return {"model": model, "inputs": [series], "options": options}


def quantiles_of(reply, place=0):
    """Return the quantiles of an output by level."""
    assert reply.status == 200, reply.body
    return reply.json["outputs"][place]["content"][0]["quantiles"]
