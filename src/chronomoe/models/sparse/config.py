"""How an MoE layer is made (routes 2 and 3); that of route 1 is ``MixtureConfig``."""

import math
from dataclasses import fields
from typing import Any, Literal

from chronomoe.errors import InputError, nearest
from chronomoe.models.configuration import configuration


@configuration
class MoEConfig:
    """Experts, routing and balance of MoE layers."""

    num_experts: int = 8
    """Experts of a layer, the shared one not counted."""
    top_k: int = 2
    """Experts of a token."""
    granularity: int = 1
    """Slices that a dense block is cut into: each expert is a copy of the block at 1, a part of one above it."""
    expert_width: int | None = None
    """Hidden units of an expert; when None, what ``granularity`` and ``shared_width`` leave it of the dense block."""
    shared_width: int = 0
    """Hidden units of an expert that every token uses; 0 for none."""
    capacity_factor: float | None = None
    """An expert takes at most this multiple of its even share of the choices; None for no limit."""
    gating: Literal["softmax_then_top_k", "top_k_then_softmax"] = "softmax_then_top_k"
    """Gates from the softmax over all experts or over the chosen ones; at ``top_k=1`` the latter are constant, so the
    forecast teaches the router nothing."""
    balance: Literal["l2", "switch", "none"] = "switch"
    """The balance loss. "l2" looks at mean probabilities alone: while a router is unsure they are even whatever it
    chooses, and nothing keeps experts from dying; "switch" counts choices as well."""
    z_weight: float = 0.001
    """Of the z-loss, beside a balance loss of weight 1."""
    bias_rate: float = 0.0
    """Step of the loss-free bias; 0 leaves it out."""
    noise: float = 0.0
    """Standard deviation of noise on copied experts, relative to that of the weight matrix."""
    reinit: float = 0.0
    """Share of a copied expert's hidden units that are drawn afresh. Both this and noise tell copies apart; without
    them the layer computes at first what the dense block did."""
    layers: tuple[int, ...] | None = None
    """Encoder blocks that get an MoE layer; all when None."""
    seed: int = 0
    """Draws router, noise and fresh units."""

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))  # JSON and YAML give lists
        if self.num_experts < 1:
            raise InputError(f"num_experts must be at least 1, got {self.num_experts}")
        if not 1 <= self.top_k <= self.num_experts:
            raise InputError(f"top_k must be from 1 to {self.num_experts}, the number of experts, got {self.top_k}")
        if self.granularity < 1:
            raise InputError(f"granularity must be at least 1, got {self.granularity}")
        for name in ("num_experts", "top_k"):
            if getattr(self, name) % self.granularity:
                raise InputError(
                    f"{name} must be a multiple of granularity {self.granularity}, so that it holds whole copies of "
                    f"the dense block, got {getattr(self, name)}"
                )
        if self.expert_width is not None and self.expert_width < 1:
            raise InputError(f"expert_width must be at least 1, got {self.expert_width}; None derives it")
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise InputError(f"capacity_factor must be positive, got {self.capacity_factor}; None sets no limit")
        if self.gating not in ("softmax_then_top_k", "top_k_then_softmax"):
            raise InputError(f"gating must be 'softmax_then_top_k' or 'top_k_then_softmax', got {self.gating!r}")
        if self.balance not in ("l2", "switch", "none"):
            raise InputError(f"the balance loss must be 'l2', 'switch' or 'none', got {self.balance!r}")
        for name in ("shared_width", "z_weight", "bias_rate", "noise"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.reinit <= 1:
            raise InputError(f"reinit is a share and must be in [0, 1], got {self.reinit}")
        if self.layers is not None and (
            not self.layers or min(self.layers) < 0 or len(set(self.layers)) < len(self.layers)
        ):
            raise InputError(
                f"layers must name encoder blocks from 0, each once, got {list(self.layers)}; None takes all"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MoEConfig":
        """Read what ``dataclasses.asdict`` wrote, straight or through JSON; unknown keys are refused."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise InputError(
                    f"Unknown setting {name!r} of MoE layers. Available: {', '.join(known)}.{nearest(name, known)}"
                )
        layers = values.get("layers")
        return cls(**values | {"layers": None if layers is None else tuple(layers)})

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
        """Return how many tokens an expert takes at most; None for no limit."""
        if self.capacity_factor is None:
            return None
        return math.ceil(self.capacity_factor * num_tokens * self.top_k / self.num_experts)
