"""The recurrent block of Griffin: a short convolution and a real-gated linear recurrent unit beside a GELU branch."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from plait.configs.domains import Channels, Factor, Taps
from plait.models.axes import EMBED, HEADS
from plait.models.build import BuildContext
from plait.models.layers.linear import Dense
from plait.models.layers.short_conv import ShortConv
from plait.models.mixers.base import MixerConfig, register
from plait.models.mixers.heads import expanded, require_divides, split_heads
from plait.models.mixers.linear.channelwise import OPAQUE, Scanned

SHARPNESS = 8.0
"""c of the decay `a^(c r)`."""
MAX_SQRT_GRADIENT = 1000.0
"""Where a decay is 1 in float32, the slope of `sqrt(1 - a^2)` is taken to be no more than this."""


@register(
    "rg_lru",
    kind="linear",
    source="Griffin: Mixing Gated Linear Recurrences with Local Attention (2402.19427)",
    proof="transformers: RecurrentGemma",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class RGLRUConfig(MixerConfig):
    """`h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t u_t)` by channel, `y = W_o (h gelu(W_y x))`, with `u = conv(W_x x)`.

    `log a = -8 r softplus(L)`, `r = sigmoid(W_r u)`, `i = sigmoid(W_i u)`; W_r and W_i are block-diagonal, a block a head, and
    `exp(-softplus(L))` starts uniform in squares between 0.9 and 0.999. The first token of a document is written without `sqrt(1 - a^2)`.
    """

    opaque = OPAQUE

    head_dim: Channels = 256
    """Channels of a block of the gates."""
    expand: Factor = 1.0
    """Width of the recurrence over d_model."""
    conv_size: Taps = 4
    """Taps of the short convolution, which has a bias and no activation."""

    @classmethod
    def example(cls) -> RGLRUConfig:
        return cls(head_dim=16)

    def heads(self, d_model: int) -> tuple[int, int]:
        """Number of blocks, and channels of each, at width `d_model`."""
        width = expanded(self.expand, d_model)
        require_divides(("head_dim", self.head_dim), ("expand * d_model", width))
        return width // self.head_dim, self.head_dim

    def build(self, d_model: int, ctx: BuildContext) -> RGLRU:
        return RGLRU(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        num_heads, head_dim = self.heads(d_model)
        return 2.0 * self.conv_size * num_heads * head_dim


class RGLRUInputs(NamedTuple):
    v: jax.Array  # what is written, [B, T, H, K]
    g: jax.Array  # log a, [B, T, H, K] float32, at most 0


class RGLRU(Scanned):
    """See `RGLRUConfig`. Heads are the blocks of the gates."""

    convs = ("conv",)

    def __init__(self, config: RGLRUConfig, d_model: int, ctx: BuildContext):
        self.num_heads, head_dim = config.heads(d_model)
        self.head_dims = (1, head_dim)
        width = self.num_heads * head_dim
        small = lambda fan_in: jax.nn.initializers.normal((0.01 / fan_in) ** 0.5)
        self.x, self.y = (Dense(ctx, d_model, width, (EMBED, HEADS), role=role, use_bias=True) for role in ("matrix", "gate"))
        self.conv = ShortConv(
            ctx, width, size=config.conv_size, axis=HEADS, use_bias=True, activation=None, init=small(config.conv_size)
        )
        self.input_gate, self.decay_gate = (
            Dense(
                ctx,
                head_dim,
                head_dim,
                (HEADS, None, None),
                lead=(self.num_heads,),
                role="gate",
                use_bias=True,
                init=small(head_dim),
            )
            for _ in range(2)
        )
        self.rate = ctx.param(_rate, (width,), (HEADS,), role="decay")
        self.o = Dense(ctx, width, d_model, (HEADS, EMBED), init=ctx.residual_init, use_bias=True)

    def project(self, x, *, at, state):
        (u,), state = self.convolve({"conv": self.x(x)}, at=at, state=state)
        u = self.heads(u)
        i, r = (jax.nn.sigmoid(_by_block(gate, u).astype(jnp.float32)) for gate in (self.input_gate, self.decay_gate))
        rate = jax.nn.softplus(self.rate[...].astype(jnp.float32)).reshape(1, 1, *u.shape[2:])
        g = -SHARPNESS * r * rate
        first = (at.positions == 0)[..., None, None]
        v = jnp.where(first, 1.0, _sqrt(-jnp.expm1(2 * g))) * i * u
        return RGLRUInputs(v.astype(u.dtype), g), state

    def output_gate(self, inputs, x):
        return split_heads(jax.nn.gelu(self.y(x), approximate=True), self.num_heads)

    def finish(self, o, inputs, x):
        return o * self.output_gate(inputs, x)


def _by_block(gate: Dense, u: jax.Array) -> jax.Array:
    """`gate` of `u [B, T, H, K]`, each head through its own matrix."""
    y = jnp.einsum("bthk,hkj->bthj", u.astype(gate.compute_dtype), gate.weight().astype(gate.compute_dtype))
    return y + gate.bias[...].astype(y.dtype)[None, None]  # type: ignore[index]


def _rate(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Inverse softplus of `-log a`, a^2 being uniform between the squares of 0.9 and 0.999."""
    square = jax.random.uniform(key, shape, dtype, 0.9**2, 0.999**2)
    return jnp.log(jnp.expm1(-0.5 * jnp.log(square)))


@jax.custom_jvp
def _sqrt(x: jax.Array) -> jax.Array:
    return jnp.sqrt(x)


_sqrt.defjvps(lambda dx, y, x: dx / jnp.sqrt(jnp.maximum(4 * x, MAX_SQRT_GRADIENT**-2)))
