"""What a request asks, read from JSON or Arrow into tasks, within the limits of a server."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chronomoe.data.forecasts import check_asked
from chronomoe.errors import InputError
from chronomoe.serving.config import ServingConfig
from chronomoe.serving.models import Task
from chronomoe.serving.schema import ForecastRequest, first_step

Values = NDArray[np.float64]
UNIVARIATE, MULTIVARIATE = "univariate_time_series", "multivariate_time_series"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One series of a request."""

    name: str
    frequency: str
    target: Values
    """``(time,)``, or ``(time, variate)`` of a multivariate series."""
    start: str | None = None
    past: Mapping[str, Values] | None = None
    future: Mapping[str, Values] | None = None

    @property
    def type(self) -> str:
        """Its type in the words of the protocol."""
        return UNIVARIATE if self.target.ndim == 1 else MULTIVARIATE


@dataclass(frozen=True, kw_only=True)
class Question:
    """A whole request."""

    model: str
    horizon: int
    levels: tuple[float, ...]
    series: Sequence[Asked]
    explain: bool = False

    def tasks(self, config: ServingConfig) -> list[Task]:
        """Check every series against the limits and make them tasks.

        Raises:
            InputError: a limit is exceeded, or the parts of a series do not fit together.
        """
        _limit("inputs", len(self.series), config.max_series, "series")
        _limit("options.horizon", self.horizon, config.max_horizon, "steps")
        check_asked(self.horizon, self.levels)
        names = [one.name for one in self.series]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"every input needs a name of its own, got {twice!r} twice; rename one")
        return [self._task(f"inputs[{place}]", one, config) for place, one in enumerate(self.series)]

    def _task(self, place: str, one: Asked, config: ServingConfig) -> Task:
        target = np.atleast_2d(one.target.T)
        steps = target.shape[1]
        if not np.isfinite(target).any():
            raise InputError(f"{place}.series needs at least one value, got {steps} steps without any")
        _limit(f"{place}.series", steps, config.max_steps, "steps")
        past, future = one.past or {}, one.future or {}
        if lacking := [name for name in future if name not in past]:
            raise InputError(f"{place}.past_covariates must hold the past of {lacking[0]!r}, whose future is given")
        names = [*(name for name in past if name not in future), *future]
        for name in names:
            _fits(f"{place}.past_covariates[{name!r}]", past[name], steps)
        for name, values in future.items():
            _fits(f"{place}.future_covariates[{name!r}]", values, self.horizon)
        context = np.concatenate([target, *(past[name][None] for name in names)])
        _limit(f"{place}: variates and covariates", len(context), config.max_batch, "rows")
        ahead = np.full((len(context), self.horizon), np.nan)
        if future:
            ahead[len(context) - len(future) :] = np.stack(list(future.values()))
        if np.isinf(context).any() or np.isinf(ahead).any():
            raise InputError(f"{place} must hold finite numbers, or null where a value is missing; got an infinite one")
        if future and np.isnan(ahead[len(context) - len(future) :]).any():
            raise InputError(f"{place}.future_covariates must have a value at every step, got a missing one")
        first_step(one.start, steps=steps + self.horizon, frequency=one.frequency)  # refuse before forecasting
        return Task(
            context=context,
            future=ahead,
            n_targets=len(target),
            n_known=len(future),
            levels=self.levels,
            explain=self.explain,
        )


def from_json(request: ForecastRequest) -> Question:
    """Turn lists into arrays.

    Raises:
        InputError: the steps of a multivariate series differ in their number of variates.
    """
    options = request.options
    return Question(
        model=request.model,
        horizon=options.horizon,
        levels=tuple(options.quantiles or ()),
        explain=options.explain,
        series=[
            Asked(
                name=one.name,
                frequency=one.frequency,
                start=one.start_timestamp,
                target=target_of(f"inputs[{place}]", one.series, multivariate=one.type == MULTIVARIATE),
                past=arrays(one.past_covariates.items()),
                future=arrays(one.future_covariates.items()),
            )
            for place, one in enumerate(request.inputs)
        ],
    )


def target_of(place: str, series: Sequence[object], *, multivariate: bool) -> Values:
    """Return the values of a series of nested lists."""
    try:
        target = np.array(series, dtype=np.float64)
    except ValueError:
        target = np.empty((0, 0, 0))
    if target.ndim != 1 + multivariate or target.size == 0:
        kind = "a list for each step, all of as many variates" if multivariate else "one number for each step"
        raise InputError(f"{place}.series must hold {kind}, as its type says; got something else, or nothing")
    return target


def arrays(named: Iterable[tuple[str, object]]) -> dict[str, Values]:
    """Return values by name as arrays."""
    return {name: np.array(values, dtype=np.float64) for name, values in named}


def _limit(what: str, got: int, most: int, unit: str) -> None:
    if got > most:
        raise InputError(f"{what} may have at most {most} {unit} here, got {got}; send less, or ask the operator")


def _fits(what: str, values: Values, steps: int) -> None:
    if len(values) != steps:
        raise InputError(f"{what} must have {steps} values, got {len(values)}")
