"""The pipeline: all that a ``Chronos2Pipeline`` does, for Chronos-2 models and for ours."""

import copy
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch
from chronos.chronos2 import Chronos2Model, Chronos2Pipeline
from chronos.chronos2.dataset import Chronos2Dataset, DatasetMode
from torch import Tensor
from transformers import PreTrainedModel

from chronomoe.checkpoints.adapters import save_adapters
from chronomoe.checkpoints.finding import exported
from chronomoe.checkpoints.loading import load_checkpoint, merge
from chronomoe.checkpoints.writing import PUSH_OPTIONS, push_folder, write_checkpoint
from chronomoe.data.batching import Inputs, runs_of_similar, without_future
from chronomoe.data.forecasts import check_asked, forecast_frame
from chronomoe.data.series import ITEM_ID, TARGET, TIMESTAMP
from chronomoe.errors import InputError
from chronomoe.models.bands import with_bands
from chronomoe.models.chronos2 import use_exact_group_attention
from chronomoe.models.folded import computing_in
from chronomoe.models.mixture.cross_learning import RoutedBySeries, series_of_rows
from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.models.precision import DtypeTrials
from chronomoe.models.promises import constant_level, put_in_order
from chronomoe.models.sparse.insertion import MoEEnhancedChronos2
from chronomoe.models.sparse.upcycling import SparseChronos2Model
from chronomoe.models.unwrapping import check_trainable

if TYPE_CHECKING:
    from peft import LoraConfig  # type: ignore[import-not-found,import-untyped]
    from transformers.trainer_callback import TrainerCallback


