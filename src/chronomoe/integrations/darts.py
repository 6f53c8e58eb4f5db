"""ChronoMoE as a foundation model of Darts."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chronomoe.errors import InputError, extra
from chronomoe.pipeline import load_model

with extra("darts"):
    from darts.models.forecasting.foundation_model import FoundationModel
    from darts.models.forecasting.pl_forecasting_module import PLForecastingModule, io_processor
    from darts.utils.data.torch_datasets.utils import ModuleStage, PLModuleInput, PLModuleOutput
    from darts.utils.likelihood_models.torch import QuantileRegression
    from darts.utils.serialization import add_safe_globals


class ChronoMoEModule(PLForecastingModule):
    """Any model that ``load_model`` loads, in Darts' layout: ``(batch, time, component, quantile)``."""

    def __init__(self, model_path: str, enable_finetuning: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model = load_model(model_path)
        levels = [round(level, 6) for level in self.model.chronos_config.quantiles]
        wanted = [0.5] if self.likelihood is None else self.likelihood.quantiles
        if not set(wanted) <= set(levels):
            raise InputError(f"quantiles must be some of {levels}, those of {model_path!r}, got {wanted}")
        self.wanted = [levels.index(level) for level in wanted]
        self.loss_of_all_levels: Any = QuantileRegression(levels) if enable_finetuning else None

    @io_processor  # type: ignore[untyped-decorator]
    def forward(self, x_in: PLModuleInput) -> PLModuleOutput:
        """Forecast; the components of a sample and its covariates are one group."""
        past = x_in.concatenate_past_features()  # targets, past covariates, future covariates
        batch, _, rows = past.shape
        ahead = past.new_full((batch, self.output_chunk_shift + self.output_chunk_length, rows), torch.nan)
        if x_in.future_covariates is not None:
            ahead[:, self.output_chunk_shift :, -x_in.future_covariates.shape[-1] :] = x_in.future_covariates
        output = self.model(
            context=past.transpose(1, 2).flatten(0, 1),
            group_ids=torch.arange(batch, device=past.device).repeat_interleave(rows),
            future_covariates=ahead.transpose(1, 2).flatten(0, 1),
            num_output_patches=math.ceil(ahead.shape[1] / self.model.chronos_config.output_patch_size),
        )
        quantiles: Tensor = output.quantile_preds.unflatten(0, (batch, rows))[:, : self.n_targets]
        quantiles = quantiles[..., self.output_chunk_shift : ahead.shape[1]].permute(0, 3, 1, 2)
        if x_in.stage is not ModuleStage.TRAIN:
            quantiles = quantiles.sort(dim=-1).values[..., self.wanted]
        return PLModuleOutput(prediction=quantiles)

    def _compute_loss(self, output: Any, target: Any, criterion: Any, sample_weight: Any) -> Any:
        if not self.training:
            return super()._compute_loss(output, target, criterion, sample_weight)
        return self.loss_of_all_levels.compute_loss(output.prediction, target, sample_weight)


class ChronoMoEModel(FoundationModel):
    """Forecast and fine-tune with Darts, with past and future covariates; components are forecast jointly.

    Args:
        input_chunk_length: steps of context.
        output_chunk_length: steps of a forecast; longer ones are unrolled by Darts.
        output_chunk_shift: steps between context and forecast.
        likelihood: the quantile levels, some of the model's; the median alone when None.
        model_path: a hub id, a folder, an ``s3://`` URL or "tiny". A saved Darts model refers to it.
        **kwargs: of ``FoundationModel``, among them ``enable_finetuning``, ``pl_trainer_kwargs``, ``optimizer_kwargs``,
            ``n_epochs`` and ``batch_size``.

    Raises:
        InputError: the likelihood is another one, or a quantile level is not the model's.
    """

    def __init__(
        self,
        input_chunk_length: int,
        output_chunk_length: int,
        output_chunk_shift: int = 0,
        likelihood: QuantileRegression | None = None,
        model_path: str | Path = "tiny",
        **kwargs: Any,
    ) -> None:
        if likelihood is not None and not isinstance(likelihood, QuantileRegression):
            raise InputError(f"likelihood must be a QuantileRegression or None, got a {type(likelihood).__name__}")
        super().__init__(**kwargs)  # the arguments above are in model_params: Darts' metaclass puts them there

    def _create_model(self, train_sample: Any) -> ChronoMoEModule:
        return ChronoMoEModule(str(self.model_params["model_path"]), **self.pl_module_params)


add_safe_globals([ChronoMoEModel])  # for ``load``, which reads only classes that Darts was told of
