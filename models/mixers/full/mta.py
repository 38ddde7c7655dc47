"""Multi-token attention: logits convolved over queries and keys, weights mixed over heads."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from plait.configs.domains import Heads, Taps
from plait.kernels import Tokens
from plait.kernels.weighted_attention import Rule, Seen, dot_products, softmax
from plait.models.axes import BATCH, HEADS, LENGTH, constrain
from plait.models.build import Buffer, BuildContext
from plait.models.layers.cache import Cache, Slots
from plait.models.layers.linear import Dense
from plait.models.layers.norms import RMSNorm
from plait.models.mixers.base import register
from plait.models.mixers.full.by_rule import ByRule, RuleConfig
from plait.models.mixers.heads import require_divides
from plait.models.positions.base import PositionConfig
from plait.models.positions.rotary import RotaryConfig


@register(
    "mta",
    kind="full",
    source="Multi-Token Attention (2504.00927)",
    proof="the authors' layer, outputs and gradients",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MTAConfig(RuleConfig):
    """`S_ij = q_i . k_j / sqrt(K)` for visible keys and 0 for others, then

        S'_ij = sum_{a < c_q, |b| <= (c_k - 1) / 2} theta_ab S_{i-a, j+b}     A = softmax_j(S') over the visible keys
        A'_m = sum_n A_n w_nm over the c_h heads of a group                   o = (1 - lambda(l)) RMSNorm(A' v) a head

    with `lambda(l) = 0.8 - 0.6 exp(-0.3 l)` of layer l, counted from 0. theta (a head's own) and w start at the identity: as softmax
    attention. Everything stays inside the document. The paper convolves in every fourth layer and mixes heads in all:
    `"mta*3,mta/convolved"` with no taps in the first.
    """

    positions: PositionConfig | None = RotaryConfig(theta=100_000.0)
    """How queries and keys know where they stand; None for no position encoding (NoPE)."""
    query_taps: Taps | None = 6
    """c_q, queries that a logit is convolved over, its own and those before it; None for no convolution."""
    key_taps: Taps | None = 11
    """c_k, keys that a logit is convolved over, centred on its own: an odd number; None for no convolution."""
    mixed_heads: Heads | None = 16
    """c_h, heads of a group whose weights are mixed, a divisor of num_heads; None for no mixing."""
    norm: bool = True
    """RMS-normalise each head's output, with a learned gain."""
    depth_scale: bool = True
    """Multiply the normalised output by 1 - lambda(l)."""
    gate: bool = False
    """Multiply each head's output by the sigmoid of a learned linear function of it, one for all heads."""

    def check(self) -> None:
        super().check()
        if (self.query_taps is None) != (self.key_taps is None):
            raise ValueError(
                f"query_taps={self.query_taps} and key_taps={self.key_taps} are of one convolution; set both, or None for both"
            )
        if self.key_taps is not None and self.key_taps % 2 == 0:
            raise ValueError(f"key_taps={self.key_taps} must be odd to be centred on a key; use {self.key_taps + 1}")
        if self.depth_scale and not self.norm:
            raise ValueError("depth_scale=True scales the normalised output; set norm=True or depth_scale=False")

    @classmethod
    def example(cls) -> MTAConfig:
        return cls(num_heads=4, head_dim=16, query_taps=3, key_taps=5, mixed_heads=2)

    def heads(self, d_model: int) -> tuple[int, int]:
        heads = super().heads(d_model)
        if self.mixed_heads is not None:
            require_divides(("mixed_heads", self.mixed_heads), ("num_heads", heads[0]))
        return heads

    def pair_flops(self) -> float:
        convolved = 0 if self.query_taps is None or self.key_taps is None else self.query_taps * self.key_taps
        return super().pair_flops() + 2.0 * (convolved + (self.mixed_heads or 0))

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        gates = 2.0 * self.head_dim * (self.heads(d_model)[0] - 1) if self.gate else 0.0  # one is counted with the projections
        return super().mixing_flops(d_model, seq_len) + gates

    def build(self, d_model: int, ctx: BuildContext) -> MTA:
        return MTA(self, d_model, ctx)


class Kernels(NamedTuple):
    logits: jax.Array | None  # [H, c_q, c_k], the last row meets the query itself
    heads: jax.Array | None  # [H / c_h, c_h, c_h], from the second axis to the third


@dataclasses.dataclass(frozen=True)
class MultiToken(Rule):
    """See `MTAConfig`."""

    query_taps: int

    @property
    def halo(self):
        return self.query_taps - 1

    @property
    def width(self):
        return self.query_taps

    def __call__(self, q, k, parameters, seen):
        s = jnp.where(seen.visible, q.shape[-1] ** -0.5 * dot_products(q, k, seen), 0)
        if parameters.logits is not None:
            s = self.convolved(s, parameters.logits, seen)
        a = softmax(s, seen.visible[:, :, self.halo :])
        if parameters.heads is None:
            return a
        w = parameters.heads.astype(a.dtype)
        a = constrain(a, (BATCH, None, LENGTH, None))  # every device that mixes heads has all of them
        grouped = a.reshape(a.shape[0], *w.shape[:2], *a.shape[2:])
        return jnp.einsum("bgnrs,gnm->bgmrs", grouped, w, precision=seen.precision).reshape(a.shape)

    def convolved(self, s: jax.Array, kernel: jax.Array, seen: Seen) -> jax.Array:
        """The logits `[B, H, R, S]` of `s` `[B, H, halo + R, S]`: a row before the query counts if it is of its document."""
        rows, documents = s.shape[2] - self.halo, seen.queries.segment_ids
        taps = []
        for a in range(self.query_taps):
            same = documents[:, a : a + rows] == documents[:, self.halo :]
            taps.append(jnp.where(same[:, None, :, None], s[:, :, a : a + rows], 0))
        stacked = jnp.stack(taps, axis=2)  # [B, H, c_q, R, S]
        lines = jnp.moveaxis(stacked, 3, 1)  # [B, R, H, c_q, S]
        batch, _, num_heads, _, num_keys = lines.shape
        out = jax.lax.conv_general_dilated(
            lines.reshape(batch * rows, num_heads * self.query_taps, num_keys),
            jnp.moveaxis(kernel, 0, 2).swapaxes(0, 1).astype(s.dtype),  # [c_k, c_q, H]
            window_strides=(1,),
            padding="SAME",
            dimension_numbers=("NCW", "WIO", "NCW"),
            feature_group_count=num_heads,
            precision=seen.precision,
        )
        return jnp.moveaxis(out.reshape(batch, rows, num_heads, num_keys), 1, 2)


class MTA(ByRule):
    """See `MTAConfig`."""

    def __init__(self, config: MTAConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx, MultiToken(config.query_taps or 1))
        group = config.mixed_heads
        self.logit_kernel = self.head_kernel = self.norm = self.scale = self.gate = nnx.data(None)
        if config.query_taps is not None and config.key_taps is not None:
            init = lambda key, shape, dtype: jnp.zeros(shape, dtype).at[:, -1, shape[2] // 2].set(1)
            taps = self.num_heads, config.query_taps, config.key_taps
            self.logit_kernel = ctx.param(init, taps, (HEADS, None, None), role="conv")
        if group is not None:
            init = lambda key, shape, dtype: jnp.broadcast_to(jnp.eye(group, dtype=dtype)[None], shape)
            self.head_kernel = ctx.param(init, (self.num_heads // group, group, group), (None, None, None), role="conv")
        if config.norm:
            self.norm = RMSNorm(ctx, config.head_dim, eps=1e-5)
        if config.depth_scale:
            self.scale = Buffer(jnp.asarray(0.2 + 0.6 * jnp.exp(-0.3 * ctx.layer_index), jnp.float32), axes=())
        if config.gate:
            self.gate = Dense(ctx, config.head_dim, 1, (None, None), use_bias=True, role="gate")
        self.ring = Slots(self.rule.halo) if self.rule.halo else None

    def parameters(self):
        return Kernels(*(None if kernel is None else kernel[...] for kernel in (self.logit_kernel, self.head_kernel)))

    def finish(self, o, inputs, x):
        if self.norm is not None:
            o = self.norm(o)
        if self.scale is not None:
            o = (o * self.scale[...]).astype(o.dtype)
        return o if self.gate is None else o * jax.nn.sigmoid(self.gate(o))

    def init_state(self, batch_size, max_len):
        """The cache of keys and values, and a ring of the queries that the next one needs."""
        one = ((self.num_heads, self.config.head_dim), HEADS)
        queries = None if self.ring is None else self.ring.empty(batch_size, max_len, {"q": one}, self.dtype)
        return super().init_state(batch_size, max_len), queries

    def attend(self, inputs, *, at, state):
        cache, queries = (None, None) if state is None else state
        o, cache = super().attend(inputs, at=at, state=cache)
        return o, None if state is None else (cache, self.written(queries, inputs.q, at))

    def recall(self, inputs, carry, *, at, state):
        cache, queries = state
        before = None if queries is None else earlier(queries, at, self.rule.halo)
        inputs, carry, cache = super().recall(inputs, carry, at=at, state=cache)
        return inputs._replace(before=before), carry, (cache, self.written(queries, inputs.q, at))

    def written(self, queries: Cache | None, q: jax.Array, at: Tokens) -> Cache | None:
        """The ring with the queries of the tokens."""
        return None if self.ring is None or queries is None else self.ring.write(queries, {"q": q}, at)


def earlier(queries: Cache, at: Tokens, count: int) -> tuple[jax.Array, Tokens]:
    """The `count` queries `[B, count, H, K]` before that of one token, in order, of a ring of so many; padding where there is none."""
    wanted = at.positions - count + jnp.arange(count, dtype=jnp.int32)[None]
    slots = wanted % count
    found = (jnp.take_along_axis(queries.positions, slots, axis=1, mode="clip") == wanted) & (wanted >= 0)
    q = jnp.take_along_axis(queries.entries["q"], slots[:, :, None, None], axis=1, mode="clip")
    return jnp.where(found[:, :, None, None], q, 0), Tokens(None, found.astype(jnp.int32), wanted)
