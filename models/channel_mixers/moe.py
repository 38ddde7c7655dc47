"""Mixture of experts: each token goes through the few gated MLPs that its router chooses. No token is dropped."""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, Literal, Self

import jax
import jax.numpy as jnp

from plait.configs.domains import Coefficient, Epsilon, Experts, Positive, Whole, Width, choices, divisors
from plait.models.axes import BATCH, EMBED, EXPERTS, LENGTH, MLP
from plait.models.build import BuildContext, Moved
from plait.models.channel_mixers.base import ChannelMixer, ChannelMixerConfig, MixedChannels, register
from plait.models.channel_mixers.gated_mlp import ACTIVATIONS, Activation, GatedMLPConfig
from plait.models.channel_mixers.mlp import MLPConfig
from plait.models.divided import Over, divided
from plait.models.layers.grouped import grouped_dot
from plait.models.layers.linear import Dense
from plait.models.layers.norms import make_norm

_TOKENS = (BATCH, LENGTH, None)
_IN, _OUT = (EXPERTS, EMBED, MLP), (EXPERTS, MLP, EMBED)
_BIAS_IN, _BIAS_OUT = (EXPERTS, MLP), (EXPERTS, EMBED)


@register("moe", source="DeepSeek-V3 Technical Report (2412.19437)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig(ChannelMixerConfig):
    """`y = sum_shared F_i(x) + sum_i g_i F_i(x)` over the top-k experts of each token, every F_i a gated MLP.

    Experts are chosen by s + b for scores s and balancing biases b; the gates are g_i = c s_i / sum_chosen s_j. With softmax scores these
    are the softmax over the chosen experts' logits alone (Mixtral, GPT-OSS).
    """

    num_experts: Experts = 8
    """Routed experts."""
    top_k: Experts = 2
    """Routed experts a token uses."""
    hidden_dim: Width | None = None
    """Inner width of an expert; None divides the gated MLP's among the experts that a token uses, rounded up to a multiple of 64."""
    num_shared_experts: Annotated[int, Whole(0, 2**10)] = 0
    """Experts that every token uses, beside the routed ones."""
    shared_hidden_dim: Width | None = None
    """Inner width of a shared expert; None gives that of a routed one."""
    shared_gate: bool = False
    """What the shared experts give is multiplied by `sigmoid(w . x)` (Qwen2-MoE, Qwen3-Next)."""
    gated: bool = True
    """Whether experts are gated MLPs; if not, each is `W_down activation(W_up x)` (Nemotron-H)."""
    activation: Activation = "silu"
    """Of the experts' gates, or of their inner channels."""
    latent_dim: Width | None = None
    """Channels that the routed experts read and give, between two projections that they share (Nemotron 3); None gives d_model."""
    swiglu_limit: Positive | None = None
    """L of a clamped SwiGLU in the routed experts (GPT-OSS): `g sigmoid(swiglu_alpha g) (u + 1)` of the gate `g = min(W_gate x, L)` and
    `u = clip(W_up x, -L, L)`; None for `activation(W_gate x) W_up x`."""
    swiglu_alpha: Positive = 1.702
    """Slope of the clamped SwiGLU's sigmoid."""
    use_bias: bool = False
    """Biases of the experts' projections."""
    router_bias: bool = False
    """A bias of the router's logits."""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """From the router's logits: over all experts, or of each alone (DeepSeek-V3)."""
    normalize: bool = True
    """A token's gates sum to `routed_scale`; otherwise they are `routed_scale` times the scores."""
    routed_scale: Coefficient = 1.0
    """c, the weight of the routed experts beside the shared ones."""
    expert_scales: bool = False
    """The gate of each expert is multiplied by a number that is learned, at first 1 (Gemma 4)."""
    own_norms: bool = False
    """Routed experts, shared ones and router read norms of their own of the stream x, and what the first two give is normalised before
    it is added up (Gemma 4): `n'(sum_shared F_i(n(x))) + m'(sum_i g_i F_i(m(x)))`; the router reads `norm(x) / sqrt(d_model)`."""
    norm_eps: Epsilon = 1e-6
    """Epsilon of these norms."""
    num_groups: Experts = 1
    """Groups of neighbouring experts of which a token may use those of `top_k_groups` (DeepSeek-V2: of a device each)."""
    top_k_groups: Experts = 1
    """Groups that a token may use."""
    group_score_top_k: Experts = 2
    """A group is chosen by the sum of this many of its largest s + b: 1 in DeepSeek-V2, 2 in V3."""
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
        if self.swiglu_limit is not None and self.activation != "silu":
            raise ValueError(f"activation={self.activation!r} does not fit swiglu_limit; use 'silu', or swiglu_limit=None")
        if self.swiglu_limit is not None and not self.gated:
            raise ValueError("gated=False has no gate for swiglu_limit; use gated=True, or swiglu_limit=None")
        if self.shared_gate and not self.num_shared_experts:
            raise ValueError("shared_gate=True has no shared expert to gate; use num_shared_experts=1, or shared_gate=False")
        if self.num_experts % self.num_groups:
            raise ValueError(
                f"num_groups={self.num_groups} must divide num_experts={self.num_experts}; use {choices(divisors(self.num_experts))}"
            )
        if self.top_k_groups > self.num_groups:
            raise ValueError(
                f"top_k_groups={self.top_k_groups} must be at most num_groups={self.num_groups}; use fewer, or add groups"
            )
        size = self.num_experts // self.num_groups
        if self.num_groups > 1 and self.group_score_top_k > size:
            raise ValueError(
                f"group_score_top_k={self.group_score_top_k} must be at most the {size} experts of a group; use fewer, or fewer groups"
            )
        if self.top_k > self.top_k_groups * size:
            raise ValueError(
                f"top_k={self.top_k} must be at most the {self.top_k_groups * size} experts of top_k_groups groups; "
                "use fewer, or more groups"
            )

    @classmethod
    def example(cls) -> MoEConfig:
        return cls(num_experts=4, hidden_dim=32, num_shared_experts=1)

    @property
    def own_norm(self) -> bool:
        return self.own_norms

    @property
    def experts(self) -> int:
        return self.num_experts

    def width(self, d_model: int) -> int:
        """Inner width of an expert for `d_model`."""
        dense = GatedMLPConfig().width(d_model)
        return self.hidden_dim or -(-dense // (self.top_k + self.num_shared_experts) // 64) * 64

    def shared_width(self, d_model: int) -> int:
        """Inner width of all shared experts as one."""
        return self.num_shared_experts * (self.shared_hidden_dim or self.width(d_model))

    def settled(self, d_model: int) -> Self:
        shared = self.shared_width(d_model) // self.num_shared_experts if self.num_shared_experts else None
        return dataclasses.replace(self, hidden_dim=self.width(d_model), shared_hidden_dim=shared)

    def function(self, d_model: int) -> Self:
        found = dataclasses.replace(
            self.settled(d_model), balance_loss=None, z_loss=None, balance_bias=None if self.balance_bias is None else 1.0
        )
        plain = type(self)()
        if self.num_groups == 1:
            found = dataclasses.replace(found, group_score_top_k=plain.group_score_top_k)
        if not self.own_norms:
            found = dataclasses.replace(found, norm_eps=plain.norm_eps)
        return found if self.swiglu_limit is not None else dataclasses.replace(found, swiglu_alpha=plain.swiglu_alpha)

    def flops(self, d_model: int) -> float:
        products, read = 3 if self.gated else 2, self.latent_dim or d_model
        routed = products * read * self.top_k * self.width(d_model) + (2 * d_model * read if self.latent_dim else 0)
        return 2.0 * (d_model * (self.num_experts + products * self.shared_width(d_model) + self.shared_gate) + routed)

    def build(self, d_model: int, ctx: BuildContext) -> MoE:
        return MoE(self, d_model, ctx)


class MoE(ChannelMixer):
    """See `MoEConfig`. The router is float32; under sigmaReparam each expert's matrices have singular vectors and gains of their own."""

    def __init__(self, config: MoEConfig, d_model: int, ctx: BuildContext):
        self.config = config
        self.compute_dtype = ctx.compute_dtype
        width, lead, read = config.width(d_model), (config.num_experts,), config.latent_dim or d_model
        self.router = Dense(ctx, d_model, config.num_experts, (EMBED, None), role="router", use_bias=config.router_bias)
        dense = functools.partial(Dense, ctx, use_bias=config.use_bias)
        self.gate = dense(read, width, _IN, lead=lead) if config.gated else None
        self.up = dense(read, width, _IN, lead=lead)
        self.down = dense(width, read, _OUT, init=ctx.residual_init, lead=lead)
        latent = config.latent_dim is not None
        self.latent_in = dense(d_model, read, (EMBED, None)) if latent else None
        self.latent_out = dense(read, d_model, (None, EMBED), init=ctx.residual_init) if latent else None
        mlp = GatedMLPConfig if config.gated else MLPConfig
        shared = mlp(hidden_dim=config.shared_width(d_model) or None, activation=config.activation, use_bias=config.use_bias)
        self.shared = shared.build(d_model, ctx) if config.num_shared_experts else None
        self.shared_gate = Dense(ctx, d_model, 1, (EMBED, None)) if config.shared_gate else None
        norm = lambda wanted: make_norm(ctx, d_model, eps=config.norm_eps) if config.own_norms and wanted else None
        self.router_norm, self.routed_norm, self.routed_out_norm = norm(True), norm(True), norm(True)
        self.shared_norm, self.shared_out_norm = norm(config.num_shared_experts), norm(config.num_shared_experts)
        self.expert_scale = ctx.param(jax.nn.initializers.ones, lead, (None,)) if config.expert_scales else None
        self.bias = None if config.balance_bias is None else Moved(jnp.zeros(lead, jnp.float32), axes=(None,))

    def __call__(self, x, *, at):
        at = at.placed(*x.shape[:2])
        real = at.segment_ids > 0
        tokens = x.astype(jnp.float32)
        if self.router_norm is not None:
            tokens = self.router_norm(tokens) * x.shape[-1] ** -0.5
        logits = jnp.matmul(tokens, self.router.weight().astype(jnp.float32), precision="highest")
        if self.router.bias is not None:
            logits = logits + self.router.bias[...].astype(jnp.float32)[None, None, :]
        scores = jax.nn.softmax(logits, axis=-1) if self.config.scores == "softmax" else jax.nn.sigmoid(logits)
        choice = jax.lax.stop_gradient(scores if self.bias is None else scores + self.bias[...][None, None, :])
        choice = choice if self.config.num_groups == 1 else self._in_best_groups(choice)
        layers = [layer for layer in (self.gate, self.up, self.down) if layer is not None]
        experts = [layer.weight() for layer in layers] + [layer.bias[...] for layer in layers if layer.bias is not None]
        experts = [array.astype(self.compute_dtype) for array in experts]
        inner = len(layers) - 1
        axes = (*[_IN] * inner, _OUT, *[_BIAS_IN] * inner, _BIAS_OUT)[: len(experts)]
        scales = [] if self.expert_scale is None else [self.expert_scale[...].astype(jnp.float32)]
        normed = lambda norm, x: x if norm is None else norm(x)
        read = normed(self.routed_norm, x)
        read = read if self.latent_in is None else self.latent_in(read)
        arrays = (read.astype(self.compute_dtype), scores, choice, real, *scales, *experts)
        names = (*[_TOKENS] * 3, _TOKENS[:2], *[(None,)] * len(scales), *axes)
        y, chosen = divided(self._route, arrays, names, (_TOKENS, _TOKENS))
        y = normed(self.routed_out_norm, y if self.latent_out is None else self.latent_out(y))
        if self.shared is not None:
            read = normed(self.shared_norm, x)
            shared = normed(self.shared_out_norm, self.shared(read, at=at).y)
            y = y + (shared if self.shared_gate is None else jax.nn.sigmoid(self.shared_gate(read)) * shared)
        counts = chosen.sum((0, 1))
        losses = self._losses(logits, scores, counts, real)
        observed = {"expert_load": counts / jnp.maximum(counts.mean(), 1e-9), "expert_share": counts / jnp.maximum(real.sum(), 1)}
        return MixedChannels(y, losses, observed, {} if self.bias is None else {"expert": counts})

    def settle(self, counts):
        """Raises the biases of experts with less than the mean load, lowers those with more. Source: 2408.15664, algorithm 1."""
        if self.bias is not None and self.config.balance_bias is not None:
            load = counts["expert"]
            self.bias[...] += self.config.balance_bias * jnp.sign(load.mean(-1, keepdims=True) - load)

    def _in_best_groups(self, choice):
        """The choice `[B, T, E]`, with -inf for experts of groups that a token does not use."""
        config = self.config
        grouped = choice.reshape(*choice.shape[:-1], config.num_groups, -1)
        scores = jax.lax.top_k(grouped, config.group_score_top_k)[0].sum(-1)
        _, best = jax.lax.top_k(scores, config.top_k_groups)
        used = jax.nn.one_hot(best, config.num_groups).sum(-2) > 0
        return jnp.where(used[..., None], grouped, -jnp.inf).reshape(choice.shape)

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

    def _route(self, over: Over, x, scores, choice, real, *arrays):
        """What the routed experts give, `[B, T, D]`, and the 0/1 choice `[B, T, E]` float32, for one device's tokens.

        The arrays are what multiplies the experts' gates, where anything does, their weights, the last of which projects back, and, where
        there are any, their biases.
        Where `expert` divides both experts and tokens, its devices gather each other's tokens, and what each device's experts make of
        them is added up where the tokens are: no buffer has to fit the worst case of a load, since any load is as large.
        """
        config, shape = self.config, x.shape
        count = 3 if config.gated else 2
        scales, arrays = (arrays[0], arrays[1:]) if config.expert_scales else (None, arrays)
        weights, biases = arrays[:count], arrays[count:]
        _, ids = jax.lax.top_k(choice, config.top_k)
        gates = jnp.take_along_axis(scores, ids, axis=-1)
        if config.normalize:
            gates = gates / gates.sum(-1, keepdims=True)
        if scales is not None:
            gates = gates * scales[ids]
        chosen = jax.nn.one_hot(ids, config.num_experts).sum(-2) * real[..., None]
        tokens = [a.reshape(-1, a.shape[-1]) for a in (x, jnp.where(real[..., None], ids, -1), config.routed_scale * gates)]
        experts, whole = over(EXPERTS), functools.partial(jax.lax.all_gather, tiled=True)
        sent = tuple(axis for axis in experts if axis in over(BATCH))
        if sent:
            tokens = [whole(a, sent) for a in tokens]
        if width := over(EMBED):
            weights = (*(whole(weight, width, axis=1) for weight in weights[:-1]), whole(weights[-1], width, axis=2))
            biases = (*biases[:-1], *(whole(bias, width, axis=1) for bias in biases[-1:]))
        if biases and (inner := over(MLP)):  # the last is of a sum over these devices: one adds it
            biases = (*biases[:-1], jnp.where(jax.lax.axis_index(inner) == 0, biases[-1], 0))
        first = jax.lax.axis_index(experts) * weights[0].shape[0] if experts else 0
        x, ids, gates = tokens
        y = self._experts(x, ids - first, gates, weights, biases)
        if sent:
            y = jax.lax.psum_scatter(y, sent, tiled=True)
        if added := tuple(axis for axis in (*experts, *over(MLP)) if axis not in sent):
            y = jax.lax.psum(y, added)
        return y.reshape(shape), chosen

    def _experts(self, x, ids, gates, weights, biases):
        """`sum_j gates_j F_ids_j(x)` over the experts given, `[N, D]`; ids `[N, k]` of others count for nothing.

        Args: weights and, where there are any, biases of the experts' projections, the last of which goes back.
        """
        count, k = weights[0].shape[0], ids.shape[1]
        ids = jnp.where((ids >= 0) & (ids < count), ids, count).reshape(-1)
        order = jnp.argsort(ids, stable=True)
        rows = order[: x.shape[0] * min(k, count)]  # a token chooses an expert once
        sizes = jnp.zeros(count, jnp.int32).at[ids].add(1, mode="drop")
        of_row = jnp.minimum(ids[rows], count - 1)
        product = lambda a, i: grouped_dot(a, weights[i], sizes) + (biases[i][of_row] if biases else 0)
        xs = x[rows // k]
        hidden = self._inner(*(product(xs, i) for i in range(len(weights) - 1)))
        gates = jnp.where(ids < count, gates.reshape(-1), 0.0)[rows]
        ys = product(hidden, -1).astype(jnp.float32) * gates[:, None]
        return jnp.zeros(x.shape, jnp.float32).at[rows // k].add(ys).astype(x.dtype)

    def _inner(self, *projected):
        """What an expert's last projection reads."""
        limit = self.config.swiglu_limit
        if not self.config.gated:
            return ACTIVATIONS[self.config.activation](*projected)
        gate, up = projected
        if limit is None:
            return ACTIVATIONS[self.config.activation](gate) * up
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return gate * jax.nn.sigmoid(self.config.swiglu_alpha * gate) * (up + 1)
