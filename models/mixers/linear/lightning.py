"""Lightning attention: a state that fades at a rate fixed for each head and layer."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp

from plait.configs.domains import Channels, Epsilon, Heads
from plait.models.axes import EMBED, HEADS
from plait.models.build import Buffer, BuildContext
from plait.models.layers.linear import Dense
from plait.models.mixers.base import MixerConfig, register
from plait.models.mixers.heads import resolve_heads
from plait.models.mixers.linear.lrpe import Lrpe
from plait.models.mixers.linear.recurrent import Decayed, Recurrent

Slopes = Literal["released", "paper"]


@register(
    "lightning",
    kind="linear",
    source="Lightning Attention-2 (2401.04658), Various Lengths, Constant Speed (2405.17381)",
    proof="transformers: MiniMax",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LightningConfig(MixerConfig):
    """`S_t = exp(-s) S_{t-1} + k_t v_t^T`, `o_t = S_t^T q_t`, with q, k and v through silu and a slope s for each head and layer.

    The output is `W_o (norm(o) * sigmoid(W_g x))`, all heads normalised together. The defaults are MiniMax-01's. TransNormerLLM has
    `norm="simple", gate="linear", silu_values=False`, and `lrpe=True` in its first layer (a pattern names it, as in
    `"lightning/first@0; lightning"`); the authors' example layer has `gate_rank` = head_dim.
    """

    num_heads: Heads | None = None
    """Heads; None gives d_model / head_dim."""
    head_dim: Channels = 128
    """Channels of a key and of a value head."""
    slopes: Slopes = "released"
    """`released`: s = 2^(-8 (h+1) / H) (1 - l / (L - 1) + 1e-5) in head h of H and layer l of L, both from 0, as in the released models
    (TransNormerLLM's differ where H is no power of 2, as ALiBi's do); `paper`: s = 8 (h+1) / H (1 - l / L) as written, which fades faster
    (the paper does not say where h and l begin)."""
    silu_values: bool = True
    """Whether values go through silu as queries and keys do."""
    norm: Literal["rms", "simple"] = "rms"
    """`simple` has no learned scale (SRMSNorm)."""
    gate: Literal["sigmoid", "linear"] | None = "sigmoid"
    """What the output gate goes through; None for no gate."""
    gate_rank: Channels | None = None
    """Inner width of the gate's projection; None for a full one."""
    lrpe: bool = False
    """Relative positions by turned channels, of learned angles, which doubles the state (arXiv 2307.09270)."""
    norm_eps: Epsilon = 1e-6
    """Epsilon of the output norm."""

    def check(self) -> None:
        if self.gate is None and self.gate_rank is not None:
            raise ValueError(f"gate_rank={self.gate_rank} needs a gate; leave it out, or use gate='sigmoid'")

    @classmethod
    def example(cls) -> LightningConfig:
        return cls(head_dim=16)

    def heads(self, d_model: int) -> int:
        """Heads at width `d_model`."""
        return resolve_heads(self.num_heads, d_model, self.head_dim)

    def settled(self, d_model: int) -> Self:
        return dataclasses.replace(self, num_heads=self.heads(d_model))

    @property
    def key_dim(self) -> int:
        """Channels of a key in the state."""
        return self.head_dim * (2 if self.lrpe else 1)

    def build(self, d_model: int, ctx: BuildContext) -> Lightning:
        return Lightning(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        return 4.0 * self.heads(d_model) * self.key_dim * self.head_dim


def slopes(convention: Slopes, num_heads: int, layer_index: Any, num_layers: int) -> jax.Array:
    """What the log decays of the heads of a layer are below 0, float32 `[H]`."""
    head, layer = jnp.arange(1, num_heads + 1, dtype=jnp.float32), jnp.asarray(layer_index, jnp.float32)
    if convention == "paper":
        return 8.0 * head / num_heads * (1.0 - layer / num_layers)
    return 2.0 ** (-8.0 * head / num_heads) * (1.0 - layer / (num_layers - 1 + 1e-5) + 1e-5)


class Lightning(Recurrent):
    """See `LightningConfig`."""

    scale = 1.0

    def __init__(self, config: LightningConfig, d_model: int, ctx: BuildContext):
        self.config, self.num_heads = config, config.heads(d_model)
        self.head_dims = config.key_dim, config.head_dim
        width = self.num_heads * config.head_dim
        self.q, self.k, self.v = (Dense(ctx, d_model, width, (EMBED, HEADS), heads=(1, self.num_heads)) for _ in range(3))
        self.lrpe = Lrpe(ctx, self.num_heads, config.head_dim) if config.lrpe else None
        self.slopes = Buffer(slopes(config.slopes, self.num_heads, ctx.layer_index, ctx.num_layers), axes=(HEADS,))
        self.gated_output(
            ctx,
            d_model,
            norm_eps=config.norm_eps,
            norm="all",
            norm_scale=config.norm == "rms",
            gate=config.gate,
            gate_rank=config.gate_rank,
        )

    def project(self, x, *, at, state):
        q, k, v = (self.heads(dense(x)) for dense in (self.q, self.k, self.v))
        q, k = jax.nn.silu(q), jax.nn.silu(k)
        v = jax.nn.silu(v) if self.config.silu_values else v
        if self.lrpe is not None:
            q, k = (self.lrpe(y, at.positions) for y in (q, k))
        return Decayed(q, k, v, jnp.broadcast_to(-self.slopes[...][None, None], v.shape[:3])), state
