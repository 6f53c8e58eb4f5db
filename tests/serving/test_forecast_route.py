"""Forecasts over HTTP are those of the pipeline, whoever shares their batch; what is wrong is refused in words."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("fastapi_offline", reason="needs the extra serve")

from chronomoe import ChronoMoEPipeline
from chronomoe.models.chronos2 import use_exact_group_attention
from chronomoe.models.mixture.mixture import MixtureConfig, build_mixture
from chronomoe.models.mixture.router import RoutingConfig
from chronomoe.serving.app import create_app
from chronomoe.serving.config import ServingConfig
from chronomoe.serving.schema import ForecastResponse
from http_server import one_series, quantiles_of, running
from moe_models import take_sides

LEVELS = [0.1, 0.35, 0.5, 0.9]
"""One of them is not among those that the models have."""
HORIZONS = (8, 20, 64, 100)
"""Of one patch and two, of a whole pass, and beyond it."""
CLOSE = 1e-4
"""Float32 rounding, relative to the spread of a forecast."""


@pytest.fixture(scope="module")
def pipelines(make_teacher):
    experts = {
        name: use_exact_group_attention(make_teacher(seed=seed, num_layers=1 + seed))
        for seed, name in enumerate(("a", "b", "c"))
    }
    config = MixtureConfig(routing=RoutingConfig(top_k=2, threshold=0.7))
    mixture = take_sides(build_mixture(experts, config).eval())
    return {"moe": ChronoMoEPipeline(mixture), "dense": ChronoMoEPipeline(make_teacher(seed=5))}


@pytest.fixture(scope="module")
def client(pipelines):
    with running(create_app(pipelines, ServingConfig(max_steps=400, max_series=8, max_horizon=128))) as asking:
        yield asking


def assert_equal(found, expected):
    expected = np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= CLOSE * (expected.std() + 1e-3 * np.abs(expected).max())


def stacked(quantiles):
    """Return the quantiles of an output as ``(time, level)`` or ``(time, variate, level)``."""
    assert list(quantiles) == [str(level) for level in LEVELS]
    return np.stack([np.array(values) for values in quantiles.values()], axis=-1)


def as_lists(values):
    return [None if np.isnan(value) else float(value) for value in values]


@pytest.fixture(scope="module")
def series(make_context):
    """Series of many lengths and units, some with gaps, some longer than the context of the models."""
    rows = make_context(14, 300, seed=3).numpy()
    lengths = [300, 17, 64, 5, 128, 33, 90, 48, 1, 100, 76, 129, 20, 61]
    found = [row[-length:].copy() for row, length in zip(rows, lengths, strict=True)]
    found[2][20:40] = np.nan
    found[4][:50] = np.nan
    found[5][:] = 3.25
    found[9] = found[9] * np.float32(1e5)
    return found


@pytest.mark.filterwarnings("ignore:We recommend keeping prediction length")
@pytest.mark.parametrize("model", ["moe", "dense"])
def test_forecasts_are_those_of_the_pipeline_whoever_shares_the_batch(client, pipelines, series, model):
    asked = [(values, horizon) for values in series for horizon in HORIZONS]

    def ask(pair):
        values, horizon = pair
        return client.forecast(one_series(as_lists(values), model=model, horizon=horizon, quantiles=LEVELS))

    with ThreadPoolExecutor(32) as pool:
        replies = list(pool.map(ask, asked))
    for (values, horizon), reply in zip(asked, replies, strict=True):
        [expected], [median] = pipelines[model].predict_quantiles(
            [values], prediction_length=horizon, quantile_levels=LEVELS
        )
        assert_equal(stacked(quantiles_of(reply)), expected[0])
        assert_equal(np.array(reply.json["outputs"][0]["content"][0]["mean_forecast"]), median[0])
    text = client.get("/metrics").body.decode()
    rows, batches = (
        float(re.search(rf'chronomoe_batch_rows_{part}{{model="{model}"}} (\S+)', text)[1]) for part in ("sum", "count")
    )
    assert batches < rows, "requests shared batches"


def test_a_multivariate_series_with_covariates_is_forecast_together(client, pipelines, make_context):
    rows = make_context(5, 110, seed=4).double().numpy()
    past, ahead = rows[:, :90], rows[:, 90:]
    body = one_series(past[:2].T.tolist(), horizon=20, quantiles=LEVELS, type="multivariate_time_series")
    body["inputs"][0] |= {
        "past_covariates": {"known": past[3].tolist(), "past": past[2].tolist(), "also": past[4].tolist()},
        "future_covariates": {"known": ahead[3].tolist(), "also": ahead[4].tolist()},
    }
    covariates = {name: past[row].astype(np.float32) for name, row in (("known", 3), ("past", 2), ("also", 4))}
    inputs = {
        "target": past[:2].astype(np.float32),
        "past_covariates": covariates,
        "future_covariates": {name: ahead[row].astype(np.float32) for name, row in (("known", 3), ("also", 4))},
    }
    [expected], _ = pipelines["moe"].predict_quantiles([inputs], prediction_length=20, quantile_levels=LEVELS)
    reply = client.forecast(body)
    assert_equal(stacked(quantiles_of(reply)), expected.permute(1, 0, 2))


def test_series_of_one_request_come_back_in_order_in_the_fields_of_the_protocol(client, pipelines, series):
    body = one_series(as_lists(series[0]), start_timestamp="2025-01-31T00:00:00Z", frequency="month")
    body["inputs"] += one_series(as_lists(series[1]), name="b", frequency="H")["inputs"]
    body |= {"metadata": {"request_id": "7"}, "other_properties": "value"}
    reply = client.forecast(body)
    answer = ForecastResponse.model_validate_json(reply.body)
    first, second = (output.content[0] for output in answer.outputs)
    assert (first.name, second.name, answer.model, answer.status) == ("a", "b", "moe", "completed")
    assert (first.start_timestamp, second.start_timestamp) == ("2050-01-31T00:00:00Z", "")
    assert {output.type for output in answer.outputs} == {"time_series_forecast"}
    assert answer.usage.total_tokens == 8 + 2 + 2
    assert len({output.id for output in answer.outputs}) == 2


def test_without_levels_only_the_median_comes_back(client, series):
    body = one_series(as_lists(series[0]))
    del body["options"]["quantiles"]
    assert client.forecast(body).json["outputs"][0]["content"][0]["quantiles"] is None


def test_an_explained_forecast_names_its_experts_and_what_spoke_for_the_first(client, pipelines, series):
    for values in series[:4]:
        found = client.forecast(one_series(as_lists(values), explain=True)).json["outputs"][0]["content"][0]
        [expected] = pipelines["moe"].routing([values])
        assert list(found["experts"]) == list(expected)
        assert list(found["experts"].values()) == pytest.approx(list(expected.values()), abs=1e-4)
        assert len(found["reasons"]) == 5
    dense = client.forecast(one_series(as_lists(series[0]), model="dense", explain=True))
    assert "experts" not in dense.json["outputs"][0]["content"][0]


def broken(**changes):
    body = one_series([1.0, 2.0, 3.0, 4.0])
    for path, value in changes.items():
        *inside, last = path.split("__")
        place = body
        for step in inside:
            place = place[int(step) if step.isdigit() else step]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    return body


REFUSED = {
    r"no model '/etc/passwd' is served here. Available: moe, dense": (404, {"model": "/etc/passwd"}),
    r"no model 'amazon/chronos-2' is served": (404, {"model": "amazon/chronos-2"}),
    r"inputs\[0\]\.series\[1\]: .*valid number.*got 'x'": (400, {"inputs__0__series": [1, "x"]}),
    r"inputs\[0\]\.series needs at least one value, got 2 steps": (400, {"inputs__0__series": [None, None]}),
    r"inputs\[0\]\.series must hold one number for each step": (400, {"inputs__0__series": []}),
    r"must hold a list for each step": (400, {"inputs__0__type": "multivariate_time_series"}),
    r"series may have at most 400 steps here, got 401": (400, {"inputs__0__series": [1.0] * 401}),
    r"options.horizon may have at most 128 steps here, got 129": (400, {"options__horizon": 129}),
    r"options\.horizon: .*greater than or equal to 1.*got 0": (400, {"options__horizon": 0}),
    r"options\.quantiles\[0\]: .*less than 1, got 1\.5": (400, {"options__quantiles": [1.5]}),
    r"each given once": (400, {"options__quantiles": [0.5, 0.5]}),
    r"inputs\[0\]\.frequency: .*got 'fortnight'": (400, {"inputs__0__frequency": "fortnight"}),
    r"ISO 8601 time such as .* got 'yesterday'": (400, {"inputs__0__start_timestamp": "yesterday"}),
    r"still in the calendar, got '9999": (400, {"inputs__0__start_timestamp": "9999-12-31"}),
    r"options: field required": (400, {"options": ...}),
    r"must hold the past of 'price', whose future is given": (
        400,
        {"inputs__0__future_covariates": {"price": [1.0] * 8}},
    ),
    r"past_covariates\['price'\] must have 4 values, got 1": (400, {"inputs__0__past_covariates": {"price": [1.0]}}),
    r"infinite": (400, {"inputs__0__series": [1.0, float("inf")]}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_wrong_request_is_refused_with_the_rule_and_what_was_received(client, message):
    status, changes = REFUSED[message]
    reply = client.forecast(broken(**changes))
    assert reply.status == status
    error = reply.json["error"]
    assert error["code"] == str(status)
    assert re.search(message, error["message"]), error["message"]


def test_names_must_differ_and_series_are_counted(client):
    body = broken()
    body["inputs"] *= 2
    assert "name of its own, got 'a' twice" in client.forecast(body).json["error"]["message"]
    body["inputs"] *= 5
    assert "at most 8 series here, got 10" in client.forecast(body).json["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"null", b"[" * 10_000, b'{"model": "' + b"\xff" * 10, b"\x00" * 100])
def test_a_body_that_is_no_json_is_refused(client, body):
    assert client.forecast(body).status == 400


def test_other_types_and_encodings_of_a_body_are_refused(client):
    assert client.forecast(b"a,b", kind="text/csv").status == 415
    assert client.forecast(b"{}", Content_Encoding="gzip").status == 415


def test_a_large_body_is_refused_before_it_is_read(pipelines):
    with running(create_app(pipelines, ServingConfig(max_body_mb=0.01))) as asking:
        large = one_series([1.0] * 20_000)
        assert asking.forecast(large).status == 413
        chunks = asking("POST", "/v1/timeseries/forecast", iter([b"[" * 9000] * 9), Content_Type="application/json")
        assert chunks.status == 413, "no length was said"
        assert asking.forecast(one_series([1.0] * 20)).status == 200


def test_a_request_that_takes_too_long_is_given_up(pipelines, series):
    with running(create_app(pipelines, ServingConfig(timeout_s=1e-4))) as asking:
        reply = asking.forecast(one_series(as_lists(series[0])))
        assert reply.status == 504
        assert "within 0.0001 s" in reply.json["error"]["message"]


def test_more_than_the_queue_holds_is_refused_with_a_time_to_try_again(pipelines):
    body = broken()
    body["inputs"] += one_series([1.0, 2.0], name="b")["inputs"]
    with running(create_app(pipelines, ServingConfig(queue=2))) as asking:
        with ThreadPoolExecutor(16) as pool:
            replies = list(pool.map(asking.forecast, [body] * 32))
        body["inputs"] += one_series([1.0, 2.0], name="c")["inputs"]
        never = asking.forecast(body)
    assert {reply.status for reply in replies} == {200, 429}
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in replies if reply.status == 429)
    assert "a request may have at most 2 rows here, got 3" in never.json["error"]["message"]


def test_health_models_metrics_and_openapi(client):
    assert client.get("/v2/health/live").json == {"live": True}
    assert client.get("/v2/health/ready").json == {"ready": True}
    assert client.get("/v1/timeseries/models").json == ["moe", "dense"]
    about = client.get("/v1/models/moe").json
    assert (about["experts"], about["context_length"], about["horizon_of_one_pass"]) == (["a", "b", "c"], 128, 64)
    assert client.get("/v1/models/..%2f..%2fetc%2fpasswd").status == 404
    document = client.get("/openapi.json").json
    body = document["paths"]["/v1/timeseries/forecast"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "application/vnd.apache.arrow.stream"}
    text = json.dumps(document)
    named = set(re.findall(r"#/components/schemas/(\w+)", text))
    assert named <= set(document["components"]["schemas"])
    docs = client.get("/docs").body.decode()
    assert "http" not in "".join(re.findall(r'(?:src|href)="([^"]*)"', docs)), "no other host is asked"


def test_metrics_count_requests_batches_and_experts(pipelines, series):
    with running(create_app(pipelines)) as asking:
        asking.forecast(one_series(as_lists(series[0])))
        asking.forecast(one_series(as_lists(series[0]), horizon=0))
        text = asking.get("/metrics").body.decode()
    assert 'chronomoe_requests_total{model="moe",status="200"} 1.0' in text
    assert 'chronomoe_requests_total{model="",status="400"} 1.0' in text
    assert 'chronomoe_batch_rows_sum{model="moe"} 1.0' in text
    assert "chronomoe_queue_rows 0.0" in text
    counted = [line for line in text.splitlines() if line.startswith("chronomoe_expert_rows_total")]
    assert sum(float(line.split()[-1]) for line in counted) >= 1


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a b"])
def test_a_name_that_could_be_a_path_is_refused(pipelines, name):
    with pytest.raises(Exception, match="a model's name has letters"):
        create_app({name: pipelines["dense"]})


def test_a_level_of_float64_survives(client):
    """2 ** 24 and half a step: float32 would round the whole series to a constant."""
    values = 16_777_216 + 0.25 * np.sin(np.arange(100) / 3)
    found = np.array(quantiles_of(client.forecast(one_series(values.tolist())))["0.5"])
    shifted = np.array(quantiles_of(client.forecast(one_series((values - 16_777_216).tolist())))["0.5"])
    assert np.abs(found - 16_777_216 - shifted).max() < 0.01
    assert torch.get_num_threads() == 1
