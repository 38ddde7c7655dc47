"""Gated linear attention: a decay for every key channel, from the data."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from plait.configs.domains import Channels, Coefficient, Epsilon, Factor, Heads
from plait.models.axes import EMBED, HEADS
from plait.models.build import BuildContext
from plait.models.layers.linear import Dense
from plait.models.mixers.base import MixerConfig, register
from plait.models.mixers.heads import expanded, require_divides
from plait.models.mixers.linear.recurrent import Decayed, Recurrent


@register(
    "gla",
    kind="linear",
    source="Gated Linear Attention Transformers with Hardware-Efficient Training (2312.06635)",
    proof="fla: naive_recurrent_gla, and the layer by hand",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class GLAConfig(MixerConfig):
    """`S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T`, `o_t = S_t^T q_t / sqrt(K)`, `g = logsigmoid(W2 W1 x + b) / gate_normalizer`;
    outputs are RMS-normalised by head and gated by `silu(W_g x)`."""

    num_heads: Heads = 4
    """Heads; the state of each is (expand_k d_model / num_heads) x (expand_v d_model / num_heads)."""
    expand_k: Factor = 0.5
    """Total key width over d_model."""
    expand_v: Factor = 1.0
    """Total value width over d_model."""
    gate_rank: Channels = 16
    """Inner width of the decay's low-rank projection."""
    gate_normalizer: Coefficient = 16.0
    """Divides the log decay: larger remembers longer at the start of training."""
    norm_eps: Epsilon = 1e-5
    """Epsilon of the per-head output norm."""

    def widths(self, d_model: int) -> tuple[int, int]:
        """Total key and value width at `d_model`."""
        key_width, value_width = (expanded(getattr(self, name), d_model, name=name) for name in ("expand_k", "expand_v"))
        for name, width in (("expand_k", key_width), ("expand_v", value_width)):
            require_divides(("num_heads", self.num_heads), (f"{name} * d_model", width))
        return key_width, value_width

    def build(self, d_model: int, ctx: BuildContext) -> GLA:
        return GLA(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        key_width, value_width = self.widths(d_model)
        return 4.0 * key_width * value_width / self.num_heads


class GLA(Recurrent):
    """See `GLAConfig`."""

    def __init__(self, config: GLAConfig, d_model: int, ctx: BuildContext):
        self.config, self.num_heads = config, config.num_heads
        key_width, value_width = config.widths(d_model)
        self.head_dims = key_width // self.num_heads, value_width // self.num_heads
        self.q, self.k, self.v = (
            Dense(ctx, d_model, width, (EMBED, HEADS), heads=(1, self.num_heads)) for width in (key_width, key_width, value_width)
        )
        self.decay_down = Dense(ctx, d_model, config.gate_rank, (EMBED, None), role="gate")
        self.decay_up = Dense(ctx, config.gate_rank, key_width, (None, HEADS), use_bias=True, role="gate")
        self.gated_output(ctx, d_model, norm_eps=config.norm_eps)

    def project(self, x, *, at, state):
        decay = self.heads(self.decay_up(self.decay_down(x))).astype(jnp.float32)
        g = jax.nn.log_sigmoid(decay) / self.config.gate_normalizer
        return Decayed(self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x)), g), state
