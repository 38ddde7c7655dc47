"""RWKV-7: a state that decays by channel and replaces, at a rate by channel, what it holds under a key."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from plait.configs.domains import Channels, Epsilon
from plait.kernels import dplr, dplr_rows
from plait.kernels.shapes import l2_normalize
from plait.models.axes import EMBED, HEADS
from plait.models.build import Buffer, BuildContext, Initializer, orthogonal
from plait.models.layers.linear import Dense
from plait.models.layers.norms import GroupNorm
from plait.models.layers.token_shift import TokenShift
from plait.models.mixers.base import MixerConfig, register
from plait.models.mixers.heads import split_heads, whole_heads
from plait.models.mixers.linear.recurrent import Recurrent
from plait.models.stream import CarryUse

FIRST_VALUES = "rwkv7_values"
"""Name in the carry of the first layer's values."""
FASTEST = math.exp(-0.5)
"""The log decay of a token is above minus this."""
MIXED = ("r", "w", "k", "v", "a", "g")
"""What has its own mix with the token before, and the power by which its mix rises over the channels of the first layer."""
POWERS = (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)


@register(
    "rwkv7",
    kind="linear",
    source='RWKV-7 "Goose" with Expressive Dynamic State Evolution (2503.14456)',
    proof="fla: RWKV7Attention on dplr_recurrence",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class RWKV7Config(MixerConfig):
    """`S_t = (Diag(w_t) - (a_t n_t) n_t^T) S_{t-1} + k_t v_t^T`, `o_t = S_t^T r_t`, `y = W_o ((norm(o) + (r . u k) v) g)`.

    Every projection reads its own mix of a token and the one before, `x_t + m (x_{t-1} - x_t)`.
    `log w = -e^-1/2 sigmoid(w_0 + W_2 tanh(W_1 x))`, `a = sigmoid(a_0 + A_2 A_1 x)`, `g = G_2 sigmoid(G_1 x)`; n is `c W_k x` of unit norm
    in each head, and `k = W_k x (1 + (a - 1) d)` with c, d and u learned by channel. Values move towards those of the first layer that has
    them, by `sigmoid(v_0 + V_2 V_1 x)`; the first has these weights too and does not use them. The norm is over each head, with scale and
    bias. Initial values are those of the authors' training code; matrices that it starts at 0 are drawn as others where sigmaReparam
    divides by their norm.
    """

    head_dim: Channels = 64
    """Channels of a head."""
    decay_rank: Channels | None = None
    """Inner width of w's projection; None gives 2.5 sqrt(d_model) to the nearest 32, at least 32."""
    rate_rank: Channels | None = None
    """That of a's; None gives the same."""
    value_rank: Channels | None = None
    """That of the values' move; None gives 1.7 sqrt(d_model) likewise."""
    gate_rank: Channels | None = None
    """That of g's; None gives 5 sqrt(d_model) likewise."""
    norm_eps: Epsilon = 64e-5
    """Epsilon of the heads' norm: 1e-5 a channel of the published heads of 64."""
    unit_eps: Epsilon = 1e-24
    """What is added to the squared length of `c W_k x` where it is brought to 1; flash-linear-attention's fused norm adds 1e-6."""

    @classmethod
    def example(cls) -> RWKV7Config:
        return cls(head_dim=16, decay_rank=8, rate_rank=8, value_rank=4, gate_rank=12)

    def heads(self, d_model: int) -> int:
        """Heads at width `d_model`."""
        return whole_heads(d_model, self.head_dim)

    def ranks(self, d_model: int) -> tuple[int, int, int, int]:
        """Inner widths of the projections of w, a, v and g."""
        rank = lambda factor: max(32, round(factor * d_model**0.5 / 32) * 32)
        given = (self.decay_rank, self.rate_rank, self.value_rank, self.gate_rank)
        w, a, v, g = (one or rank(factor) for one, factor in zip(given, (2.5, 2.5, 1.7, 5.0), strict=True))
        return w, a, v, g

    def carries(self, d_model: int) -> tuple[CarryUse, ...]:
        return (CarryUse(FIRST_VALUES, "first", (self.heads(d_model), self.head_dim)),)

    def build(self, d_model: int, ctx: BuildContext) -> RWKV7:
        return RWKV7(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        return 8.0 * d_model * self.head_dim + 4.0 * d_model  # two writes, two reads; a convolution of two taps


class RWKV7Inputs(NamedTuple):
    q: jax.Array  # r, [B, T, H, K]
    k: jax.Array
    v: jax.Array
    g: jax.Array  # log w, [B, T, H, K] float32
    a: jax.Array  # -n
    b: jax.Array  # a n
    to_first: jax.Array  # how far values move to the first layer's, [B, T, H, K]
    gate: jax.Array  # [B, T, H, K]


class LowRank(nnx.Module):
    """`W_2 f(W_1 x) (+ c)`, starting at c."""

    def __init__(
        self,
        ctx: BuildContext,
        dim: int,
        rank: int,
        bias: Initializer | None,
        activation: Callable[[jax.Array], jax.Array] = lambda y: y,
    ):
        self.activation = activation
        self.down = Dense(ctx, dim, rank, (EMBED, None), role="gate", init=_zeros(ctx))
        self.up = Dense(ctx, rank, dim, (None, HEADS), role="gate", init=orthogonal(0.1 * max(rank / dim, 1.0) ** 0.5))
        self.bias = None if bias is None else ctx.param(bias, (dim,), (HEADS,), role="decay")

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D]` in the compute dtype, or float32 where there is a bias."""
        y = self.up(self.activation(self.down(x)))
        return y if self.bias is None else y.astype(jnp.float32) + self.bias[...].astype(jnp.float32)[None, None]


class RWKV7(Recurrent):
    """See `RWKV7Config`."""

    convs = ("shift",)
    recur = staticmethod(dplr)
    recur_rows = staticmethod(dplr_rows)
    scale = 1.0

    def __init__(self, config: RWKV7Config, d_model: int, ctx: BuildContext):
        self.num_heads = config.heads(d_model)
        self.head_dims, self.unit_eps = (config.head_dim, config.head_dim), config.unit_eps
        start = Starts(ctx, d_model, config.head_dim)
        self.shift = TokenShift(ctx, d_model)
        self.mixes = ctx.param(start.mix, (len(MIXED), d_model), (None, EMBED))
        self.r, self.k, self.v = (
            Dense(ctx, d_model, d_model, (EMBED, HEADS), heads=(1, self.num_heads), init=_uniform(size * d_model**-0.5))
            for size in (0.5, 0.05, 0.5)
        )
        w, a, v, g = config.ranks(d_model)
        self.w = LowRank(ctx, d_model, w, start.decay, jnp.tanh)
        self.a = LowRank(ctx, d_model, a, start.rate)
        self.to_first = LowRank(ctx, d_model, v, start.value)
        self.g = LowRank(ctx, d_model, g, None, jax.nn.sigmoid)
        self.removed = ctx.param(start.removed, (d_model,), (HEADS,))
        self.replaced = ctx.param(jax.nn.initializers.constant(1.02), (d_model,), (HEADS,))
        self.bonus = ctx.param(jax.nn.initializers.constant(-0.04), (d_model,), (HEADS,))
        self.group_norm = GroupNorm(ctx, d_model, eps=config.norm_eps, axis=HEADS, groups=self.num_heads, start=start.norm)
        self.o = Dense(ctx, d_model, d_model, (HEADS, EMBED), init=_zeros(ctx, ctx.residual_init), heads=(0, self.num_heads))
        first = ctx.layer_index == ctx.first_layers.get(FIRST_VALUES, ctx.layer_index)
        self.is_first = Buffer(jnp.asarray(first), axes=())

    def _by_channel(self, param: nnx.Param) -> jax.Array:
        """`[1, 1, H, K]` float32."""
        return param[...].astype(jnp.float32).reshape(1, 1, self.num_heads, -1)

    def project(self, x, *, at, state):
        (before,), state = self.convolve({"shift": x}, at=at, state=state)
        mixes = self.mixes[...].astype(x.dtype)
        r, w, k, v, a, g = (x + (before - x) * m[None, None] for m in mixes)
        k, rate = self.heads(self.k(k)), self.heads(jax.nn.sigmoid(self.a(a)))
        removed = l2_normalize(self._by_channel(self.removed) * k, eps=self.unit_eps)
        replaced = k * (1 + (rate - 1) * self._by_channel(self.replaced))
        same = lambda y: y.astype(k.dtype)
        return RWKV7Inputs(
            q=self.heads(self.r(r)),
            k=same(replaced),
            v=self.heads(self.v(v)),
            g=-FASTEST * self.heads(jax.nn.sigmoid(self.w(w))),
            a=same(-removed),
            b=same(rate * removed),
            to_first=self.heads(jax.nn.sigmoid(self.to_first(v))),
            gate=self.heads(self.g(g)),
        ), state

    def share(self, inputs, carry):
        first = jnp.where(self.is_first[...], inputs.v, carry.get(FIRST_VALUES, inputs.v))
        moved = (inputs.v + (first - inputs.v) * inputs.to_first).astype(inputs.v.dtype)
        return inputs._replace(v=jnp.where(self.is_first[...], inputs.v, moved)), {**carry, FIRST_VALUES: first}

    def _arrays(self, inputs):
        return inputs[:6]

    def output_gate(self, inputs, x):
        return inputs.gate

    def finish(self, o, inputs, x):
        again = (inputs.q * inputs.k * self._by_channel(self.bonus)).sum(-1, keepdims=True) * inputs.v
        y = split_heads(self.group_norm(o.reshape(*o.shape[:2], -1)), self.num_heads)
        return (y + again).astype(o.dtype) * self.output_gate(inputs, x)


class Starts:
    """Initial values by channel n of D and by layer l of L."""

    def __init__(self, ctx: BuildContext, d_model: int, head_dim: int):
        self.channel = jnp.arange(d_model)
        self.share, self.last = self.channel / d_model, max(d_model - 1, 1)
        self.linear = self.channel / self.last - 0.5
        middle = max((head_dim - 1) / 2, 0.5)
        zigzag = (self.channel % head_dim - (head_dim - 1) / 2) / middle
        self.zigzag = zigzag * jnp.abs(zigzag)
        self.depth = ctx.layer_index / max(ctx.num_layers - 1, 1)  # from 0 to 1
        self.left = 1 - ctx.layer_index / ctx.num_layers  # from 1 to nearly 0
        self.norm_scale = ((ctx.layer_index + 1) / ctx.num_layers) ** 0.7

    def mix(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """How far each projection's input moves to the token before."""
        return 1 - self.share[None] ** (self.left * jnp.asarray(POWERS)[:, None])

    def decay(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """w_0."""
        return -6 + 6 * (self.channel / self.last) ** (1 + self.depth**0.3) + 0.5 + 2.5 * self.zigzag

    def rate(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """a_0."""
        return -0.19 + 0.3 * self.zigzag + 0.4 * self.linear

    def value(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """v_0."""
        return 0.73 - 0.4 * self.linear

    def removed(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """c, by which the key under which is removed differs from that under which is written."""
        return 0.71 - 0.1 * self.linear

    def norm(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """The scale of the heads' norm."""
        return jnp.full(shape, self.norm_scale, dtype)


def _uniform(most: float) -> Initializer:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -most, most)


def _zeros(ctx: BuildContext, otherwise: Initializer | None = None) -> Initializer | None:
    return jax.nn.initializers.zeros if ctx.sigma_reparam is None else otherwise
