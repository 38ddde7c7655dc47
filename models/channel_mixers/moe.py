"""Mixture of experts: each token goes through the few gated MLPs that its router chooses. No token is dropped."""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from plait.configs.domains import Coefficient, Experts, Whole, Width
from plait.models.axes import BATCH, EMBED, EXPERTS, LENGTH, MLP
from plait.models.build import Buffer, BuildContext
from plait.models.channel_mixers.base import ChannelMixer, ChannelMixerConfig, MixedChannels, register
from plait.models.channel_mixers.gated_mlp import ACTIVATIONS, Activation, GatedMLPConfig
from plait.models.divided import Over, divided
from plait.models.grouped import grouped_dot
from plait.models.linear import Dense

_TOKENS = (BATCH, LENGTH, None)
_IN, _OUT = (EXPERTS, EMBED, MLP), (EXPERTS, MLP, EMBED)


@register("moe", source="DeepSeek-V3 Technical Report (2412.19437)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig(ChannelMixerConfig):
    """`y = sum_shared F_i(x) + sum_i g_i F_i(x)` over the top-k experts of each token, every F_i a gated MLP.

    Experts are chosen by s + b for scores s and balancing biases b; the gates are g_i = c s_i / sum_chosen s_j.
    """

    num_experts: Experts = 8
    """Routed experts."""
    top_k: Experts = 2
    """Routed experts a token uses."""
    hidden_dim: Width | None = None
    """Inner width of an expert; None divides the gated MLP's among the experts that a token uses, rounded up to a multiple of 64."""
    num_shared_experts: Annotated[int, Whole(0, 2**10)] = 0
    """Experts that every token uses, beside the routed ones."""
    activation: Activation = "silu"
    """Of the experts' gates."""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """From the router's logits: over all experts, or of each alone (DeepSeek-V3)."""
    normalize: bool = True
    """A token's gates sum to `routed_scale`; otherwise they are `routed_scale` times the scores."""
    routed_scale: Coefficient = 1.0
    """c, the weight of the routed experts beside the shared ones."""
    balance_loss: Coefficient | None = 0.01
    """Coefficient of the load-balance loss (Switch, 2101.03961), whose balanced value is 1, averaged over the MoE layers; None for none."""
    balance_bias: Coefficient | None = None
    """How far a step moves the biases towards balance (2408.15664; DeepSeek-V3 0.001); None for no biases."""
    z_loss: Coefficient | None = 0.001
    """Coefficient of the router's mean squared log-normaliser (ST-MoE, 2202.08906); None for none."""

    def check(self) -> None:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} must be at most num_experts={self.num_experts}; use fewer or add experts")
        if self.top_k == 1 and self.normalize:
            raise ValueError(
                "normalize=True with top_k=1 leaves a gate of 1 and the router without a gradient; use normalize=False"
            )

    @classmethod
    def example(cls) -> MoEConfig:
        return cls(num_experts=4, hidden_dim=32, num_shared_experts=1)

    @property
    def experts(self) -> int:
        return self.num_experts

    def width(self, d_model: int) -> int:
        """Inner width of an expert for `d_model`."""
        dense = GatedMLPConfig().width(d_model)
        return self.hidden_dim or -(-dense // (self.top_k + self.num_shared_experts) // 64) * 64

    def flops(self, d_model: int) -> float:
        used = self.top_k + self.num_shared_experts
        return 2.0 * d_model * (self.num_experts + 3 * used * self.width(d_model))

    def build(self, d_model: int, ctx: BuildContext) -> MoE:
        return MoE(self, d_model, ctx)


class MoE(ChannelMixer):
    """See `MoEConfig`. The router is float32; under sigmaReparam each expert's matrices have singular vectors and gains of their own."""

    def __init__(self, config: MoEConfig, d_model: int, ctx: BuildContext):
        self.config = config
        self.compute_dtype = ctx.compute_dtype
        width, lead = config.width(d_model), (config.num_experts,)
        self.router = Dense(ctx, d_model, config.num_experts, (EMBED, None), role="router")
        self.gate = Dense(ctx, d_model, width, _IN, lead=lead)
        self.up = Dense(ctx, d_model, width, _IN, lead=lead)
        self.down = Dense(ctx, width, d_model, _OUT, init=ctx.residual_init, lead=lead)
        shared = GatedMLPConfig(hidden_dim=width * config.num_shared_experts or None, activation=config.activation)
        self.shared = shared.build(d_model, ctx) if config.num_shared_experts else None
        self.bias = None if config.balance_bias is None else Buffer(jnp.zeros(lead, jnp.float32), axes=(None,))

    def __call__(self, x, *, at):
        at = at.placed(*x.shape[:2])
        real = at.segment_ids > 0
        logits = jnp.matmul(x.astype(jnp.float32), self.router.weight().astype(jnp.float32), precision="highest")
        scores = jax.nn.softmax(logits, axis=-1) if self.config.scores == "softmax" else jax.nn.sigmoid(logits)
        choice = jax.lax.stop_gradient(scores if self.bias is None else scores + self.bias[...][None, None, :])
        experts = (m.weight().astype(self.compute_dtype) for m in (self.gate, self.up, self.down))
        arrays = (x.astype(self.compute_dtype), scores, choice, real, *experts)
        y, chosen = divided(self._route, arrays, (*[_TOKENS] * 3, _TOKENS[:2], _IN, _IN, _OUT), (_TOKENS, _TOKENS))
        if self.shared is not None:
            y = y + self.shared(x, at=at).y
        counts = chosen.sum((0, 1))
        losses = self._losses(logits, scores, counts, real)
        load = counts / jnp.maximum(counts.mean(), 1e-9)
        return MixedChannels(y, losses, {"expert_load": load}, {} if self.bias is None else {"expert": counts})

    def settle(self, counts):
        """Raises the biases of experts with less than the mean load, lowers those with more. Source: 2408.15664, algorithm 1."""
        if self.bias is not None and self.config.balance_bias is not None:
            load = counts["expert"]
            self.bias[...] += self.config.balance_bias * jnp.sign(load.mean(-1, keepdims=True) - load)

    def _losses(self, logits, scores, counts, real):
        """`z/router`, and `balance/moe`: `E sum_e f_e P_e` with f the shares of the load and P the mean shares of the scores."""
        config, weight = self.config, real.astype(jnp.float32)[..., None]
        mean = lambda a: (a * weight).sum((0, 1)) / jnp.maximum(weight.sum(), 1.0)
        losses = {}
        if config.balance_loss is not None:
            f = counts / jnp.maximum(counts.sum(), 1.0)
            p = mean(scores / scores.sum(-1, keepdims=True))
            losses["balance/moe"] = config.balance_loss * config.num_experts * (f * p).sum()
        if config.z_loss is not None:
            z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
            losses["z/router"] = config.z_loss * mean(jnp.square(z)).sum()
        return losses

    def _route(self, over: Over, x, scores, choice, real, gate, up, down):
        """What the routed experts give, `[B, T, D]`, and the 0/1 choice `[B, T, E]` float32, for one device's tokens.

        Where `expert` divides both experts and tokens, its devices gather each other's tokens, and what each device's experts make of
        them is added up where the tokens are: no buffer has to fit the worst case of a load, since any load is as large.
        """
        config, shape = self.config, x.shape
        _, ids = jax.lax.top_k(choice, config.top_k)
        gates = jnp.take_along_axis(scores, ids, axis=-1)
        if config.normalize:
            gates = gates / gates.sum(-1, keepdims=True)
        chosen = jax.nn.one_hot(ids, config.num_experts).sum(-2) * real[..., None]
        tokens = [a.reshape(-1, a.shape[-1]) for a in (x, jnp.where(real[..., None], ids, -1), config.routed_scale * gates)]
        experts, whole = over(EXPERTS), functools.partial(jax.lax.all_gather, tiled=True)
        sent = tuple(axis for axis in experts if axis in over(BATCH))
        if sent:
            tokens = [whole(a, sent) for a in tokens]
        if width := over(EMBED):
            gate, up, down = whole(gate, width, axis=1), whole(up, width, axis=1), whole(down, width, axis=2)
        first = jax.lax.axis_index(experts) * gate.shape[0] if experts else 0
        x, ids, gates = tokens
        y = self._experts(x, ids - first, gates, gate, up, down)
        if sent:
            y = jax.lax.psum_scatter(y, sent, tiled=True)
        if added := tuple(axis for axis in (*experts, *over(MLP)) if axis not in sent):
            y = jax.lax.psum(y, added)
        return y.reshape(shape), chosen

    def _experts(self, x, ids, gates, gate, up, down):
        """`sum_j gates_j F_ids_j(x)` over the experts given, `[N, D]`; ids `[N, k]` of others count for nothing."""
        count, k = gate.shape[0], ids.shape[1]
        ids = jnp.where((ids >= 0) & (ids < count), ids, count).reshape(-1)
        order = jnp.argsort(ids, stable=True)
        rows = order[: x.shape[0] * min(k, count)]  # a token chooses an expert once
        sizes = jnp.zeros(count, jnp.int32).at[ids].add(1, mode="drop")
        xs = x[rows // k]
        hidden = ACTIVATIONS[self.config.activation](grouped_dot(xs, gate, sizes)) * grouped_dot(xs, up, sizes)
        gates = jnp.where(ids < count, gates.reshape(-1), 0.0)[rows]
        ys = grouped_dot(hidden, down, sizes).astype(jnp.float32) * gates[:, None]
        return jnp.zeros(x.shape, jnp.float32).at[rows // k].add(ys).astype(x.dtype)
