"""Running an exported graph, called as the model that it was made of."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chronos.chronos2.config import Chronos2ForecastingConfig
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PretrainedConfig

from chronomoe.checkpoints.bands import read_bands
from chronomoe.checkpoints.finding import GRAPH, read_config
from chronomoe.errors import InputError
from chronomoe.export.engines import ENGINES
from chronomoe.export.form import known_ahead
from chronomoe.models.mixture.mixture import DistilledMoEOutput
from chronomoe.models.mixture.router import Routing


class OnnxModel:
    """A student or mixture as an ONNX graph. It forecasts; it does not train, embed or give attention weights.

    Called as ``Chronos2Model.forward`` is, and for mixtures with ``route_ids`` as :class:`DistilledMoE`.

    Args:
        folder: holds ``model.onnx`` and the ``config.json`` of the model it was made of.
        backend: what runs it, "onnx" or "openvino"; the one that it was exported for when None.
        threads: for one forecast; as many as torch uses when None.

    Raises:
        InputError: there is no exported model in the folder, or the runtime is not installed or cannot read it.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, folder: str | Path, *, backend: str | None = None, threads: int | None = None) -> None:
        place = Path(folder).expanduser()
        for name in (GRAPH, "config.json"):
            if not (place / name).is_file():
                raise InputError(
                    f"no exported model in {str(folder)!r}: it has no {name}; make one with chronomoe export"
                )
        self._path = path = place / GRAPH
        values = read_config(place, {})
        try:
            self.chronos_config = Chronos2ForecastingConfig(**values["chronos_config"])
            self.config = PretrainedConfig(expert_names=list(values["expert_names"]))
        except (KeyError, TypeError) as error:
            raise InputError(
                f"cannot load {str(folder)!r}: its config.json lacks what an export writes: {error}"
            ) from None
        self.bands = read_bands(str(place), self, {})
        backend = backend or values.get("backend") or "onnx"
        if backend not in ENGINES:
            raise InputError(
                f"cannot load {str(folder)!r}: its backend must be one of {', '.join(ENGINES)}, got {backend!r}"
            )
        self._run_graph = ENGINES[backend](path, threads or torch.get_num_threads())
        self._hooks: list[Callable[..., object]] = []

    def register_forward_hook(self, hook: Callable[..., object]) -> None:
        """Call ``hook(model, inputs, output)`` after each forecast, as ``nn.Module`` does; its result is ignored."""
        self._hooks.append(hook)

    def eval(self) -> "OnnxModel":
        """Return itself, as it is always in evaluation mode."""
        return self

    def to(self, device: torch.device | str) -> "OnnxModel":
        """Stay on the CPU, where the graph runs."""
        if torch.device(device).type != "cpu":
            raise InputError(f"an exported model runs on the CPU, got device {str(device)!r}; use cpu")
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Return the digest of the graph, which tells one model from another."""
        with self._path.open("rb") as graph:
            digest = hashlib.file_digest(graph, "sha256").digest()
        return {GRAPH: torch.frombuffer(bytearray(digest), dtype=torch.uint8)}

    def __call__(
        self,
        context: Float[Tensor, "batch time"],
        *,
        group_ids: Int[Tensor, " batch"] | None = None,
        route_ids: Int[Tensor, " batch"] | None = None,
        future_covariates: Float[Tensor, "batch known"] | None = None,
        num_output_patches: int = 1,
    ) -> DistilledMoEOutput:
        """Forecast; ``quantile_preds`` is ``(batch, quantile, horizon)`` in the unit of each series."""
        limit, steps = (
            self.chronos_config.max_output_patches,
            num_output_patches * self.chronos_config.output_patch_size,
        )
        if not 1 <= num_output_patches <= limit:
            raise InputError(f"num_output_patches must be from 1 to {limit}, got {num_output_patches}")
        ahead = known_ahead(future_covariates, rows=len(context), steps=steps)
        quantiles, gates = self._run(["quantile_preds", "gates"], context, group_ids, route_ids, ahead)
        output = DistilledMoEOutput(quantile_preds=torch.from_numpy(quantiles), routing=_routing(gates))
        for hook in self._hooks:
            hook(self, (context,), output)
        return output

    def route(self, context: Float[Tensor, "batch time"], *, group_ids: Int[Tensor, " batch"] | None = None) -> Routing:
        """Choose experts for each row; probabilities and scores are not part of the graph, gates stand for them."""
        ahead = known_ahead(None, rows=len(context), steps=1)
        return _routing(*self._run(["gates"], context, group_ids, None, ahead))

    def __getattr__(self, name: str) -> Any:
        if name in ("encode", "save_pretrained", "train", "parameters", "named_modules"):
            raise InputError(f"an exported model only forecasts, it has no {name}; load the checkpoint it was made of")
        raise AttributeError(name)

    def _run(
        self,
        outputs: list[str],
        context: Tensor,
        group_ids: Tensor | None,
        route_ids: Tensor | None,
        future: Tensor,
    ) -> list[np.ndarray]:
        groups = torch.arange(len(context)) if group_ids is None else group_ids
        inputs = {
            "context": context[:, -self.chronos_config.context_length :].float(),
            "group_ids": groups,
            "route_ids": groups if route_ids is None else route_ids,
            "future_covariates": future,
        }
        arrays = {name: np.ascontiguousarray(part.numpy()) for name, part in inputs.items()}
        return self._run_graph(outputs, arrays)


def _routing(gates: np.ndarray) -> Routing:
    prob = torch.from_numpy(gates)
    gate, expert = prob.sort(dim=1, descending=True, stable=True)
    return Routing(expert, gate, prob, prob)
