"""ChronoMoE as a model of ``fev``, as its leaderboard wants it: https://github.com/autogluon/fev/tree/main/models."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict

from chronomoe.errors import extra
from chronomoe.pipeline import ChronoMoEPipeline

with extra("fev"):
    import fev


class ChronoMoEModel(fev.ForecastingModel):
    """Any checkpoint that ``ChronoMoEPipeline`` loads, on tasks of any number of targets and covariates.

    Args:
        model_path: a hub id, a folder, an ``s3://`` URL or "tiny".
        device: as in ``device_map`` of ``from_pretrained``; "auto" takes a GPU where there is one.
        batch_size: rows of a batch: variates and covariates count.
        cross_learning: whether the series of a batch learn from each other.
        as_univariate: forecast each target alone, without covariates.
        finetune: arguments of ``ChronoMoEPipeline.fit`` to tune on the first window of each task; None does not tune.
        trained_on: dataset configurations of ``fev`` that the checkpoint was trained on. What it is depends on the
            checkpoint alone, so that nothing can be filled in here; the leaderboard flags leaks by it.
    """

    model_name = "chronomoe"

    def __init__(
        self,
        model_path: str | Path = "tiny",
        device: str = "auto",
        batch_size: int = 256,
        cross_learning: bool = False,
        as_univariate: bool = False,
        finetune: dict[str, Any] | None = None,
        trained_on: Sequence[str] = (),
    ) -> None:
        super().__init__()
        device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.pipeline = ChronoMoEPipeline.from_pretrained(model_path, device_map=device)
        self.options = {"batch_size": batch_size, "cross_learning": cross_learning, "as_univariate": as_univariate}
        self.finetune = finetune
        self.trained_on_datasets = list(trained_on)

    def _fit_predict(self, task: fev.Task) -> list[DatasetDict]:
        predictions: list[DatasetDict]
        start = time.monotonic()
        predictions, self.inference_time = self.pipeline.predict_fev(
            task, finetune_kwargs=self.finetune, **self.options
        )
        if self.finetune is not None:
            self.training_time = time.monotonic() - start - self.inference_time
        return predictions
