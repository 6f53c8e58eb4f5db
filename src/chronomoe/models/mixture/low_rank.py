"""Many experts in little memory: each is one common model, changed by matrices of low rank.

Experts that branch from a generalist differ from it by little. The change of each matrix is cut to its largest singular
values (Eckart & Young, 1936, https://doi.org/10.1007/BF02288367), the factors are those of LoRA (Hu et al., 2021,
https://arxiv.org/abs/2106.09685), kept as int8 with a scale for each pair of vectors. Vectors (norms, biases) are kept
whole.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from chronos.chronos2 import Chronos2Model
from chronos.chronos2.config import Chronos2CoreConfig
from torch import Tensor, nn

from chronomoe.models.chronos2 import ExactChronos2Model, use_exact_group_attention

MOST = 127.0
PARTS = ("up", "down", "scale")


class LowRankExperts(nn.Module):
    """A sequence of experts, each made when it is asked for, of ``base`` and the expert's own changes.

    The ``keep`` that were made last are kept, one unless it is set: two whole models are in memory then, whatever the
    number of experts. They forecast; what is trained are whole experts.
    """

    keep: int = 1

    def __init__(self, cores: Sequence[Chronos2CoreConfig], *, rank: int) -> None:
        super().__init__()
        self.base = use_exact_group_attention(Chronos2Model(copy.deepcopy(cores[0]))).requires_grad_(False)
        self.cores, self.rank = list(cores), rank
        self._made: dict[int, ExactChronos2Model] = {}  # replaced, never changed: threads may share it
        count = len(cores)
        for name, weight in self.base.named_parameters():
            key = _key(name)
            if weight.ndim == 2 and rank * sum(weight.shape) < weight.numel():
                self.register_buffer(f"up-{key}", torch.zeros(count, weight.shape[0], rank, dtype=torch.int8))
                self.register_buffer(f"down-{key}", torch.zeros(count, rank, weight.shape[1], dtype=torch.int8))
                self.register_buffer(f"scale-{key}", torch.zeros(count, rank))
            else:
                self.register_buffer(f"whole-{key}", torch.zeros(count, *weight.shape))

    def __len__(self) -> int:
        return len(self.cores)

    def __iter__(self) -> Iterator[ExactChronos2Model]:
        return (self[index] for index in range(len(self)))

    @torch.no_grad()
    def __getitem__(self, index: int) -> ExactChronos2Model:
        """Return an expert, made anew unless it is kept."""
        index = range(len(self))[index]
        found = self._made.get(index)
        if found is not None:
            return found
        expert: ExactChronos2Model = copy.deepcopy(self.base).eval()
        expert.config.provenance = getattr(self.cores[index], "provenance", None)
        for name, weight in expert.named_parameters():
            weight.add_(self._change(index, _key(name)).to(weight.dtype))
        if not expert.shared.weight.is_meta:  # where weights are still to come
            latest = list(self._made.items())[-(self.keep - 1) :] if self.keep > 1 else []
            self._made = {**dict(latest), index: expert}
        return expert

    def _change(self, index: int, key: str) -> Tensor:
        whole = self._buffers.get(f"whole-{key}")
        if whole is not None:
            return whole[index]
        up, down, scale = (self.get_buffer(f"{part}-{key}")[index].float() for part in PARTS)
        return (up * scale) @ down

    @torch.no_grad()
    def put(self, index: int, weights: Mapping[str, Tensor]) -> None:
        """Keep an expert's weights, cut to the rank."""
        self._made = {}
        for name, weight in self.base.named_parameters():
            key, change = _key(name), weights[name].to(weight) - weight
            whole = self._buffers.get(f"whole-{key}")
            if whole is not None:
                whole[index] = change
                continue
            left, size, right = torch.linalg.svd(change.float(), full_matrices=False)
            up, down = left[:, : self.rank], right[: self.rank]
            most = up.abs().amax(dim=0), down.abs().amax(dim=1)
            self.get_buffer(f"up-{key}")[index] = (up / most[0] * MOST).round().to(torch.int8)
            self.get_buffer(f"down-{key}")[index] = (down / most[1][:, None] * MOST).round().to(torch.int8)
            self.get_buffer(f"scale-{key}")[index] = size[: self.rank] * most[0] * most[1] / MOST**2

    def _apply(self, fn: Any, recurse: bool = True) -> "LowRankExperts":
        self._made = {}
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._made = {}
        super()._load_from_state_dict(*args, **kwargs)


def _key(name: str) -> str:
    """Return the name of a parameter as that of a buffer, which holds no dots."""
    return name.replace(".", "-")


def make_experts(cores: Sequence[Chronos2CoreConfig], *, rank: int | None) -> "LowRankExperts | nn.ModuleList":
    """Return untrained experts: whole ones, or with a rank, changes of one model."""
    if rank is not None:
        return LowRankExperts(cores, rank=rank)
    return nn.ModuleList(use_exact_group_attention(Chronos2Model(core)) for core in cores)
