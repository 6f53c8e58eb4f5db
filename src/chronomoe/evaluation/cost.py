"""What a forecast costs: parameters, operations, time and memory.

Times depend on the machine, its other load and the number of threads, so only ratios of one call of :func:`compare`
mean much: it runs the models in turns, so that whatever slows the machine slows all of them.
"""

import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from chronomoe.errors import InputError
from chronomoe.evaluation.comparison import Comparison, Row
from chronomoe.evaluation.routing import expert_use
from chronomoe.models.mixture.mixture import DistilledMoE
from chronomoe.models.packing import PACKED

WARM_UP = 2  # calls of each kind before the clock counts
ROUNDS_PER_BATCH = 4  # a full batch takes long enough to be steady: it is timed in one round of so many


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """What one model costs, with what it was measured on."""

    parameters: int
    """All parameters, shared ones once."""
    latency_p50_ms: float
    """Median time of one window alone."""
    latency_p95_ms: float
    """95th percentile of that time: on a busy machine, mostly the machine's."""
    batch_seconds: tuple[float, ...]
    """Time of each full batch."""
    memory_mb: float
    """Weights and the most that tensors take while a batch is forecast, in MB; without interpreter and libraries."""
    checkpoint_mb: float
    """Weights as a checkpoint stores them, in MB."""
    batch_size: int
    threads: int
    """Threads torch may use inside one operation."""

    @property
    def throughput(self) -> float:
        """Windows a second in batches of ``batch_size``, from the median time of a batch."""
        return self.batch_size / float(np.median(self.batch_seconds))


