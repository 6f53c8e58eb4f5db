"""A sparse feed-forward block for Chronos-2: a router sends each token to a few of many small experts (routes 2 and 3).

It takes the place of a dense feed-forward block: the same layer norm, activation, dropout and residual. Tokens are
sorted by expert, so that each expert is one pair of matrix products over contiguous rows. The names are those of
DeepSeekMoE (Dai et al., 2024, https://arxiv.org/abs/2401.06066): fine-grained experts and a shared one.
"""

from typing import NamedTuple

import torch
from chronos.chronos2.layers import Chronos2LayerNorm, FeedForward
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.activations import ACT2FN

from chronomoe.models.balancing import LossFreeBias, expert_load, load_balancing_loss, z_loss
from chronomoe.models.sparse.config import MoEConfig
from chronomoe.models.sparse.dispatch import run_experts, within_capacity
from chronomoe.models.sparse.init import dense_weights, draw_router, fresh_weights


class TokenRouting(NamedTuple):
    """Which experts each token uses, best first, and how much each counts."""

    expert: Int[Tensor, "token choice"]
    gate: Float[Tensor, "token choice"]  # before the layer's constant scale
    prob: Float[Tensor, "token expert"]  # over all experts
    score: Float[Tensor, "token expert"]  # before the softmax


class MoEAux(NamedTuple):
    """What an MoE layer reports beside its output. Padding counts nowhere."""

    balance_loss: Float[Tensor, ""]  # 0 where no loss is asked for
    z_loss: Float[Tensor, ""]
    load: Float[Tensor, " expert"]  # share of the choices, before capacity; sums to 1
    entropy: Float[Tensor, ""]  # of the router, mean over tokens, in nats
    expert: Int[Tensor, "batch token choice"]  # best first; -1 for padding
    dropped: Float[Tensor, ""]  # share of the choices that capacity dropped


