"""How an MoE layer is made (routes 2 and 3); that of route 1 is ``MixtureConfig``."""

import math
from typing import Literal

from pydantic import Field

from chronomoe.errors import InputError
from chronomoe.models.configuration import Blocks, Seed, configuration


@configuration
class MoEConfig:
    """Experts, routing and balance of MoE layers."""

    num_experts: int = Field(8, ge=1)
    """Experts of a layer, the shared one not counted."""
    top_k: int = Field(2, ge=1)
    """Experts of a token."""
    granularity: int = Field(1, ge=1)
    """Slices that a dense block is cut into: each expert is a copy of the block at 1, a part of one above it."""
    expert_width: int | None = Field(None, ge=1)
    """Hidden units of an expert; when None, what ``granularity`` and ``shared_width`` leave it of the dense block."""
    shared_width: int = Field(0, ge=0)
    """Hidden units of an expert that every token uses; 0 for none."""
    capacity_factor: float | None = Field(None, gt=0)
    """An expert takes at most this multiple of its even share of the choices; None for no limit."""
    gating: Literal["softmax_then_top_k", "top_k_then_softmax"] = "softmax_then_top_k"
    """Gates from the softmax over all experts or over the chosen ones; at ``top_k=1`` the latter are constant, so the
    forecast teaches the router nothing."""
    balance: Literal["l2", "switch", "none"] = "switch"
    """The balance loss. "l2" looks at mean probabilities alone: while a router is unsure they are even whatever it
    chooses, and nothing keeps experts from dying; "switch" counts choices as well."""
    z_weight: float = Field(0.001, ge=0)
    """Of the z-loss, beside a balance loss of weight 1."""
    bias_rate: float = Field(0.0, ge=0)
    """Step of the loss-free bias; 0 leaves it out."""
    noise: float = Field(0.0, ge=0)
    """Standard deviation of noise on copied experts, relative to that of the weight matrix."""
    reinit: float = Field(0.0, ge=0, le=1)
    """Share of a copied expert's hidden units that are drawn afresh. Both this and noise tell copies apart; without
    them the layer computes at first what the dense block did."""
    layers: Blocks | None = None
    """Encoder blocks that get an MoE layer; all when None."""
    seed: Seed = 0
    """Draws router, noise and fresh units."""

    def __post_init__(self) -> None:
        if self.top_k > self.num_experts:
            raise InputError(f"top_k must be from 1 to {self.num_experts}, the number of experts, got {self.top_k}")
        for name in ("num_experts", "top_k"):
            if getattr(self, name) % self.granularity:
                raise InputError(
                    f"{name} must be a multiple of granularity {self.granularity}, so that it holds whole copies of "
                    f"the dense block, got {getattr(self, name)}"
                )

    @property
    def scale(self) -> float:
        """What the gated sum of experts is multiplied by: see ``Chronos2MoELayer``."""
        if self.gating == "softmax_then_top_k":
            return self.num_experts * self.granularity / self.top_k
        return float(self.granularity)

    def width(self, d_ff: int) -> int:
        """Return the hidden units of an expert in place of a dense block with ``d_ff`` of them.

        Raises:
            InputError: nothing is left beside the shared expert, or it does not divide into slices.
        """
        if self.expert_width is not None:
            return self.expert_width
        return self.slice_width(d_ff)

    def slice_width(self, d_ff: int) -> int:
        """Return the hidden units of a slice of a dense block; see :meth:`width`."""
        left = d_ff - self.shared_width
        if left < 1:
            raise InputError(
                f"shared_width must be below {d_ff}, the hidden units of the dense block, got {self.shared_width}"
            )
        if left % self.granularity:
            raise InputError(
                f"granularity must divide the {left} hidden units that the shared expert leaves of {d_ff}, got "
                f"{self.granularity}; choose another granularity or shared_width"
            )
        return left // self.granularity

    def capacity(self, num_tokens: int) -> int | None:
        """Return the most tokens that an expert takes; None for no limit."""
        if self.capacity_factor is None:
            return None
        return math.ceil(self.capacity_factor * num_tokens * self.top_k / self.num_experts)
