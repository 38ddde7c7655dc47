"""Mamba-2: a state whose decay and step size come from the data, with groups of heads that share keys and queries."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from plait.configs.domains import Channels, Epsilon, Factor, Heads, Positive, Taps
from plait.models.axes import EMBED, HEADS
from plait.models.build import BuildContext
from plait.models.layers.decays import inverse_softplus_step, log_uniform_rate
from plait.models.layers.linear import Dense
from plait.models.layers.norms import RMSNorm
from plait.models.layers.short_conv import ShortConv
from plait.models.mixers.base import MixerConfig, register
from plait.models.mixers.heads import expanded, join_heads, require_divides, split_heads
from plait.models.mixers.linear.recurrent import Recurrent

_PROJECTIONS = ("z", "x", "B", "C", "dt")


@register(
    "mamba2",
    kind="linear",
    source="Transformers are SSMs: Generalized Models and Efficient Algorithms (2405.21060)",
    proof="transformers: Mamba-2",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config(MixerConfig):
    """`S_t = a_t S_{t-1} + B_t (dt_t x_t)^T`, `y_t = S_t^T C_t + D x_t`, `out = W_o norm(y * silu(z))`, the norm over each group.

    `dt = softplus(W_dt u + dt_bias)`, `log a = -exp(A_log) dt`; x, B and C are convolved with a bias. As linear attention C is the query,
    B the key and dt x the value. The published `in_proj` and `conv1d` hold z, x, B, C and dt side by side; here each has its own.
    """

    expand: Factor = 2.0
    """Inner width over d_model."""
    head_dim: Channels = 64
    """Channels of a head."""
    state_dim: Channels = 128
    """Channels of B and C: the state of a head is state_dim x head_dim."""
    num_groups: Heads = 1
    """Groups of heads that share B and C and are normalised together, a divisor of the number of heads."""
    conv_size: Taps = 4
    """Taps of the short convolutions on x, B and C."""
    use_bias: bool = False
    """Biases of the projections."""
    conv_bias: bool = True
    """Biases of the convolutions."""
    norm: Literal["after_gate", "before_gate"] | None = "after_gate"
    """`norm(y * silu(z))`, `norm(y) * silu(z)`, or `y * silu(z)` (Falcon-H1)."""
    norm_eps: Epsilon = 1e-5
    """Epsilon of the output norm."""
    multipliers: tuple[Positive, ...] | None = None
    """Multiplies the projections to z, x, B, C and dt (Falcon-H1); None for 1."""

    def check(self) -> None:
        if self.multipliers is not None and len(self.multipliers) != len(_PROJECTIONS):
            raise ValueError(f"multipliers={self.multipliers} must be five, of {', '.join(_PROJECTIONS)}; use None for none")

    @classmethod
    def example(cls) -> Mamba2Config:
        return cls(head_dim=16, state_dim=8, num_groups=2)

    def num_heads(self, d_model: int) -> int:
        """Heads at width `d_model`."""
        width = expanded(self.expand, d_model)
        require_divides(("head_dim", self.head_dim), ("expand * d_model", width))
        require_divides(("num_groups", self.num_groups), ("expand * d_model / head_dim", width // self.head_dim))
        return width // self.head_dim

    def build(self, d_model: int, ctx: BuildContext) -> Mamba2:
        return Mamba2(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        width = self.num_heads(d_model) * self.head_dim
        return 4.0 * width * self.state_dim + 2.0 * self.conv_size * (width + 2 * self.num_groups * self.state_dim)


class Mamba2Inputs(NamedTuple):
    q: jax.Array  # C, [B, T, G, N]
    k: jax.Array  # B, [B, T, G, N]
    v: jax.Array  # dt x, [B, T, H, P]
    g: jax.Array  # [B, T, H] float32, at most 0
    x: jax.Array  # [B, T, H, P]


class Mamba2(Recurrent):
    """See `Mamba2Config`."""

    convs = ("x_conv", "B_conv", "C_conv")
    scale = 1.0

    def __init__(self, config: Mamba2Config, d_model: int, ctx: BuildContext):
        self.config, self.num_heads = config, config.num_heads(d_model)
        self.head_dims = config.state_dim, config.head_dim
        width, shared = self.num_heads * config.head_dim, config.num_groups * config.state_dim
        dense = functools.partial(Dense, ctx, use_bias=config.use_bias)
        conv = functools.partial(ShortConv, ctx, size=config.conv_size, use_bias=config.conv_bias)
        self.z, self.x = (dense(d_model, width, (EMBED, HEADS), role=role) for role in ("gate", "matrix"))
        self.B, self.C = (dense(d_model, shared, (EMBED, None)) for _ in range(2))
        self.dt = dense(d_model, self.num_heads, (EMBED, HEADS), role="gate")
        self.x_conv = conv(width, axis=HEADS)
        self.B_conv, self.C_conv = (conv(shared, axis=None) for _ in range(2))
        self.A_log = ctx.param(log_uniform_rate(1.0, 16.0), (self.num_heads,), (HEADS,), role="decay")
        self.dt_bias = ctx.param(inverse_softplus_step(floor=1e-4), (self.num_heads,), (HEADS,), role="decay")
        self.D = ctx.param(jax.nn.initializers.ones, (self.num_heads,), (HEADS,), exact=True)
        norm = lambda: RMSNorm(ctx, width, eps=config.norm_eps, axis=HEADS, groups=config.num_groups)
        self.norm = None if config.norm is None else norm()
        self.o = dense(width, d_model, (HEADS, EMBED), init=ctx.residual_init)

    def _projected(self, name: str, x: jax.Array) -> jax.Array:
        y = getattr(self, name)(x)
        factors = self.config.multipliers
        return y if factors is None else y * jnp.asarray(factors[_PROJECTIONS.index(name)], y.dtype)

    def project(self, x, *, at, state):
        streams = {f"{name}_conv": self._projected(name, x) for name in ("x", "B", "C")}
        (v, k, q), state = self.convolve(streams, at=at, state=state)
        rate, bias = (p[...].astype(jnp.float32)[None, None] for p in (self.A_log, self.dt_bias))
        dt = jax.nn.softplus(self._projected("dt", x).astype(jnp.float32) + bias)
        v, groups = self.heads(v), self.config.num_groups
        return Mamba2Inputs(
            split_heads(q, groups), split_heads(k, groups), (dt[..., None] * v).astype(v.dtype), -jnp.exp(rate) * dt, v
        ), state

    def _arrays(self, inputs):
        return inputs[:4]

    def output_gate(self, inputs, x):
        return split_heads(jax.nn.silu(self._projected("z", x)), self.num_heads)

    def finish(self, o, inputs, x):
        skip = self.D[...].astype(jnp.float32)[None, None, :, None] * inputs.x
        y, gate = join_heads((o + skip).astype(o.dtype)), join_heads(self.output_gate(inputs, x))
        if self.norm is None:
            y = y * gate
        else:
            y = self.norm(y * gate) if self.config.norm == "after_gate" else self.norm(y) * gate
        return split_heads(y, self.num_heads)
