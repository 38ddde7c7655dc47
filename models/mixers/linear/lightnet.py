"""LightNet: keys weighed by their share in the sum of all so far, a softmax over time in every channel."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from plait.configs.domains import Channels, Epsilon, Heads
from plait.kernels import Tokens, chunking, decay
from plait.models.axes import BATCH, EMBED, HEADS, constrain
from plait.models.build import BuildContext
from plait.models.layers.linear import Dense
from plait.models.layers.norms import RMSNorm
from plait.models.mixers.base import MixerConfig, register
from plait.models.mixers.heads import join_heads, resolve_heads, split_heads
from plait.models.mixers.linear.lrpe import Lrpe
from plait.models.mixers.linear.recurrent import Decayed, Recurrent

NOTHING = -1e30
"""The logarithm of an empty sum; finite, so that differences and their gradients are."""


@register(
    "lightnet",
    kind="linear",
    source="You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet (2405.21022)",
    proof="fla: LightNetAttention on naive_recurrent_gla; softmax over time",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LightNetConfig(MixerConfig):
    """`S_t = Diag(exp(z_{t-1} - z_t)) S_{t-1} + exp(k_t - z_t) v_t^T`, `o_t = S_t^T q_t / sqrt(K)`, `z_t = log sum_{s <= t} exp k_s`,
    `q = silu(W_q x)`.

    Every channel weighs values by a softmax of its keys over time. The output is `W_o (norm(o) * silu(G_2 G_1 x))`, all heads normalised
    together. The positions are those of the paper in one dimension.
    """

    num_heads: Heads | None = None
    """Heads; None gives d_model / head_dim."""
    head_dim: Channels = 128
    """Channels of a key and of a value head."""
    gate_rank: Channels = 128
    """Inner width of the output gate's projection."""
    lrpe: bool = False
    """MD-LRPE: turned channels, of learned angles, which doubles the state. In its cosine form, in which a channel keeps its softmax."""
    tpe: bool = False
    """MD-TPE: to q, k and v the layer's input has its fading mean `W norm(c sum_{s <= t} a^(t-s) x_s)` added, a and c learned for each
    head. Published for the embedding only; a mixer sees its own layer's input."""
    norm_eps: Epsilon = 1e-5
    """Epsilon of the output norm."""

    @classmethod
    def example(cls) -> LightNetConfig:
        return cls(head_dim=16, gate_rank=8)

    def heads(self, d_model: int) -> int:
        """Heads at width `d_model`."""
        num_heads = resolve_heads(self.num_heads, d_model, self.head_dim)
        if self.tpe and d_model % num_heads:
            raise ValueError(
                f"tpe=True needs heads that divide d_model={d_model}, not {num_heads}; leave it out or set num_heads"
            )
        return num_heads

    @property
    def key_dim(self) -> int:
        """Channels of a key in the state."""
        return self.head_dim * (2 if self.lrpe else 1)

    def build(self, d_model: int, ctx: BuildContext) -> LightNet:
        return LightNet(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        return 4.0 * self.heads(d_model) * self.key_dim * self.head_dim + (2.0 * d_model if self.tpe else 0.0)


class LightNetState(NamedTuple):
    memory: jax.Array  # [B, H, K, V] float32
    convs: Mapping[str, jax.Array]
    z: jax.Array  # [B, H, K] float32, the logarithm of the sums so far
    means: jax.Array | None  # [B, H, 1, D / H] float32, of the Toeplitz positions


class LightNet(Recurrent):
    """See `LightNetConfig`."""

    def __init__(self, config: LightNetConfig, d_model: int, ctx: BuildContext):
        self.config, self.num_heads = config, config.heads(d_model)
        self.head_dims = config.key_dim, config.head_dim
        self.scale = config.head_dim**-0.5
        width = self.num_heads * config.head_dim
        self.tpe = Tpe(ctx, d_model, self.num_heads, norm_eps=config.norm_eps) if config.tpe else None
        self.q, self.k, self.v = (Dense(ctx, d_model, width, (EMBED, HEADS), heads=(1, self.num_heads)) for _ in range(3))
        self.lrpe = Lrpe(ctx, self.num_heads, config.head_dim) if config.lrpe else None
        self.gated_output(ctx, d_model, norm_eps=config.norm_eps, norm="all", gate_rank=config.gate_rank)

    def project(self, x, *, at, state):
        at = at.placed(*x.shape[:2])
        means = z = None
        if self.tpe is not None:
            smoothed, means = self.tpe(x, at=at, state=None if state is None else state.means)
            x = x + smoothed
        q, k, v = jax.nn.silu(self.heads(self.q(x))), self.heads(self.k(x)), self.heads(self.v(x))
        k, g, z = share_of_sum(k.astype(jnp.float32), at=at, start=None if state is None else state.z)
        k = k.astype(q.dtype)
        if self.lrpe is not None:
            q, k = (self.lrpe(y, at.positions) for y in (q, k))
            g = jnp.concatenate([g, g], axis=-1)
        return Decayed(q, k, v, g), state if state is None else state._replace(z=z, means=means)

    def init_state(self, batch_size, max_len):
        memory, convs = super().init_state(batch_size, max_len)
        z = jnp.full((batch_size, self.num_heads, self.config.head_dim), NOTHING, jnp.float32)
        means = None if self.tpe is None else self.tpe.init_state(batch_size)
        return LightNetState(memory, convs, constrain(z, (BATCH, HEADS, None)), means)


def share_of_sum(k: jax.Array, *, at: Tokens, start: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`exp(k_t - z_t)`, `z_{t-1} - z_t` and the last z of `k [B, T, H, K]`, z the running logsumexp within the segment; float32.

    Args:
      start: z before the first token, [B, H, K]; None for nothing.
    """
    index, real = chunking.segment_index(at.segment_ids)
    index, real = (y[..., None, None] for y in (index, real))
    begins = jnp.diff(index, axis=1, prepend=index[:, :1]) > 0
    if start is None:
        start = jnp.full_like(k[:, 0], NOTHING)

    def join(left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        (z, begun), (later, begins) = left, right
        return jnp.where(begins, later, jnp.logaddexp(z, later)), begun | begins

    z, _ = jax.lax.associative_scan(join, (jnp.where(real, k, NOTHING), begins), axis=1)
    z = jnp.where(index == 0, jnp.logaddexp(start[:, None], z), z)
    before = jnp.where(begins, NOTHING, jnp.concatenate([start[:, None], z[:, :-1]], axis=1))
    g = jnp.where(real & (before > NOTHING / 2), before - z, 0.0)
    return jnp.exp(jnp.where(real, k - z, NOTHING)), jnp.minimum(g, 0.0), z[:, -1]


class Tpe(nnx.Module):
    """Toeplitz positions: `W norm(c_h sum_{s <= t} a_h^(t-s) x_s)` in the channels of head h, each head normalised.

    A state of one key channel. c is the product of a query and a key that are the same for all tokens, and a a sigmoid.
    """

    def __init__(self, ctx: BuildContext, d_model: int, num_heads: int, *, norm_eps: float):
        self.num_heads, self.dim = num_heads, d_model // num_heads
        normal = jax.nn.initializers.normal(1.0)
        self.q, self.k = (ctx.param(normal, (num_heads, self.dim), (HEADS, None)) for _ in range(2))
        self.log_decay = ctx.param(normal, (num_heads,), (HEADS,), role="decay")
        self.norm = RMSNorm(ctx, self.dim, eps=norm_eps)
        self.o = Dense(ctx, d_model, d_model, (HEADS, EMBED), heads=(0, num_heads))

    def init_state(self, batch_size: int) -> jax.Array:
        """Zeros: the start of a document."""
        zeros = jnp.zeros((batch_size, self.num_heads, 1, self.dim), jnp.float32)
        return constrain(zeros, (BATCH, HEADS, None, None))

    def __call__(self, x: jax.Array, *, at: Tokens, state: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """`[B, T, D]` and the state after the last token."""
        shape = (*x.shape[:2], self.num_heads)
        c = (self.q[...].astype(jnp.float32) * self.k[...].astype(jnp.float32)).sum(-1)
        g = jax.nn.log_sigmoid(self.log_decay[...].astype(jnp.float32))
        q, k = (jnp.broadcast_to(y.astype(x.dtype)[None, None, :, None], (*shape, 1)) for y in (c, jnp.ones_like(c)))
        g = jnp.broadcast_to(g[None, None], shape)
        o, state = decay(q, k, split_heads(x, self.num_heads), g, scale=1.0, initial_state=state, at=at)
        return self.o(join_heads(self.norm(o))), state
