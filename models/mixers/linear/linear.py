"""Linear attention: softmax attention with a feature map in place of the exponential."""

from __future__ import annotations

import dataclasses
from typing import Literal

from plait.configs.domains import Epsilon, Factor, Heads
from plait.models.axes import EMBED, HEADS
from plait.models.build import BuildContext
from plait.models.layers.linear import Dense
from plait.models.layers.norms import RMSNorm
from plait.models.mixers.base import register
from plait.models.mixers.heads import expanded, require_divides
from plait.models.mixers.linear.feature_attention import FeatureAttention, FeatureConfig, Features
from plait.models.mixers.linear.feature_maps import SIGNED, FeatureMap, MapName


@register(
    "linear",
    kind="linear",
    source="Transformers are RNNs (2006.16236)",
    proof="fla: naive_recurrent_linear_attn, feature maps and LinearAttention",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearConfig(FeatureConfig):
    """`S_t = S_{t-1} + f(k_t) v_t^T`, `z_t = z_{t-1} + f(k_t)`, `o_t = S_t^T f(q_t) / (z_t . f(q_t))`.

    With `normalizer="rms_norm"`, `o_t = norm(S_t^T f(q_t) / sqrt(K))` in each head (TransNormer, arXiv 2210.10340).
    """

    num_heads: Heads = 8
    """Heads; K is expand_k d_model / num_heads, V expand_v d_model / num_heads."""
    expand_k: Factor = 1.0
    """Total width of queries and keys before the feature map, over d_model."""
    expand_v: Factor = 1.0
    """Total value width over d_model."""
    feature_map: MapName = "elu"
    """f: `elu(x) + 1`; x itself; T2R's `relu(W x)` (arXiv 2103.13076); DPFP with 8 K features (2102.11174); ReBased's squared kernel of
    `gain LN(x) + bias` with K (K + 1) / 2 (2402.10644); fla's `W1 x * W2 x`. Matrices are a head's own."""
    normalizer: Literal["denominator", "rms_norm"] = "denominator"
    """What keeps the outputs in scale: the summed weights, or a norm of each head's output with a learned gain."""
    norm_eps: Epsilon = 1e-5
    """Epsilon of the output norm."""

    def check(self) -> None:
        if self.normalizer == "denominator" and self.feature_map in SIGNED:
            raise ValueError(
                f"feature_map={self.feature_map!r} gives weights of both signs, whose sum may vanish in normalizer='denominator'; "
                "use normalizer='rms_norm', or another map"
            )

    @classmethod
    def example(cls) -> LinearConfig:
        return cls(num_heads=4)

    def heads(self, d_model: int) -> int:
        return self.num_heads

    def dims(self, d_model: int) -> tuple[int, int]:
        """Channels of a key head before the feature map and of a value head, at width `d_model`."""
        widths = [expanded(getattr(self, name), d_model, name=name) for name in ("expand_k", "expand_v")]
        for name, width in zip(("expand_k", "expand_v"), widths, strict=True):
            require_divides(("num_heads", self.num_heads), (f"{name} * d_model", width))
        return widths[0] // self.num_heads, widths[1] // self.num_heads

    def sums(self, d_model: int) -> dict[str, tuple[int, int]]:
        key_dim, value_dim = self.dims(d_model)
        return {"memory": (FeatureMap.size(self.feature_map, key_dim), value_dim + (self.normalizer == "denominator"))}

    def build(self, d_model: int, ctx: BuildContext) -> Linear:
        return Linear(self, d_model, ctx)


class Linear(FeatureAttention):
    """See `LinearConfig`."""

    def __init__(self, config: LinearConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        key_dim, value_dim = config.dims(d_model)
        self.normalize = config.normalizer == "denominator"
        self.q, self.k, self.v = (
            Dense(ctx, d_model, self.num_heads * dim, (EMBED, HEADS), heads=(1, self.num_heads))
            for dim in (key_dim, key_dim, value_dim)
        )
        self.q_map, self.k_map = (FeatureMap(ctx, config.feature_map, self.num_heads, key_dim) for _ in range(2))
        self.norm = None if self.normalize else RMSNorm(ctx, value_dim, eps=config.norm_eps)
        width = self.num_heads * value_dim
        self.o = Dense(ctx, width, d_model, (HEADS, EMBED), init=ctx.residual_init, heads=(0, self.num_heads))

    def project(self, x, *, at, state):
        q, k = self.q_map(self.heads(self.q(x))), self.k_map(self.heads(self.k(x)))
        q = q if self.normalize else q / q.shape[-1] ** 0.5
        return Features(q, k, self.heads(self.v(x))), state

    def finish(self, o, inputs, x):
        return o if self.norm is None else self.norm(o)
