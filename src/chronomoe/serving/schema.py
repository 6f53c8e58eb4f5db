"""The time-series protocol of KServe: the fields of a request and of its answer, which are theirs.

https://kserve.github.io/website/docs/reference/time_series/api. It allows further fields; ours are ``past_covariates``
and ``future_covariates`` of an input, ``explain`` of the options, and ``experts`` and ``reasons`` of a forecast.
"""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from chronomoe.errors import InputError

ROUTE = "/v1/timeseries/forecast"
ARROW = "application/vnd.apache.arrow.stream"
JSON = "application/json"
Row = Annotated[list[float | None], Field(fail_fast=True)]
Rows = Annotated[list[Row], Field(fail_fast=True)]
TimeSeries = Annotated[Row | Rows, Field(union_mode="left_to_right")]
"""Values, oldest first; of a multivariate series ``(time, variate)``."""
LONGEST = 60
"""Characters of a received value that a message repeats."""


class Frequency(StrEnum):
    """Length of a step."""

    SECOND = "second"
    SECOND_SHORT = "S"
    MINUTE = "minute"
    MINUTE_SHORT = "T"
    HOUR = "hour"
    HOUR_SHORT = "H"
    DAY = "day"
    DAY_SHORT = "D"
    WEEK = "week"
    WEEK_SHORT = "W"
    MONTH = "month"
    MONTH_SHORT = "M"
    QUARTER = "quarter"
    QUARTER_SHORT = "Q"
    YEAR = "year"
    YEAR_SHORT = "Y"


_STEPS = {"S": ("seconds", 1), "T": ("minutes", 1), "H": ("hours", 1), "D": ("days", 1), "W": ("weeks", 1)}
_STEPS |= {"M": ("months", 1), "Q": ("months", 3), "Y": ("years", 1)}
_SHORT = {"minute": "T"} | {
    name: name[0].upper() for name in ("second", "hour", "day", "week", "month", "quarter", "year")
}


class Open(BaseModel):
    """What may hold fields that the protocol does not name."""

    model_config = ConfigDict(extra="allow")


class TimeSeriesInput(Open):
    """A series to forecast."""

    type: Literal["univariate_time_series", "multivariate_time_series"]
    name: str
    series: TimeSeries
    """null where missing."""
    frequency: Frequency
    start_timestamp: str | None = None
    """ISO 8601."""
    past_covariates: dict[str, Row] = {}
    """Beside the series, as long as it; names that are in ``future_covariates`` too are known ahead."""
    future_covariates: dict[str, Row] = {}
    """Known values of the forecast steps."""


class ForecastOptions(Open):
    """What is asked of every series."""

    horizon: int = Field(ge=1)
    quantiles: list[Annotated[float, Field(gt=0, lt=1)]] | None = None
    explain: bool = False
    """Whether the answer says which experts forecast each series, and why."""


class ForecastRequest(Open):
    """Body of a request."""

    model: str
    inputs: Annotated[list[TimeSeriesInput], Field(fail_fast=True)] = Field(min_length=1)
    options: ForecastOptions
    metadata: dict[str, Any] | None = None


class Error(BaseModel):
    """What went wrong; ``code`` is the HTTP status."""

    code: str | None = None
    message: str
    param: str | None = None
    type: str


class ErrorResponse(BaseModel):
    """Body of a refusal."""

    error: Error


class Reason(BaseModel):
    """How far a feature of the series speaks for its first expert and against the second."""

    feature: str
    score: float


class TimeSeriesForecast(Open):
    """Forecast of a series. ``mean_forecast`` is the median, as in Chronos."""

    type: str
    name: str
    mean_forecast: TimeSeries
    frequency: Frequency
    start_timestamp: str
    """Of the first forecast step; empty where the series came without one."""
    quantiles: dict[str, TimeSeries] | None = None
    experts: dict[str, float] | None = None
    """Gates of the experts that forecast the series."""
    reasons: list[Reason] | None = None


class ForecastOutput(Open):
    """Result for one input."""

    type: str
    id: str
    status: str
    content: list[TimeSeriesForecast]
    error: Error | None = None


class Usage(Open):
    """Patches that the model read and wrote."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ForecastResponse(Open):
    """Body of an answer; ``outputs`` stand in the order of the inputs."""

    id: str
    created_at: int
    status: str
    error: Error | None = None
    model: str
    outputs: list[ForecastOutput]
    usage: Usage | None = None


def read_request(body: bytes) -> ForecastRequest:
    """Read a JSON body.

    Raises:
        InputError: a field is missing or of another type.
    """
    try:
        return ForecastRequest.model_validate_json(body)
    except ValidationError as error:
        raise refusal(error) from None


def refusal(error: ValidationError) -> InputError:
    """Say where the most specific complaint lies, what the rule is and what was received."""
    found = max(error.errors(include_url=False), key=lambda each: len(each["loc"]))
    place = ""
    for step in found["loc"]:
        if isinstance(step, int):
            place += f"[{step}]"
        elif "[" not in step:  # the name of a type in a union
            place += f".{step}" if place else step
    received = repr(found["input"])
    received = received if len(received) <= LONGEST else received[:LONGEST] + "..."
    said = found["msg"][0].lower() + found["msg"][1:]
    return InputError(f"{place or 'the body'}: {said}, got {received}; see /docs for the fields of a request")


def first_step(start: str | None, *, steps: int, frequency: str) -> str:
    """Return the time ``steps`` steps after ``start``; months that are too short end early.

    Raises:
        InputError: ``start`` is no ISO 8601 time, or the forecast leaves the calendar.
    """
    if not start:
        return ""
    unit, size = _STEPS[_SHORT.get(frequency, frequency)]
    try:
        found = pd.Timestamp(datetime.fromisoformat(start)) + pd.DateOffset(**{unit: size * steps})  # type: ignore[arg-type]
    except (ValueError, OverflowError):
        raise InputError(
            f"start_timestamp must be an ISO 8601 time such as 2025-06-05T13:10:00Z, {steps} steps of {frequency} "
            f"after it still in the calendar, got {start[:LONGEST]!r}"
        ) from None
    text = str(found.isoformat())
    return text.removesuffix("+00:00") + "Z" if start.endswith("Z") else text
