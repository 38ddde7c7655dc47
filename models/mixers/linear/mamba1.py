"""Mamba: channels with a state of a few numbers, whose step, input and read-out come from the data."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from plait.configs.domains import Channels, Epsilon, Factor, Taps
from plait.kernels import selective_scan
from plait.models.axes import EMBED, HEADS
from plait.models.build import BuildContext
from plait.models.layers.decays import inverse_softplus_step
from plait.models.layers.linear import Dense
from plait.models.layers.norms import RMSNorm
from plait.models.layers.short_conv import ShortConv
from plait.models.looks.look import GateValues
from plait.models.mixers.base import MixerConfig, register
from plait.models.mixers.heads import expanded
from plait.models.mixers.linear.channelwise import OPAQUE, Channelwise


@register(
    "mamba1",
    kind="linear",
    source="Mamba: Linear-Time Sequence Modeling with Selective State Spaces (2312.00752)",
    proof="transformers: Mamba, Falcon-Mamba",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba1Config(MixerConfig):
    """`s_t = exp(dt_t A) s_{t-1} + dt_t u_t B_t`, `out = W_o ((C_t s_t + D u_t) silu(W_z x))`, s having N numbers a channel.

    `u = silu(conv(W_x x))` with a bias; `dt = softplus(W_2 W_1 u + dt_bias)`, B and C are projections of u. `A = -exp(A_log)` starts at
    -1, ..., -N in every channel (S4D-real). The published `in_proj` holds x and z, `x_proj` W_1, B and C, and `A_log` is [D, N] there.
    There are no heads to route.
    """

    opaque = OPAQUE

    expand: Factor = 2.0
    """Inner width over d_model."""
    state_dim: Channels = 16
    """Numbers a channel."""
    dt_rank: Channels | None = None
    """Inner width of the step's projection; None gives d_model / 16, rounded up."""
    conv_size: Taps = 4
    """Taps of the short convolution."""
    norm_eps: Epsilon | None = None
    """Normalises W_1 u, B and C to an RMS of 1 with this epsilon, as Falcon-Mamba does with 1e-6 (arXiv 2410.05355); None does not."""
    norm_scale: bool = False
    """Those norms have learned scales (Jamba, 2403.19887)."""
    use_bias: bool = False
    """Biases of the projections to x and z and of the output's."""
    conv_bias: bool = True
    """Bias of the convolution."""

    def check(self) -> None:
        if self.norm_scale and self.norm_eps is None:
            raise ValueError("norm_scale=True has no norm to scale; set norm_eps, or use norm_scale=False")

    @classmethod
    def example(cls) -> Mamba1Config:
        return cls(state_dim=4)

    def width(self, d_model: int) -> int:
        """Inner channels at width `d_model`."""
        return expanded(self.expand, d_model)

    def rank(self, d_model: int) -> int:
        """Inner width of the step's projection at width `d_model`."""
        return self.dt_rank or -(-d_model // 16)

    def settled(self, d_model: int) -> Self:
        return dataclasses.replace(self, dt_rank=self.rank(d_model))

    def build(self, d_model: int, ctx: BuildContext) -> Mamba1:
        return Mamba1(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        return (4.0 * self.state_dim + 2.0 * self.conv_size) * self.width(d_model)


class Mamba1Inputs(NamedTuple):
    v: jax.Array  # u, [B, T, 1, D]
    dt: jax.Array  # [B, T, D] float32
    B: jax.Array  # [B, T, N]
    C: jax.Array  # [B, T, N]


class Mamba1(Channelwise):
    """See `Mamba1Config`. All channels are one head."""

    num_heads = 1
    convs = ("conv",)

    def __init__(self, config: Mamba1Config, d_model: int, ctx: BuildContext):
        width, rank = config.width(d_model), config.rank(d_model)
        self.head_dims = (config.state_dim, width)
        self.x, self.z = (
            Dense(ctx, d_model, width, (EMBED, HEADS), role=role, use_bias=config.use_bias) for role in ("matrix", "gate")
        )
        self.conv = ShortConv(ctx, width, size=config.conv_size, axis=HEADS, use_bias=config.conv_bias)
        self.dt_down = Dense(ctx, width, rank, (HEADS, None), role="gate")
        self.B, self.C = (Dense(ctx, width, config.state_dim, (HEADS, None)) for _ in range(2))
        uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -(rank**-0.5), rank**-0.5)
        self.dt_up = Dense(ctx, rank, width, (None, HEADS), role="gate", init=uniform)
        self.dt_bias = ctx.param(inverse_softplus_step(floor=1e-4), (width,), (HEADS,), role="decay")
        self.A_log = ctx.param(_s4d_real, self.head_dims, (None, HEADS), role="decay")
        self.D = ctx.param(jax.nn.initializers.ones, (width,), (HEADS,), exact=True)
        eps = config.norm_eps
        norm = lambda dim: RMSNorm(ctx, dim, eps=eps, with_scale=config.norm_scale) if eps else lambda y: y
        self.dt_norm, self.B_norm, self.C_norm = norm(rank), norm(config.state_dim), norm(config.state_dim)
        self.o = Dense(ctx, width, d_model, (HEADS, EMBED), init=ctx.residual_init, use_bias=config.use_bias)

    @property
    def A(self) -> jax.Array:
        """`[N, D]` float32, below 0."""
        return -jnp.exp(self.A_log[...].astype(jnp.float32))

    def project(self, x, *, at, state):
        (u,), state = self.convolve({"conv": self.x(x)}, at=at, state=state)
        dt = self.dt_up(self.dt_norm(self.dt_down(u))).astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32)[None, None]
        return Mamba1Inputs(u[:, :, None], jax.nn.softplus(dt), self.B_norm(self.B(u)), self.C_norm(self.C(u))), state

    def scan(self, inputs, memory, *, at):
        start = None if memory is None else memory[:, 0]
        y, last = selective_scan(inputs.v[:, :, 0], inputs.dt, self.A, inputs.B, inputs.C, initial_state=start, at=at)
        return y[:, :, None], last[:, None]

    def rates(self, inputs):
        norm = lambda y: jnp.linalg.norm(y.astype(jnp.float32), axis=-1, keepdims=True)
        rate = (inputs.dt * -self.A.mean(0)[None, None]).mean(-1, keepdims=True)
        return norm(inputs.dt * inputs.v[:, :, 0]) * norm(inputs.B), rate

    def gates_told(self, inputs, x):
        """A channel's decay is that of the mean rate of its numbers."""
        decay = jnp.exp(inputs.dt * self.A.mean(0)[None, None])[:, :, None]
        return {"decay": GateValues(decay, 1.0), **super().gates_told(inputs, x)}

    def output_gate(self, inputs, x):
        return jax.nn.silu(self.z(x))[:, :, None]

    def finish(self, o, inputs, x):
        skip = self.D[...].astype(jnp.float32)[None, None, None] * inputs.v
        return (o + skip).astype(o.dtype) * self.output_gate(inputs, x)


def _s4d_real(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The logarithms of 1, ..., N in every channel."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[0] + 1, dtype=dtype))[:, None], shape)
