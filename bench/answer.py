"""What benchmarks share: taking sides in turns, a full-size Chronos-2, and the one JSON line of an answer.

Times are of the wall clock, for cores that nothing else uses. ``BENCH_CLOCK=cpu`` counts processor time instead, which
other work on the machine disturbs less; it says nothing about threads.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from chronos.chronos2 import Chronos2Model
from chronos.chronos2.config import Chronos2CoreConfig

from chronomoe.models.chronos2 import ExactChronos2Model, use_exact_group_attention
from chronomoe.models.folded import computing_in
from chronomoe.models.mixture.mixture import DistilledMoE, MixtureConfig, build_mixture
from chronomoe.models.mixture.router import RoutingConfig
from chronomoe.models.student import StudentConfig, create_student_model
from chronomoe.pretraining.teacher import QUANTILE_LEVELS

CLOCK = "cpu" if os.environ.get("BENCH_CLOCK") == "cpu" else "wall"
clock: Callable[[], float] = time.process_time if CLOCK == "cpu" else time.perf_counter
Seconds = dict[str, list[float]]
FULL_SIZE = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""Of processors, as far as they change what is fastest."""
SURE = 150.0
"""Multiplies the scores of a fresh router, whose probabilities are nearly equal."""


def in_turns(sides: Mapping[str, Callable[[], object]], *, repeats: int, warm_up: int = 1) -> Seconds:
    """Time every side once a turn, the first one last in every other turn."""
    seconds: Seconds = {name: [] for name in sides}
    for turn in range(repeats + warm_up):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            begin = clock()
            sides[name]()
            if turn >= warm_up:
                seconds[name].append(clock() - begin)
    return seconds


def ratio(seconds: Seconds, *, over: str, under: str) -> float:
    """Return how often ``under`` goes into ``over``: the median over turns, so that other load meets both."""
    return round(statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True)), 3)


def medians(seconds: Seconds) -> dict[str, float]:
    """Return the median milliseconds of each side."""
    return {name: round(1000 * statistics.median(times), 3) for name, times in seconds.items()}


def answer(question: str, *, reach: Mapping[str, object] | None = None, **facts: object) -> None:
    """Print the JSON line: the question, what was found, and what is needed to compare it later.

    ``reach`` names the figures of the table: ``{"measure": value}``.
    """
    line = {
        "question": question,
        "reach": dict(reach or {}),
        **facts,
        "clock": CLOCK,
        "threads": torch.get_num_threads(),
    }
    line |= {
        "machine": machine(),
        "versions": {name: version(name) for name in ("chronomoe", "torch", "chronos-forecasting")},
    }
    print(json.dumps(line))


def machine() -> dict[str, object]:
    """Say which processor this is."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    found = {key.strip(): value.strip() for key, value in lines.items()}
    flags = found.get("flags", "").split()
    return {
        "processor": found.get("model name", platform.machine()),
        "cores": os.cpu_count(),
        "flags": [name for name in FEATURES if name in flags],
    }


def batch_options(question: str | None, *, batch_sizes: list[int]) -> argparse.Namespace:
    """Read the options of a benchmark that forecasts batches with a mixture of a preset."""
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument("--context-length", type=int, default=512)
    parser.add_argument("--horizon", type=int, default=96)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=batch_sizes)
    parser.add_argument("--num-experts", type=int, default=4)
    parser.add_argument("--preset", default="slim")
    parser.add_argument("--layers", type=int, default=12, help="of the teacher; 12 is the full size")
    parser.add_argument("--repeats", type=int, help="turns of each batch instead of those that suit its size")
    return parser.parse_args()


def full_size(**sizes: int) -> Chronos2Model:
    """Make a model of the size of amazon/chronos-2 with random weights: time does not depend on them."""
    torch.manual_seed(0)
    settings = {
        "context_length": 8192,
        "input_patch_size": 16,
        "input_patch_stride": 16,
        "output_patch_size": 16,
        "max_output_patches": 64,
        "quantiles": list(QUANTILE_LEVELS),
        "use_reg_token": True,
        "use_arcsinh": True,
    }
    core = Chronos2CoreConfig(**FULL_SIZE | sizes, dropout_rate=0.0, chronos_config=settings)
    return Chronos2Model(core).eval()


def exact(model: Chronos2Model) -> ExactChronos2Model:
    """Return a copy with our forward pass."""
    copied = Chronos2Model(model.config).eval()
    copied.load_state_dict(model.state_dict())
    return use_exact_group_attention(copied)


def mixture_of(teacher: Chronos2Model, *, preset: str, num_experts: int, top_k: int = 2) -> DistilledMoE:
    """Make a mixture of students of a preset whose router is sure of most rows, as a trained one is."""
    size = StudentConfig.preset(preset, teacher)
    experts = {f"expert-{index}": create_student_model(teacher, size) for index in range(num_experts)}
    mixture = build_mixture(experts, MixtureConfig(routing=RoutingConfig(top_k=top_k))).eval()
    with torch.no_grad():
        mixture.router.network[-1].weight.mul_(SURE)
    return mixture


def forecast(
    model: torch.nn.Module, context: torch.Tensor, *, horizon: int, dtype: torch.dtype = torch.float32
) -> Callable[[], object]:
    """Return what forecasts once, of rows that are groups of their own; upstream computes in bf16 by autocast."""
    patches = -(-horizon // model.chronos_config.output_patch_size)
    group_ids = torch.arange(len(context))
    autocast = dtype != torch.float32 and type(model) is Chronos2Model

    def run() -> object:
        with torch.inference_mode(), computing_in(dtype), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(context=context, group_ids=group_ids, num_output_patches=patches)

    return run
