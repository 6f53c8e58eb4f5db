"""ChronoMoE as a predictor of GluonTS."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chronomoe.errors import InputError, extra
from chronomoe.pipeline import ChronoMoEPipeline

with extra("gluonts"):
    from gluonts.core.component import validated
    from gluonts.dataset.common import Dataset
    from gluonts.dataset.util import forecast_start
    from gluonts.model.forecast import QuantileForecast
    from gluonts.model.predictor import RepresentablePredictor


class ChronoMoEPredictor(RepresentablePredictor):
    """Forecast GluonTS data sets, univariate or multivariate.

    ``feat_dynamic_real`` of an entry are covariates known ahead, over context and horizon; ``past_feat_dynamic_real``
    are known over the context alone. ``serialize`` writes the arguments, so ``model_path`` must stay where it is.

    Args:
        prediction_length: steps to forecast.
        model_path: a hub id, a folder, an ``s3://`` URL or "tiny".
        quantile_levels: of the forecasts, which interpolate between them.
        batch_size: series that are read at a time, and rows of a batch.
        cross_learning: whether the series of a batch learn from each other.
        device: as in ``device_map`` of ``from_pretrained``.
    """

    @validated()  # type: ignore[untyped-decorator]
    def __init__(
        self,
        prediction_length: int,
        model_path: str = "tiny",
        quantile_levels: list[float] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],  # noqa: B006  # is serialized
        batch_size: int = 256,
        cross_learning: bool = False,
        device: str = "cpu",
    ) -> None:
        super().__init__(prediction_length=prediction_length)
        self.quantile_levels = quantile_levels
        self.options = {"batch_size": batch_size, "cross_learning": cross_learning}
        self.pipeline = ChronoMoEPipeline.from_pretrained(model_path, device_map=device)

    def predict(self, dataset: Dataset, **kwargs: Any) -> Iterator[QuantileForecast]:
        """Yield a forecast for each entry; its arrays are ``(quantile, horizon)``, or with a variate axis at the end.

        Raises:
            InputError: a covariate does not cover what it must.
        """
        entries = iter(dataset)
        while batch := list(islice(entries, self.options["batch_size"])):
            quantiles, _ = self.pipeline.predict_quantiles(
                [self._input(entry) for entry in batch],
                prediction_length=self.prediction_length,
                quantile_levels=self.quantile_levels,
                limit_prediction_length=False,
                **self.options,
            )
            for entry, forecast in zip(batch, quantiles, strict=True):
                values = forecast.permute(2, 1, 0).numpy()
                yield QuantileForecast(
                    values[..., 0] if np.ndim(entry["target"]) == 1 else values,
                    start_date=forecast_start(entry),
                    forecast_keys=[str(level) for level in self.quantile_levels],
                    item_id=entry.get("item_id"),
                )

    def _input(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        target = np.asarray(entry["target"], dtype=np.float32)
        steps = target.shape[-1]
        known = self._feature(entry, "feat_dynamic_real", steps + self.prediction_length)
        past = self._feature(entry, "past_feat_dynamic_real", steps)
        return {
            "target": target,
            "past_covariates": {f"known {row}": values[:steps] for row, values in enumerate(known)}
            | {f"past {row}": values[:steps] for row, values in enumerate(past)},
            "future_covariates": {f"known {row}": values[steps:] for row, values in enumerate(known)},
        }

    def _feature(self, entry: Mapping[str, Any], name: str, steps: int) -> NDArray[np.float32]:
        values = np.asarray(entry.get(name, np.empty((0, steps))), dtype=np.float32)
        if values.ndim != 2 or values.shape[1] < steps:
            raise InputError(
                f"{name} must have the shape (feature, {steps}), context and what is known ahead, got {values.shape} "
                f"in item {entry.get('item_id')!r}"
            )
        return values[:, :steps]
