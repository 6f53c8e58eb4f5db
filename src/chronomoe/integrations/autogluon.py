"""ChronoMoE as a model of AutoGluon's ``TimeSeriesPredictor``: ``hyperparameters={ChronoMoEModel: {...}}``."""

from pathlib import Path
from typing import Any

from chronomoe.errors import extra
from chronomoe.pipeline import ChronoMoEPipeline

with extra("autogluon"):
    from autogluon.timeseries.models.chronos import Chronos2Model


class ChronoMoEModel(Chronos2Model):
    """AutoGluon's Chronos-2 model, forecasting and fine-tuning with ``ChronoMoEPipeline``.

    A saved predictor names this class, so that loading it in another process imports this package. After the import of
    this module the name ``"ChronoMoE"`` stands for the class in ``hyperparameters``.

    The hyperparameters are those of ``Chronos2Model``: ``model_path`` is a hub id, a folder, an ``s3://`` URL or "tiny"
    (the default); ``cross_learning`` lets the series of a batch learn from each other (on by default, as there);
    ``fine_tune`` trains LoRA adapters, or all weights with ``fine_tune_mode="full"``, at contexts of the model's length
    unless ``fine_tune_context_length`` says otherwise. The predictor's folder refers to ``model_path``, which must stay
    where it is.
    """

    def load_model_pipeline(self) -> None:
        """Load the checkpoint, tuned or not."""
        self._model_pipeline = ChronoMoEPipeline.from_pretrained(
            self.model_path,
            device_map=self.get_hyperparameter("device") or ("cuda" if self._is_gpu_available() else "cpu"),
            revision=self.get_hyperparameter("revision"),
        )

    def export_model(self, path: str | Path) -> str:
        """Write the model as one whole checkpoint, adapters merged: see ``TimeSeriesPredictor.export_model``."""
        self._assert_no_transforms_for_export()
        ChronoMoEPipeline.from_pretrained(self.model_path).save_pretrained(path)
        return str(path)

    def _get_default_hyperparameters(self) -> dict[str, Any]:
        defaults: dict[str, Any] = super()._get_default_hyperparameters()
        return defaults | {"model_path": "tiny", "fine_tune_context_length": None}
