"""ChronoMoE as a forecaster of sktime."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from chronomoe.errors import InputError, extra
from chronomoe.pipeline import ChronoMoEPipeline

with extra("sktime"):
    from sktime.forecasting.base import BaseForecaster, ForecastingHorizon

MTYPES = ["pd.DataFrame", "pd-multiindex", "pd_multiindex_hier"]


class ChronoMoEForecaster(BaseForecaster):
    """Forecast one series, or all series of a panel or hierarchy at once, with quantiles.

    The variables of a series are forecast jointly. ``X`` of ``fit`` are covariates; those that ``predict`` gets, too,
    are known ahead, the others end with ``y``. Missing values may stay.

    Args:
        model_path: a hub id, a folder, an ``s3://`` URL or "tiny".
        batch_size: rows of a batch: variates and covariates count.
        cross_learning: whether the series of a batch learn from each other.
        context_length: latest steps that are read; the model's when None.
        device: as in ``device_map`` of ``from_pretrained``.
        fine_tune: arguments of ``ChronoMoEPipeline.fit`` to tune on ``y`` in ``fit``; None forecasts zero-shot.
            ``prediction_length`` is that of ``fh`` unless given; covariates count as known ahead.
    """

    _tags = {
        "y_inner_mtype": MTYPES,
        "X_inner_mtype": MTYPES,
        "capability:multivariate": True,
        "capability:exogenous": True,
        "capability:missing_values": True,
        "capability:update": True,
        "capability:pred_int": True,
        "capability:pred_int:insample": False,
        "capability:insample": False,
        "requires-fh-in-fit": False,
        "X-y-must-have-same-index": False,
    }

    def __init__(
        self,
        model_path: str = "tiny",
        batch_size: int = 256,
        cross_learning: bool = False,
        context_length: int | None = None,
        device: str = "cpu",
        fine_tune: dict[str, Any] | None = None,
    ) -> None:
        self.model_path = model_path
        self.batch_size = batch_size
        self.cross_learning = cross_learning
        self.context_length = context_length
        self.device = device
        self.fine_tune = fine_tune
        super().__init__()

    def _fit(self, y: pd.DataFrame, X: pd.DataFrame | None = None, fh: Any = None) -> "ChronoMoEForecaster":
        self.y_, self.X_ = y, X
        self.pipeline_ = ChronoMoEPipeline.from_pretrained(self.model_path, device_map=self.device)
        if self.fine_tune is not None:
            options = dict(self.fine_tune)
            if "prediction_length" not in options:
                if fh is None:
                    raise InputError("fine-tuning needs a horizon: pass fh to fit, or prediction_length in fine_tune")
                options["prediction_length"] = self._horizon(fh)
            known = {} if X is None else dict.fromkeys(map(str, X))
            inputs = [entry | {"future_covariates": known} for _, entry in self._inputs(y, X)]
            self.pipeline_ = self.pipeline_.fit(inputs, **options)
        return self

    def _update(
        self, y: pd.DataFrame, X: pd.DataFrame | None = None, update_params: bool = True
    ) -> "ChronoMoEForecaster":
        self.y_ = y.combine_first(self.y_)
        self.X_ = self.X_ if X is None or self.X_ is None else X.combine_first(self.X_)
        return self

    def _predict(self, fh: Any, X: pd.DataFrame | None = None) -> pd.DataFrame:
        index, values = self._forecast(fh, X, [0.5])
        return pd.DataFrame(values[..., 0], index=index, columns=self.y_.columns)

    def _predict_quantiles(self, fh: Any, X: pd.DataFrame | None, alpha: Sequence[float]) -> pd.DataFrame:
        index, values = self._forecast(fh, X, list(alpha))
        columns = pd.MultiIndex.from_product([self._get_varnames(), alpha])
        return pd.DataFrame(values.reshape(len(index), -1), index=index, columns=columns)

    def _forecast(
        self,
        fh: Any,
        X: pd.DataFrame | None,
        levels: list[float],
    ) -> tuple[pd.Index, NDArray[np.float32]]:
        """Return the rows asked for, series by series, and their values ``(row, variable, level)``."""
        horizon = self._horizon(fh)
        series = self._inputs(self.y_, self.X_, X, horizon)
        quantiles, _ = self.pipeline_.predict_quantiles(
            [entry for _, entry in series],
            prediction_length=horizon,
            quantile_levels=sorted(set(levels)),
            context_length=self.context_length,
            batch_size=self.batch_size,
            cross_learning=self.cross_learning,
            limit_prediction_length=False,
        )
        asked = fh.to_relative(self.cutoff).to_numpy().astype(int) - 1
        order = [sorted(set(levels)).index(level) for level in levels]
        values = np.concatenate([one.numpy()[:, asked].transpose(1, 0, 2) for one in quantiles])[..., order]
        times = self._ahead(horizon)[asked]
        if self.y_.index.nlevels == 1:
            return times, values
        rows = [(*key, time) for key, _ in series for time in times]
        return pd.MultiIndex.from_tuples(rows, names=self.y_.index.names), values

    def _horizon(self, fh: Any) -> int:
        return int(max(fh.to_relative(self.cutoff).to_numpy()))

    def _ahead(self, horizon: int) -> pd.Index:
        """Return the times of the next steps."""
        times = self.y_.index.get_level_values(-1).unique().sort_values()
        freq = (self.cutoff.freq or pd.infer_freq(times)) if isinstance(times, pd.DatetimeIndex) else None
        ahead: pd.Index = ForecastingHorizon(range(1, horizon + 1), freq=freq).to_absolute_index(self.cutoff)
        return ahead

    def _inputs(
        self, y: pd.DataFrame, past: pd.DataFrame | None, ahead: pd.DataFrame | None = None, horizon: int = 0
    ) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Return each series as the pipeline takes it, with its key, on the times of all series."""
        if ahead is not None and past is None:
            raise InputError("X was given to predict and not to fit; covariates known ahead need their past, too")
        times = y.index.get_level_values(-1).unique().sort_values()
        future = self._ahead(horizon) if ahead is not None else times[:0]
        covariates = {
            name: (dict(_series(frame)), index)
            for name, frame, index in (("past_covariates", past, times), ("future_covariates", ahead, future))
            if frame is not None
        }
        answer = []
        for key, target in _series(y):
            entry: dict[str, Any] = {"target": target.reindex(times).to_numpy(np.float32).T}
            for name, (frames, index) in covariates.items():
                own = frames[key].reindex(index)
                entry[name] = {str(column): own[column].to_numpy(np.float32) for column in own}
            answer.append((key, entry))
        return answer

    @classmethod
    def get_test_params(cls, parameter_set: str = "default") -> list[dict[str, Any]]:
        """Return arguments for sktime's own checks."""
        return [{}, {"cross_learning": True, "context_length": 48}]


def _series(frame: pd.DataFrame) -> list[tuple[tuple[Any, ...], pd.DataFrame]]:
    if frame.index.nlevels == 1:
        return [((), frame)]
    levels: list[Any] = list(range(frame.index.nlevels - 1))
    one = len(levels) == 1
    parts = frame.groupby(level=levels[0] if one else levels, sort=False)
    return [((key,) if one else key, part.droplevel(levels)) for key, part in parts]