class ChronoMoEPipeline(Chronos2Pipeline):  # type: ignore[misc]
    """Forecast with a Chronos-2 model, dense or with MoE layers, or a mixture of distilled experts.

    ``predict``, ``predict_quantiles``, ``predict_df``, ``predict_fev`` and ``embed`` take what upstream's take. Of each
    series ``predict`` returns ``(variate, quantile, horizon)``, ``predict_quantiles`` ``(variate, horizon, quantile)``
    and the median, both in the unit of the series; ``predict_df`` takes and returns long frames; ``embed`` returns
    ``(variate, token, d_model)``.

    ``cross_learning`` makes a whole batch one group. With a mixture, each series is routed on its own, with its
    covariates, and learns from those of the batch that chose the same expert.

    It promises two things of every forecast that the stock pipeline, whose numbers they are otherwise, does not:

    - Quantiles never cross: those of each step are sorted, which never raises their mean quantile loss (monotone
      rearrangement; Chernozhukov, Fernandez-Val & Galichon, 2010, Econometrica 78(3), https://arxiv.org/abs/0704.3649).
    - A constant is forecast as that constant, at all levels: a series whose observed values, one or more, are all
      equal. Other variates and covariates may move it: with those, every one of them must be constant too, known
      future values included. ``cross_learning`` makes one group of the batch, so this asks it of all its series.

    Where a checkpoint has recalibrated bands (``chronomoe recalibrate``), quantiles are stretched around the median.

    Examples:
        >>> pipeline = ChronoMoEPipeline.from_pretrained("tiny")
        >>> quantiles, median = pipeline.predict_quantiles([np.arange(60.0) % 7], prediction_length=7)
        >>> quantiles[0].shape  # variate, horizon, quantile
        torch.Size([1, 7, 9])
    """

    def __init__(self, model: Any, *, trials: DtypeTrials | None = None) -> None:
        """Wrap a model, in evaluation mode, a stock one with the faster forward pass; ``trials`` choose its type."""
        self.trials = trials
        if type(model) is Chronos2Model:
            use_exact_group_attention(model)
        super().__init__(model=model.eval())

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *args: Any, force_s3_download: bool = False, **kwargs: Any
    ) -> "ChronoMoEPipeline":
        """Load a checkpoint, of Chronos-2 or of ours.

        Args:
            pretrained_model_name_or_path: a hub id, a folder, an ``s3://`` URL, or "tiny", the teacher that ships.
            *args: as in ``PreTrainedModel.from_pretrained``.
            force_s3_download: download again what is already here.
            **kwargs: as in ``PreTrainedModel.from_pretrained``. ``dtype`` is float32 unless given, whatever is stored.
                "auto" takes the encoder's products in bfloat16 where the processor has units for it and a short trial,
                one for each size of a batch, says that it wins, which changes WQL by less than 0.1 %.
                ``backend`` is "onnx" or "openvino" for what ``chronomoe export`` wrote; unless given, what it was
                exported for.

        Raises:
            InputError: there is no such checkpoint, its weights are missing, cut short or do not fit its
                configuration, or it is of another architecture or a newer format. Only safetensors are read, and no
                code of a checkpoint is run.
        """
        name, backend = pretrained_model_name_or_path, kwargs.pop("backend", None)
        if exported(name, backend):
            from chronomoe.export.runtime import OnnxModel

            return cls(OnnxModel(name, backend=backend))
        model = load_checkpoint(name, *args, force_s3_download=force_s3_download, **kwargs)
        auto = (kwargs.get("dtype") or kwargs.get("torch_dtype")) == "auto"
        return cls(model, trials=DtypeTrials(time.perf_counter) if auto else None)

    def save_pretrained(
        self, save_directory: str | Path, *args: Any, sections: Mapping[str, str] | None = None, **kwargs: Any
    ) -> None:
        """Save safetensors, config.json and a model card (README.md), all of them or nothing.

        Stock ``Chronos2Pipeline`` loads plain Chronos-2 models without ChronoMoE, ours after ``import chronomoe``.

        Args:
            save_directory: a new or empty folder, or one that holds a checkpoint, which is replaced.
            *args: as in ``PreTrainedModel.save_pretrained``.
            sections: further headings of the model card with their Markdown.
            **kwargs: as in ``PreTrainedModel.save_pretrained``. With ``push_to_hub=True`` the finished folder is
                uploaded to ``repo_id``, which is the folder's name unless given; ``token``, ``private``, ``revision``,
                ``create_pr``, ``commit_message`` and ``commit_description`` are for the hub.
        """
        folder = Path(save_directory).expanduser().resolve()
        to_hub = {name: kwargs.pop(name) for name in PUSH_OPTIONS if name in kwargs}
        write_checkpoint(self.model, folder, *args, sections=sections, **kwargs)
        if to_hub.pop("push_to_hub", False):
            push_folder(folder, **to_hub)

    def predict_df(
        self,
        df: pd.DataFrame,
        future_df: pd.DataFrame | None = None,
        id_column: str = ITEM_ID,
        timestamp_column: str = TIMESTAMP,
        target: str | list[str] = TARGET,
        prediction_length: int | None = None,
        quantile_levels: list[float] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],  # noqa: B006  # as upstream
        batch_size: int = 256,
        context_length: int | None = None,
        cross_learning: bool = False,
        validate_inputs: bool = True,
        freq: str | None = None,
        **predict_kwargs: Any,
    ) -> pd.DataFrame:
        """Forecast a long (or wide) frame, read and checked as ``chronomoe predict`` reads a file.

        The arguments are those of ``Chronos2Pipeline.predict_df``. Items come in order of first appearance and keep the
        type of their ids, times their zone: steps of days and longer are those of its calendar. Numbers are float64:
        neither the level of a series nor its unit costs digits. Booleans count as 0 and 1; text and pandas' categories
        are encoded as upstream does it. Rows may come in any order, and ``future_df`` may hold more than the forecast
        steps. ``validate_inputs=False`` skips the checks, for callers that have made them: items that have no value
        at all are forecast too, and future rows are taken in their order.

        Raises:
            InputError: a frame breaks a rule of ``frame_to_series``.
        """
        horizon = self.model_prediction_length if prediction_length is None else prediction_length
        check_asked(horizon, quantile_levels, context_length)
        return forecast_frame(
            self.predict_quantiles,
            df,
            future_df,
            names={id_column: ITEM_ID, timestamp_column: TIMESTAMP},
            target=target,
            freq=freq,
            trusted=not validate_inputs,
            horizon=horizon,
            levels=quantile_levels,
            context_length=min(context_length or self.model_context_length, self.model_context_length),
            batch_size=batch_size,
            cross_learning=cross_learning,
            **predict_kwargs,
        )

    def predict(
        self,
        inputs: Inputs,
        prediction_length: int | None = None,
        batch_size: int = 256,
        context_length: int | None = None,
        cross_learning: bool = False,
        limit_prediction_length: bool = False,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Forecast: see ``Chronos2Pipeline.predict``, whose arguments these are.

        Groups of equal size and series of similar length share a batch, because a batch is padded to its longest; with
        ``cross_learning`` the caller's order says who is together. Without it, a batch changes a forecast by under 1e-4
        relative in float32.
        """
        if not {tenth / 10 for tenth in range(1, 10)} <= {*self.quantiles}:  # upstream's default, which it would refuse
            kwargs.setdefault("unrolled_quantiles", self.quantiles)
        horizon = prediction_length or self.model_prediction_length
        dataset = self._dataset(inputs, horizon=horizon, batch_size=batch_size, context_length=context_length)
        prepared = dataset.inputs
        shapes = [(len(one["context"]), min(one["context"].shape[-1], dataset.context_length)) for one in prepared]
        own: Any = nullcontext()  # what the caller computes in
        if self.trials is not None:
            own = computing_in(self.trials.best(self.model, shapes, horizon=horizon, batch_size=batch_size))
        runs = [list(range(len(prepared)))]
        if not (cross_learning or kwargs.get("predict_batches_jointly")):
            runs = runs_of_similar(shapes, batch_size=batch_size, patch_size=self.model.chronos_config.input_patch_size)
        forecasts: dict[int, Tensor] = {}
        options = (prediction_length, batch_size, context_length, cross_learning, limit_prediction_length)
        with own:
            for run in runs:
                found = super().predict([prepared[place] for place in run], *options, **kwargs)
                forecasts |= zip(run, found, strict=True)
        return [forecasts[place] for place in range(len(prepared))]

    def _predict_batch(
        self,
        context: Tensor,
        group_ids: Tensor,
        future_covariates: Tensor,
        *rest: Any,
        target_idx_ranges: Sequence[Sequence[int]],
        **options: Any,
    ) -> list[Tensor]:
        """Forecast as upstream does, long horizons from its raw quantiles too, and keep the promises at the end."""
        level = constant_level(torch.cat([context, future_covariates], dim=1), group_ids=group_ids)
        level = level.to("cpu", torch.float32)  # as upstream's forecast, whatever the program's default
        alone = copy.copy(self)  # of this call: threads may share a pipeline
        if hasattr(self.model, "route") and len(group_ids.unique()) < len(target_idx_ranges):
            alone.model = RoutedBySeries(self.model, series_of_rows(target_idx_ranges, len(context)))
        whole = [(0, len(context))]
        [forecast] = super(ChronoMoEPipeline, alone)._predict_batch(
            context, group_ids, future_covariates, *rest, target_idx_ranges=whole, **options
        )
        ordered = put_in_order(forecast, level=level)
        parts = [ordered[first:last] for first, last in target_idx_ranges]
        found = with_bands(self.model, parts, context, target_idx_ranges)
        rank = torch.tensor(self.quantiles).argsort().argsort()  # levels may come in any order
        return list(found) if rank.diff().gt(0).all() else [part[:, rank] for part in found]

    def fit(
        self,
        inputs: Inputs,
        prediction_length: int,
        validation_inputs: Inputs | None = None,
        finetune_mode: Literal["full", "lora"] = "full",
        lora_config: "LoraConfig | dict[str, Any] | None" = None,
        context_length: int | None = None,
        learning_rate: float | None = None,
        num_steps: int = 1000,
        batch_size: int = 256,
        output_dir: Path | str | None = None,
        min_past: int | None = None,
        finetuned_ckpt_name: str = "finetuned-ckpt",
        callbacks: "list[TrainerCallback] | None" = None,
        remove_printer_callback: bool = False,
        disable_data_parallel: bool = True,
        **extra_trainer_kwargs: Any,
    ) -> "ChronoMoEPipeline":
        """Fine-tune a copy of the model and return it in a new pipeline.

        The arguments are those of ``Chronos2Pipeline.fit``, which does the work for plain Chronos-2 models. "full"
        trains all weights, experts and routers alike; where MoE layers were inserted into a finished model, those
        alone. "lora" (Hu et al., 2021, https://arxiv.org/abs/2106.09685) trains adapters in attention and head, those
        of every expert of a mixture, and the router of a mixture in full; MoE layers inside a model stay.

        ``learning_rate`` is upstream's 1e-6 unless given, but 1e-3 for inserted layers, which start as the identity.

        The result is saved to ``output_dir / finetuned_ckpt_name``: a checkpoint, or with "lora" the adapters and the
        name of the checkpoint that they change. Where none holds the model as it was, it is saved beside them, in a
        folder whose name ends in "-base". ``from_pretrained`` loads and merges both; the pipeline returned is merged
        already, and its ``save_pretrained`` writes one whole checkpoint.

        Raises:
            InputError: the mode does not exist, the model has none of its kind (see ``training.finetuning``), or its
                bands were recalibrated, which would not fit the new weights.
        """
        if finetune_mode not in ("full", "lora"):
            raise InputError(f"finetune_mode must be 'full' or 'lora', got {finetune_mode!r}")
        check_trainable(self.model)
        context_length = context_length or self.model_context_length
        if learning_rate is None:
            grown = finetune_mode == "full" and isinstance(self.model, MoEEnhancedChronos2)
            learning_rate = 1e-3 if grown else 1e-6
        output_dir = Path(output_dir or Path("chronos-2-finetuned") / time.strftime("%Y-%m-%d_%H-%M-%S"))
        arguments: dict[str, Any] = {
            "inputs": inputs,
            "prediction_length": prediction_length,
            "validation_inputs": validation_inputs,
            "finetune_mode": finetune_mode,
            "lora_config": lora_config,
            "context_length": context_length,
            "learning_rate": learning_rate,
            "num_steps": num_steps,
            "batch_size": batch_size,
            "output_dir": output_dir,
            "min_past": prediction_length if min_past is None else min_past,
            "callbacks": callbacks,
            "remove_printer_callback": remove_printer_callback,
            "disable_data_parallel": disable_data_parallel,
        }
        from chronomoe.training.finetuning import extend, finetune  # transformers.Trainer: slow to import

        model: Any
        if isinstance(self.model, DistilledMoE | SparseChronos2Model):
            model = finetune(self.model, **arguments, trainer_options=extra_trainer_kwargs)
        else:
            model = super().fit(**arguments, finetuned_ckpt_name=finetuned_ckpt_name, **extra_trainer_kwargs).model
        folder = output_dir / finetuned_ckpt_name
        if hasattr(model, "merge_and_unload"):  # a peft.PeftModel
            save_adapters(model, extend(copy.deepcopy(self.model).float(), context_length, prediction_length), folder)
            return ChronoMoEPipeline(merge(model))
        tuned = ChronoMoEPipeline(model)
        tuned.save_pretrained(folder)
        return tuned

    def set_routing(
        self,
        *,
        top_k: int | None = None,
        temperature: float | None = None,
        threshold: float | None | Literal["keep"] = "keep",
        fallback: Literal["none", "equal", "generalist"] | None = None,
        fallback_below: float | None = None,
    ) -> None:
        """Change how a mixture chooses its experts; what is not given stays. See ``RoutingConfig``.

        Args:
            top_k: experts of a series.
            temperature: divides the router's scores.
            threshold: probability that the chosen experts reach together (dynamic K), None to turn it off.
            fallback: what happens where the router is unsure.
            fallback_below: the probability below which it is.
        """
        wishes = {"top_k": top_k, "temperature": temperature, "fallback": fallback, "fallback_below": fallback_below}
        changes: dict[str, Any] = {name: value for name, value in wishes.items() if value is not None}
        if threshold != "keep":
            changes["threshold"] = threshold
        mixture = self._mixture("set_routing")
        routing = replace(mixture.moe.routing, **changes)
        if routing.fallback == "generalist" and mixture.generalist is None:
            names = ", ".join(mixture.config.expert_names)
            raise InputError(f"fallback 'generalist' needs an expert named 'generalist', got {names}; use 'equal'")
        mixture.set_routing(routing)

    @torch.no_grad()
    def routing(
        self, inputs: Inputs, *, batch_size: int = 256, context_length: int | None = None
    ) -> list[dict[str, float]]:
        """Tell which experts forecast each series, best first, and how much each counts: ``{expert name: gate}``.

        The inputs are those of ``predict``. Horizons beyond one pass are routed anew for each pass; this is the first.

        Examples:
            >>> student = create_student_model(load_teacher("tiny"), "slim")
            >>> pipeline = ChronoMoEPipeline(build_mixture({"load": student, "sales": student}))
            >>> pipeline.set_routing(top_k=1, threshold=None)
            >>> [list(gates.values()) for gates in pipeline.routing([np.arange(60.0) % 7])]
            [[1.0]]
        """
        mixture = self.model if hasattr(self.model, "route") else self._mixture("routing")
        known = without_future(inputs)
        answer = []
        for batch in self._dataset(known, horizon=0, batch_size=batch_size, context_length=context_length):
            context = batch["context"].to(device=mixture.device, dtype=torch.float32)
            chosen = mixture.route(context, group_ids=batch["group_ids"].to(mixture.device))
            for first, _ in batch["target_idx_ranges"]:
                pairs = zip(chosen.expert[first].tolist(), chosen.gate[first].tolist(), strict=True)
                answer.append({mixture.config.expert_names[expert]: gate for expert, gate in pairs if gate > 0})
        return answer

    def _dataset(self, inputs: Inputs, *, horizon: int, batch_size: int, context_length: int | None) -> Any:
        limit = self.model_context_length
        sizes = (min(context_length or limit, limit), horizon, batch_size, self.model_output_patch_size)
        return Chronos2Dataset(inputs, *sizes, mode=DatasetMode.TEST)

    def _mixture(self, method: str) -> DistilledMoE:
        if not isinstance(self.model, DistilledMoE):
            raise InputError(
                f"{method} needs a mixture of distilled experts, this pipeline holds a {type(self.model).__name__}"
            )
        return self.model


def load_model(name: str | Path, *, dtype: str | torch.dtype = "float32", **kwargs: Any) -> PreTrainedModel:
    """Load the model of a checkpoint, of Chronos-2 or of ours, in evaluation mode.

    ``ChronoMoEPipeline.from_pretrained`` says what the arguments may be.

    Raises:
        InputError: there is no such checkpoint, it is damaged, or it is of another architecture.
    """
    model: PreTrainedModel = ChronoMoEPipeline.from_pretrained(name, dtype=dtype, **kwargs).model
    return model


def load_teacher(name: str | Path, *, dtype: str | torch.dtype = "float32", **kwargs: Any) -> Chronos2Model:
    """Load a Chronos-2 model to learn from; students are cut from those without MoE layers.

    Raises:
        InputError: the checkpoint is missing, damaged, of another architecture, or a mixture.
    """
    model = load_model(name, dtype=dtype, **kwargs)
    if not isinstance(model, Chronos2Model):
        raise InputError(f"a teacher must be one Chronos-2 model, {str(name)!r} holds a {type(model).__name__}")
    return model
