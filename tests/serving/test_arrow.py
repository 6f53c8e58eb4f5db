"""Arrow streams hold what JSON holds; those of strangers are not trusted."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("fastapi_offline", reason="needs the extra serve")

from chronomoe import ChronoMoEPipeline
from chronomoe.errors import InputError
from chronomoe.serving import arrow
from chronomoe.serving.app import create_app
from chronomoe.serving.schema import ARROW
from command_lines import blocks
from http_server import one_series, quantiles_of, running

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
OPTIONS = {"horizon": 8, "quantiles": [0.1, 0.5, 0.9]}


def stream(table, *, compression=None, **metadata):
    said = {"model": "moe", "options": json.dumps(OPTIONS)} | metadata
    table = table.replace_schema_metadata({key: value for key, value in said.items() if value is not None})
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=2)
    return bytes(sink.getvalue())


def table_of(series, **columns):
    names = [f"s{place}" for place in range(len(series))]
    kind = pa.list_(pa.list_(pa.float64())) if isinstance(series[0][0], list) else pa.list_(pa.float64())
    return pa.table({"name": names, "series": pa.array(series, kind), "frequency": ["D"] * len(series)} | columns)


SERIES = [[1.0, None, 3.0, 5.0] * 9, [2.0, 1.0] * 20, [4.0, 9.0, 1.0] * 30]


@pytest.fixture(scope="module")
def client(make_teacher):
    with running(create_app({"moe": ChronoMoEPipeline(make_teacher(num_layers=1))})) as asking:
        yield asking


def test_an_arrow_stream_is_answered_as_json_is(client):
    reply = client.forecast(stream(table_of(SERIES, start_timestamp=["2025-01-01T00:00:00Z"] * 3)), kind=ARROW)
    assert (reply.status, reply.headers["content-type"]) == (200, ARROW)
    found = pa.ipc.open_stream(reply.body).read_all()
    assert found.column_names == ["name", "frequency", "start_timestamp", "mean_forecast", "0.1", "0.5", "0.9"]
    for place, values in enumerate(SERIES):
        asked = client.forecast(one_series(values, start_timestamp="2025-01-01T00:00:00Z"))
        for level, expected in quantiles_of(asked).items():
            assert np.allclose(found[level][place].as_py(), expected, rtol=1e-4, atol=1e-4)
        expected = asked.json["outputs"][0]["content"][0]["start_timestamp"]
        assert found["start_timestamp"][place].as_py() == expected


def test_multivariate_series_are_lists_of_steps(client):
    series = [[[value, -value] for value in SERIES[1]], [[value, 1.0] for value in SERIES[2]]]
    found = pa.ipc.open_stream(client.forecast(stream(table_of(series)), kind=ARROW).body).read_all()
    asked = client.forecast(one_series(series[0], type="multivariate_time_series"))
    assert np.allclose(found["0.5"][0].as_py(), quantiles_of(asked)["0.5"], rtol=1e-4, atol=1e-4)


def test_either_form_is_answered_in_the_one_that_is_accepted(client):
    assert client.forecast(stream(table_of(SERIES)), kind=ARROW, Accept="application/json").json["model"] == "moe"
    reply = client.forecast(one_series(SERIES[1]), Accept=ARROW)
    assert pa.ipc.open_stream(reply.body).read_all()["name"].to_pylist() == ["a"]


def test_the_requests_of_the_page_are_answered(client):
    [curl], [code, _] = blocks(PAGE, "bash"), blocks(PAGE, "py")
    body = json.loads(re.search(r"-d '(.*)'", curl, re.DOTALL)[1])
    assert client.forecast(body).status == 200
    names = {}
    exec(code.replace("127.0.0.1:8080", f"127.0.0.1:{client.port}"), names)
    assert len(names["forecast"]["0.9"][0]) == 4


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_streams_are_refused_before_they_grow(compression):
    flood = stream(table_of([[0.0] * 1_000_000]), compression=compression)
    assert len(flood) < 100_000
    with pytest.raises(InputError, match="must not be compressed"):
        arrow.read(flood, most=8)


REFUSED = {
    "needs one column 'series'": lambda: stream(table_of(SERIES).drop_columns(["series"])),
    "got 'path' of type string": lambda: stream(table_of(SERIES, path=["/etc/passwd"] * 3)),
    "got 'series' of type list<item: float>": lambda: stream(
        table_of(SERIES).set_column(1, "series", pa.array(SERIES, pa.list_(pa.float32())))
    ),
    "metadata must hold 'model'": lambda: stream(table_of(SERIES), model=None),
    "from 1 to 8 rows here, one for each series, got 9": lambda: stream(table_of(SERIES * 3)),
    "from 1 to 8 rows here, one for each series, got 0": lambda: stream(table_of(SERIES)[:0]),
    "horizon: .*got 0": lambda: stream(table_of(SERIES), options='{"horizon": 0}'),
    "frequency of series 's0' must be one of": lambda: stream(
        table_of(SERIES).set_column(2, "frequency", pa.array(["x"] * 3))
    ),
    "needs a name and a series": lambda: stream(
        table_of(SERIES).set_column(0, "name", pa.array([None] * 3, pa.string()))
    ),
    "no valid Arrow stream": lambda: b"PAR1" * 100,
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_stream_that_asks_wrongly_is_refused(message):
    with pytest.raises(InputError, match=message):
        arrow.read(REFUSED[message](), most=8)


def test_a_damaged_stream_is_refused_and_reads_no_foreign_memory():
    whole = stream(table_of(SERIES))
    generator = np.random.default_rng(0)
    for _ in range(400):
        damaged = bytearray(whole[: generator.integers(1, len(whole) + 1)])
        for place in generator.integers(0, len(damaged), size=4):
            damaged[place] = generator.integers(256)
        try:
            question = arrow.read(bytes(damaged), most=8)
        except InputError:
            continue
        assert len(question.series) <= 8
