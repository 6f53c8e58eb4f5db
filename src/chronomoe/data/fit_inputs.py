"""Training data in whatever form one has it: as ``Chronos2Pipeline.fit`` takes it, as a frame, a file or a domain."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

import datasets
import pandas as pd
from chronos.chronos2.dataset import Chronos2Dataset, DatasetMode
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from chronomoe.data.batching import without_future
from chronomoe.data.domains import Domain, load_domain
from chronomoe.data.frames import frame_to_series
from chronomoe.data.series import Series
from chronomoe.data.split import Split, Stops
from chronomoe.data.windows import EvaluationWindows, JoinedWindows, TrainingWindows, Window, WindowConfig, cut_window
from chronomoe.errors import InputError
from chronomoe.models.configuration import configuration

WHOLE = Split(train=1.0, test=0.0)
START, FREQ = pd.Timestamp("2000-01-01"), "D"
"""Of series that come without times, which no model reads."""


@configuration
class AllButLast(Split):
    """All of each series trains but its last steps, which validate."""

    steps: int = 0

    def of(self, length: int) -> Stops:
        """Return the stops in a series of ``length`` rows."""
        return Stops(max(length - self.steps, 0), length, length)


def training_windows(
    data: Any, config: WindowConfig, *, size: int, seed: int = 0, leave_last: bool = False, **columns: Any
) -> Dataset[Window]:
    """Draw training windows from data of any form; windows are returned as they are.

    Args:
        data: what ``Chronos2Pipeline.fit`` takes (arrays or tensors, a list of them or of dictionaries with
            ``target``, ``past_covariates`` and ``future_covariates``), a long or wide frame, a ``datasets.Dataset``,
            what ``load_domain`` takes, a ``Domain`` or a list of those. Of a domain, its training part is used; of
            everything else, all. Series of unlike variates and covariates take turns, layout by layout.
        config: context and horizon.
        size: number of windows.
        seed: of the draw.
        leave_last: keep the last horizon of each series, which ``validation_windows`` cuts, out of what is drawn.
        **columns: ``target``, ``known_covariates`` and ``freq`` of frames and files.

    Raises:
        InputError: the data break a rule of their form, or hold no series long enough.
    """
    if are_windows(data):
        return data
    domains = _domains(data, **columns)
    if leave_last:
        split = AllButLast(steps=config.horizon)
        domains = [replace(domain, cutoffs=split) if domain.cutoffs is WHOLE else domain for domain in domains]
    return TrainingWindows(domains, config, size=size, seed=seed)


def validation_windows(data: Any, config: WindowConfig, **columns: Any) -> Dataset[Window]:
    """Cut the last window of each series, as ``Chronos2Pipeline.fit`` does; of domains, all of their validation part.

    Args:
        data: as in ``training_windows``.
        config: context and horizon.
        **columns: as in ``training_windows``.

    Raises:
        InputError: the data break a rule of their form, or hold no series long enough.
    """
    if are_windows(data):
        return data
    domains = _domains(data, **columns)
    if all(domain.cutoffs is not WHOLE for domain in domains):
        return JoinedWindows([EvaluationWindows(domain, config, part="validation") for domain in domains])
    series = [one for domain in domains for one in domain.series]
    shape = {"context_length": config.context_length, "horizon": config.horizon}
    long = [one for one in series if len(one) >= config.horizon + 1]
    if not long:
        raise InputError(f"validation needs a series of more than {config.horizon} steps, the horizon, got none")
    last: Any = [cut_window(one, len(one) - config.horizon, index=place, **shape) for place, one in enumerate(long)]
    return last  # type: ignore[no-any-return]


def windows_for(model: PreTrainedModel, *, prediction_length: int, context_length: int) -> WindowConfig:
    """Return the shape of windows to train a model on; the context is the model's where that is shorter.

    Raises:
        InputError: the model forecasts fewer steps in one pass.
    """
    limits = model.chronos_config
    longest = limits.max_output_patches * limits.output_patch_size
    if prediction_length > longest:
        raise InputError(
            f"prediction_length must be at most {longest}, what this model forecasts in one pass, got "
            f"{prediction_length}; train on that: longer ones are unrolled when forecasting"
        )
    context_length = min(context_length, limits.context_length)
    least = min(context_length, WindowConfig().min_context_length)
    return WindowConfig(context_length=context_length, horizon=prediction_length, min_context_length=least)


def are_windows(data: Any) -> TypeGuard[Dataset[Window]]:
    """Whether these are windows, already cut."""
    return isinstance(data, Dataset) or (isinstance(data, Sequence) and len(data) > 0 and isinstance(data[0], Window))


def _domains(data: Any, **columns: Any) -> list[Domain]:
    if isinstance(data, pd.DataFrame):
        return [Domain(name="frame", series=frame_to_series(data, **columns), seasonality=1, cutoffs=WHOLE)]
    if isinstance(data, datasets.Dataset):
        return [load_domain(data, split=WHOLE, **columns)]
    if isinstance(data, Domain | str | Path):
        data = [data]
    if isinstance(data, Sequence) and data and isinstance(data[0], Domain | str | Path):
        return [one if isinstance(one, Domain) else load_domain(one, **columns) for one in data]
    if columns:
        raise InputError(f"{', '.join(columns)} name columns of a frame or file, got a {type(data).__name__}")
    return _as_fit_takes(data)


def _as_fit_takes(data: Any) -> list[Domain]:
    """Let upstream prepare its inputs, categories included, and sort the series by layout."""
    try:
        prepared = Chronos2Dataset(
            without_future(data),
            context_length=1,
            prediction_length=0,
            batch_size=1,
            output_patch_size=1,
            mode=DatasetMode.TEST,
        ).inputs
    except (TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"training data must be a frame, a file, a domain or what Chronos2Pipeline.fit takes, got "
            f"{type(data).__name__}: {reason}"
        ) from error
    layouts: dict[tuple[int, int, int], list[Series]] = {}
    for place, one in enumerate(prepared):
        targets, covariates, known = one["n_targets"], one["n_covariates"], one["n_future_covariates"]
        rows = one["context"].numpy()
        names = [f"covariate-{number}" for number in range(covariates)]
        layouts.setdefault((targets, covariates, known), []).append(
            Series(
                item_id=str(place),
                start=START,
                freq=FREQ,
                target=rows[:targets],
                target_names=tuple(f"target-{number}" for number in range(targets)),
                covariates=dict(zip(names, rows[targets:], strict=True)),
                known=tuple(names[covariates - known :]),
            )
        )
    return [
        Domain(
            name=f"series of {targets} variates and {covariates} covariates", series=found, seasonality=1, cutoffs=WHOLE
        )
        for (targets, covariates, _), found in layouts.items()
    ]