def compare(
    models: Mapping[str, nn.Module], context: Float[Tensor, "batch time"], *, horizon: int, repeats: int = 20
) -> dict[str, Efficiency]:
    """Measure models on the same windows, in turns; each is called as a ``Chronos2Model`` is.

    After a warm-up, each of ``repeats`` rounds times one window with every model, back and forth through the models,
    and one round in four the whole batch. How many experts a mixture runs depends on the windows: give it real ones.
    Models run where they are, in evaluation mode, and are left in the mode they were in.
    """
    for name, value in (("horizon", horizon), ("batch_size", len(context)), ("repeats", repeats)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    alone: dict[str, list[float]] = {name: [] for name in models}
    batch: dict[str, list[float]] = {name: [] for name in models}
    training = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
        for rows in (1, len(context)) * WARM_UP:
            _timed_forecast(model, context[:rows], horizon=horizon)
    for index in range(repeats):
        row = index % len(context)
        for name, model in list(models.items())[:: 1 if index % 2 == 0 else -1]:
            alone[name].append(_timed_forecast(model, context[row : row + 1], horizon=horizon))
            if index % ROUNDS_PER_BATCH == 0:
                batch[name].append(_timed_forecast(model, context, horizon=horizon))
    memory = {name: peak_bytes(model, context, horizon=horizon) for name, model in models.items()}
    for name, model in models.items():
        model.train(training[name])
    return {
        name: Efficiency(
            parameters=count_parameters(model),
            latency_p50_ms=1000 * float(np.median(alone[name])),
            latency_p95_ms=1000 * float(np.quantile(alone[name], 0.95)),
            batch_seconds=tuple(batch[name]),
            memory_mb=memory[name] / 1e6,
            checkpoint_mb=weight_bytes(model) / 1e6,
            batch_size=len(context),
            threads=torch.get_num_threads(),
        )
        for name, model in models.items()
    }


def cost_records(
    comparison: Comparison, measured: Mapping[str, Efficiency], context: Float[Tensor, "batch time"], *, horizon: int
) -> list[dict[str, Any]]:
    """Return what each row of a comparison costs.

    ``experts`` that run for one forecast, on average over test windows; parameters and operations that are active then;
    ``training`` with all a row was made from; times and sizes where they were ``measured``. A row that cannot be used
    (an oracle) has no cost.
    """
    dense = {name: one.model for name, one in comparison.candidates.items() if not isinstance(one.model, DistilledMoE)}
    flops = {name: count_flops(model, context[:1], horizon=horizon) for name, model in dense.items()}
    active = {name: count_active_parameters(comparison.candidates[name].model) for name in flops}
    records = []
    for name, row in comparison.rows.items():
        if row.routed:
            model = comparison.candidates[row.needs[0]].model
            experts, parameters, operations = _routed_cost(model, row, context, horizon=horizon)
        elif row.runs:
            experts = sum(row.runs.values())
            parameters, operations = (sum(share * of[one] for one, share in row.runs.items()) for of in (active, flops))
        else:
            continue
        training, seconds = comparison.training(name)
        record = {"model": name, "kind": row.kind, "experts": experts, "active_parameters": parameters}
        record |= {"flops": operations, "training": training, "core_seconds": seconds}
        if name in measured:
            record |= asdict(measured[name]) | {"throughput": measured[name].throughput}
        records.append(record)
    return records


def _routed_cost(
    mixture: DistilledMoE, row: Row, context: Float[Tensor, "batch time"], *, horizon: int
) -> tuple[float, float, float]:
    """Return the mean number of experts of a mixture, and the parameters and operations that go with it."""
    use = np.mean([expert_use(routing) for routing in row.routed.values()], axis=0)
    parameters = [count_parameters(expert) for expert in mixture.members()]
    operations = [count_flops(expert, context[:1], horizon=horizon) for expert in mixture.members()]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        mixture.route(context[:1].to(mixture.device))
    router = (count_parameters(mixture.router), counter.get_total_flops())
    count = len(use)  # an average of experts does without the teacher
    return float(use.sum()), float(use @ parameters[:count] + router[0]), float(use @ operations[:count] + router[1])


def count_parameters(model: nn.Module) -> int:
    """Count all parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_active_parameters(model: nn.Module) -> int:
    """Return what the model's own ``active_parameters()`` says, or all parameters where it has none."""
    own = getattr(model, "active_parameters", None)
    return int(own()) if callable(own) else count_parameters(model)


def count_flops(model: nn.Module, context: Float[Tensor, "batch time"], *, horizon: int) -> int:
    """Count floating point operations of a forecast of independent rows.

    Attention runs as plain matrix products here: torch's counter does not see its fused CPU kernel.
    """
    counter = FlopCounterMode(display=False, custom_mapping=PACKED)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _forecast(model, context[:1], horizon=horizon)  # what is computed once and kept is no forecast's cost
        with counter:
            _forecast(model, context, horizon=horizon)
    return int(counter.get_total_flops())


def weight_bytes(model: nn.Module) -> int:
    """Return the size of a model's weights."""
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


def peak_bytes(model: nn.Module, context: Float[Tensor, "batch time"], *, horizon: int) -> int:
    """Return the size of the weights and the most that tensors take beside them while a batch is forecast.

    Counted from allocations, so that neither the interpreter nor anything else in this process is in it.
    """
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _timed_forecast(model, context, horizon=horizon)
        return weight_bytes(model) + int(torch.cuda.max_memory_allocated(device) - before)
    with torch.no_grad():
        return weight_bytes(model) + live_bytes(lambda: _forecast(model, context, horizon=horizon))


def live_bytes(call: Callable[[], None]) -> int:
    """Return the most that tensors made in a call take at once."""
    with _LiveTensors() as live:
        call()
    return int(live.peak)


def holder(tensor: Tensor) -> Any:
    """Return what holds a tensor's numbers: its storage, or itself where they are packed."""
    return tensor if tensor.is_mkldnn else tensor.untyped_storage()


class _LiveTensors(TorchDispatchMode):
    """Watches the size of all storages made within it and still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.held, self.peak = 0, 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {holder(tensor)._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (place := holder(tensor))._cdata not in self._seen | given:
                size = tensor.nbytes if place is tensor else place.nbytes()
                self._seen.add(place._cdata)
                self.held += size
                weakref.finalize(place, self._freed, place._cdata, size)
        self.peak = max(self.peak, self.held)
        return made

    def _freed(self, place: int, size: int) -> None:
        self._seen.discard(place)
        self.held -= size


def varied_context(rows: int, *, context_length: int, seed: int = 0) -> Float[Tensor, "rows context_length"]:
    """Make windows unlike each other: waves of many periods, walks and noise in different proportions."""
    if context_length < 1:
        raise InputError(f"context_length must be at least 1, got {context_length}")
    rng = torch.Generator().manual_seed(seed)
    period = 2 ** (1 + 7 * torch.rand(rows, 1, generator=rng))
    wave = torch.sin(2 * torch.pi * torch.arange(context_length) / period)
    walk = torch.randn(rows, context_length, generator=rng).cumsum(dim=1) / context_length**0.5
    noise = torch.randn(rows, context_length, generator=rng)
    share = torch.rand(3, rows, 1, generator=rng)
    context: Tensor = share[0] * wave + share[1] * walk + share[2] * noise
    return context


def _forecast(model: nn.Module, context: Float[Tensor, "batch time"], *, horizon: int) -> None:
    patch_size: int = model.chronos_config.output_patch_size  # type: ignore[union-attr, assignment]
    device = next(model.parameters()).device
    model(
        context=context.to(device),
        group_ids=torch.arange(len(context), device=device),
        num_output_patches=-(-horizon // patch_size),
    )
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed_forecast(model: nn.Module, context: Float[Tensor, "batch time"], *, horizon: int) -> float:
    with torch.inference_mode():
        start = time.perf_counter()
        _forecast(model, context, horizon=horizon)
        return time.perf_counter() - start
