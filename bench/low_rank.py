"""What do low-rank experts save in memory, and what do they cost in time, against whole ones?

Students of the size of the demo's, cut from the teacher that ships, with random changes; K = 1. Memory counts every
tensor that experts hold after a batch: weights, those folded for inference, and changes; of a student likewise.
"""

import argparse
import copy
from collections.abc import Iterator

import torch
from answer import SURE, answer, forecast, in_turns, medians, ratio
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from chronomoe import StudentConfig, create_student_model, load_teacher
from chronomoe.evaluation.cost import holder
from chronomoe.models.mixture.compression import with_whole_experts
from chronomoe.models.mixture.mixture import DistilledMoE, MixtureConfig, build_mixture
from chronomoe.models.mixture.router import RoutingConfig


def tensors(expert: nn.Module) -> Iterator[Tensor]:
    """Yield what an expert holds: weights, and those folded for inference."""
    yield from expert.state_dict().values()
    for folded in getattr(expert.__dict__.get("_folds"), "kept", {}).values():
        yield folded.embed_out
        for block in folded.blocks:
            yield from (weight for weight in tree_leaves(tuple(block)) if weight is not None)


def held(*parts: Iterator[Tensor]) -> int:
    """Return the bytes of tensors, each storage once."""
    places = {holder(tensor)._cdata: tensor.nbytes for part in parts for tensor in part}
    return sum(places.values())


def size_of(mixture: DistilledMoE) -> int:
    experts = mixture.get_submodule("experts")
    if mixture.config.low_rank is None:
        return held(*(tensors(expert) for expert in mixture.experts))
    return held(iter(experts.state_dict().values()), *(tensors(expert) for expert in experts._made.values()))


def make(student: nn.Module, num_experts: int, rank: int) -> DistilledMoE:
    """Make a low-rank mixture of one student, whose changes are drawn."""
    generator = torch.Generator().manual_seed(0)
    pair = build_mixture({"a": student, "b": student}, MixtureConfig(routing=RoutingConfig(top_k=1))).eval()
    config = copy.deepcopy(pair.config)
    config.experts, config.low_rank = config.experts[:1] * num_experts, rank
    config.expert_names = [f"e{index}" for index in range(num_experts)]
    mixture = DistilledMoE(config).eval()
    experts = mixture.get_submodule("experts")
    experts.base.load_state_dict(student.state_dict())
    for name, value in experts.named_buffers():
        if name.startswith(("up", "down")):
            value.copy_(torch.randint(-127, 128, value.shape, generator=generator, dtype=torch.int8))
        elif name.startswith("scale"):
            value.fill_(1e-6)
    with torch.no_grad():
        mixture.router.network[-1].weight.mul_(SURE)
    return mixture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 32, 128])
    parser.add_argument("--timed", type=int, nargs="*", default=[4, 32], help="Numbers of experts to take the time of.")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    student = create_student_model(load_teacher("tiny"), StudentConfig(num_layers=options.layers)).eval()
    context = torch.randn(max(options.batch_sizes), 432).cumsum(dim=1)
    forecast(student, context[:1], horizon=48)()
    one = held(tensors(student))
    memory: dict[int, float] = {}
    cases = []
    for count in options.experts:
        mixture = make(student, count, options.rank)
        forecast(mixture, context, horizon=48)()
        memory[count] = round(size_of(mixture) / one, 3)
        if count not in options.timed:
            continue
        roomy = copy.deepcopy(mixture)
        roomy.get_submodule("experts").keep = count
        sides = {"low-rank": mixture, "low-rank, all kept": roomy, "whole": with_whole_experts(mixture)}
        for size in options.batch_sizes:
            seconds = in_turns(
                {name: forecast(model, context[:size], horizon=48) for name, model in sides.items()},
                repeats=options.repeats,
            )
            used = len(mixture.route(context[:size]).expert.unique())
            case = {"experts": count, "batch": size, "used": used, **medians(seconds)}
            cases.append(case | {"low_rank_over_whole": ratio(seconds, over="low-rank", under="whole")})
    reach = {"memory of 32 low-rank experts against one student": memory.get(32)}
    answer("low-rank experts against whole ones", reach=reach, memory=memory, student_mb=one / 1e6, cases=cases)


if __name__ == "__main__":
    main()