def route_tokens(
    score: Float[Tensor, "token expert"],
    config: MoEConfig,
    *,
    bias: Float[Tensor, " expert"] | None = None,
    whole_copies: bool = False,
) -> TokenRouting:
    """Keep the ``top_k`` experts of the highest scores.

    ``softmax_then_top_k`` takes gates from the softmax over all experts, so that they say how sure the router is and
    reach it with a gradient even at ``top_k=1``; He et al., 2024, https://arxiv.org/abs/2410.07524, find this better
    for upcycled models than ``top_k_then_softmax``, whose gates sum to 1. Experts are ranked by score, which tells
    them apart where probabilities tie in float32.

    Args:
        score: of each expert, float32 or wider.
        config: how many and how.
        bias: added to the scores for the choice, not for the gates (loss-free balancing).
        whole_copies: the slices of a copy have one score, but for rounding: take all of a copy or none.
    """
    ranked = score.detach() if bias is None else score.detach() + bias
    if whole_copies:
        copy = ranked[:, :: config.granularity].topk(config.top_k // config.granularity, dim=-1).indices
        slices = torch.arange(config.granularity, device=score.device)
        expert = (copy[..., None] * config.granularity + slices).flatten(1)
    else:
        expert = ranked.topk(config.top_k, dim=-1).indices
    prob = score.softmax(dim=-1)
    if config.gating == "softmax_then_top_k":
        gate = prob.gather(-1, expert)
    else:
        gate = score.gather(-1, expert).softmax(dim=-1)
    return TokenRouting(expert, gate, prob, score)


class Chronos2MoELayer(nn.Module):
    """A drop-in for Chronos-2's ``FeedForward`` in which each token uses ``top_k`` of ``num_experts`` experts.

    The output is ``hidden + dropout(shared(x) + scale * sum(gate * expert(x)))`` with ``x = layer_norm(hidden)``. Fresh
    from the constructor it is the identity, for every ``wo`` is zero; :meth:`from_dense` starts from a dense block.

    ``scale`` is constant. It undoes what the cut to ``top_k`` takes from even gates, so that equal experts add up to
    one dense block: ``num_experts * granularity / top_k`` for gates from the softmax over all experts, ``granularity``
    for gates that sum to 1.

    The router works in float32 at least, under autocast too.

    Args:
        d_model: width of a token.
        d_ff: hidden units of the dense block that this one stands for.
        config: experts, routing and balance.
        dropout_rate: of hidden units and of the output, as in the dense block.
        layer_norm_epsilon: of the layer norm.
        activation: its name in transformers, or a module.
        scale: in place of the derived one.
        generator: draws router and experts; one with ``config.seed`` when None.

    Raises:
        InputError: the widths do not divide.
    """

    shared_wi: nn.Parameter | None
    shared_wo: nn.Parameter | None

    def __init__(
        self,
        *,
        d_model: int,
        d_ff: int,
        config: MoEConfig,
        dropout_rate: float = 0.0,
        layer_norm_epsilon: float = 1e-6,
        activation: str | nn.Module = "relu",
        scale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.d_model, self.d_ff, self.width = d_model, d_ff, config.width(d_ff)
        self.scale = config.scale if scale is None else scale
        self.layer_norm = Chronos2LayerNorm(d_model, eps=layer_norm_epsilon)
        self.router = nn.Parameter(torch.empty(config.num_experts, d_model))
        self.wi = nn.Parameter(torch.empty(config.num_experts, self.width, d_model))
        self.wo = nn.Parameter(torch.empty(config.num_experts, d_model, self.width))
        if config.shared_width:
            self.shared_wi = nn.Parameter(torch.empty(config.shared_width, d_model))
            self.shared_wo = nn.Parameter(torch.empty(d_model, config.shared_width))
        else:
            self.register_parameter("shared_wi", None)
            self.register_parameter("shared_wo", None)
        self.act = ACT2FN[activation] if isinstance(activation, str) else activation
        if isinstance(self.act, nn.ReLU):
            self.act = nn.ReLU(inplace=True)  # no gradient needs what goes into it
        self.dropout = nn.Dropout(dropout_rate)
        self.balance_bias = LossFreeBias(config.num_experts, rate=config.bias_rate)
        if not self.router.is_meta:
            self.reset_parameters(generator or torch.Generator().manual_seed(config.seed))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Start as the identity: experts are drawn, but what they write is zero."""
        self.layer_norm.weight.fill_(1)
        self.router.copy_(draw_router(self.config, self.d_model, generator=generator))
        for name, weight in fresh_weights(self.config, self.d_model, self.d_ff, generator=generator).items():
            getattr(self, name).copy_(weight)

    @classmethod
    @torch.no_grad()
    def from_dense(
        cls, feed_forward: FeedForward, config: MoEConfig, *, generator: torch.Generator | None = None
    ) -> "Chronos2MoELayer":
        """Make a layer that computes what ``feed_forward`` does, unless ``noise`` or ``reinit`` is asked for.

        See :func:`chronomoe.models.sparse.init.dense_weights`. With a capacity, dropped choices are missing.

        Args:
            feed_forward: is not changed.
            config: the experts.
            generator: draws router, noise and fresh units; one with ``config.seed`` when None.

        Raises:
            InputError: the widths do not divide, or ``expert_width`` is not a slice of the block.
        """
        generator = generator or torch.Generator().manual_seed(config.seed)
        wi, wo = feed_forward.mlp.wi.weight, feed_forward.mlp.wo.weight
        weights = dense_weights(wi, wo, config, generator=generator)
        layer = cls(
            d_model=wi.shape[1],
            d_ff=wi.shape[0],
            config=config,
            dropout_rate=feed_forward.dropout.p,
            layer_norm_epsilon=feed_forward.layer_norm.variance_epsilon,
            activation=feed_forward.mlp.act,
            generator=generator,
        )
        for name, weight in weights.items():
            getattr(layer, name).copy_(weight)
        layer.layer_norm.weight.copy_(feed_forward.layer_norm.weight)
        return layer.to(wi.device).cast(wi.dtype).train(feed_forward.training)

    def cast(self, dtype: torch.dtype) -> "Chronos2MoELayer":
        """Cast weights in place, all but the router's, which stay float32 as after loading a checkpoint."""
        for name, parameter in self.named_parameters():
            if name != "router":
                parameter.data = parameter.data.to(dtype)
        return self

    def forward(self, hidden_states: Float[Tensor, "batch token d_model"]) -> Float[Tensor, "batch token d_model"]:
        """Return what :meth:`mix` does, without the auxiliary outputs."""
        return self.mix(hidden_states)[0]

    def mix(
        self,
        hidden: Float[Tensor, "batch token d_model"],
        observed: Bool[Tensor, "batch token"] | None = None,
    ) -> tuple[Float[Tensor, "batch token d_model"], MoEAux]:
        """Add to each token the gated sum of its experts, and say how they were used.

        Args:
            hidden: tokens.
            observed: False for padding, which is neither routed nor counted and stays as it is.
        """
        rows = None if observed is None or bool(observed.all()) else torch.where(observed.flatten())[0]
        tokens: Tensor = self.layer_norm(hidden).flatten(0, 1)
        if rows is not None:
            tokens = tokens[rows]
        routing = self.route(tokens)
        update, dropped = self.experts(tokens, routing)
        if self.shared_wi is not None and self.shared_wo is not None:
            update = update + self._activate(tokens @ self.shared_wi.T) @ self.shared_wo.T
        chosen = routing.expert
        if rows is not None:
            num_tokens = hidden.shape[0] * hidden.shape[1]
            update = update.new_zeros(num_tokens, self.d_model).index_copy(0, rows, update)
            chosen = chosen.new_full((num_tokens, self.config.top_k), -1).index_copy(0, rows, chosen)
        mixed: Tensor = hidden + self.dropout(update).view(hidden.shape)
        return mixed, self._aux(routing, chosen.view(*hidden.shape[:2], self.config.top_k), dropped)

    def route(self, tokens: Float[Tensor, "token d_model"]) -> TokenRouting:
        """Choose experts for normalised tokens."""
        with torch.autocast(tokens.device.type, enabled=False):
            wide = torch.promote_types(tokens.dtype, torch.float32)
            weight, bias = self.router.to(wide), self.balance_bias.bias
            score = tokens.to(wide) @ weight.T
            return route_tokens(
                score,
                self.config,
                bias=bias.to(wide) if self.config.bias_rate else None,
                whole_copies=self.config.granularity > 1 and self._is_grouped(),
            )

    def experts(
        self, tokens: Float[Tensor, "token d_model"], routing: TokenRouting
    ) -> tuple[Float[Tensor, "token d_model"], Float[Tensor, ""]]:
        """Return the scaled and gated sum of each token's experts, and the share of choices that capacity dropped."""
        expert, gate = routing.expert, routing.gate * self.scale
        dropped = gate.new_zeros(())
        capacity = self.config.capacity(len(tokens))
        if capacity is not None and len(tokens) and self.training:  # a forecast depends on its own series alone
            kept = within_capacity(expert, gate, num_experts=self.config.num_experts, capacity=capacity)
            expert = expert.masked_fill(~kept, self.config.num_experts)
            dropped = 1 - kept.to(gate.dtype).mean()
        return run_experts(tokens, expert, gate, wi=self.wi, wo=self.wo, activate=self._activate), dropped

    def active_parameters(self) -> int:
        """Count what one token uses: norm, router, shared expert and ``top_k`` experts."""
        routed = self.wi.numel() + self.wo.numel()
        every = sum(parameter.numel() for parameter in self.parameters())
        return every - routed + routed * self.config.top_k // self.config.num_experts

    def _activate(self, hidden: Tensor) -> Tensor:
        activated: Tensor = self.dropout(self.act(hidden))
        return activated

    def _is_grouped(self) -> bool:
        """Whether the slices of every copy still share one router row, as they do at first."""
        copies = self.router.detach().unflatten(0, (-1, self.config.granularity))
        bias = self.balance_bias.bias.unflatten(0, (-1, self.config.granularity))
        return bool((copies == copies[:, :1]).all() and (bias == bias[:, :1]).all())

    def _aux(self, routing: TokenRouting, chosen: Tensor, dropped: Tensor) -> MoEAux:
        load = expert_load(routing.expert, num_experts=self.config.num_experts).to(routing.score.dtype)
        zero = routing.score.new_zeros(())
        if not len(routing.expert):
            return MoEAux(zero, zero, load, zero, chosen, zero)
        if self.training and self.config.bias_rate:
            self.balance_bias.update(load.to(self.balance_bias.bias.dtype))
        balance = zero
        if self.config.balance != "none":
            balance = load_balancing_loss(routing.prob, load, kind=self.config.balance)
        prob = routing.prob.detach()
        return MoEAux(
            balance_loss=balance,
            z_loss=z_loss(routing.score),
            load=load,
            entropy=torch.special.entr(prob).sum(dim=-1).mean(),
            expert=chosen,
            dropped=dropped,
        )
