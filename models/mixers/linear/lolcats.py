"""LoLCATs: softmax attention in a window, linear attention to all before it, under one normaliser."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from plait.configs.domains import Channels, Epsilon, Positive, Span
from plait.kernels import Mask, attention, attention_rows, decay
from plait.kernels.recurrence import with_ones
from plait.models.axes import BATCH, HEADS, constrain
from plait.models.build import BuildContext
from plait.models.layers.cache import Cache
from plait.models.mixers.base import HeadMixer, register
from plait.models.mixers.full.dot_product import GroupedConfig
from plait.models.mixers.full.softmax import QKV, Softmax, SoftmaxConfig
from plait.models.mixers.linear.feature_maps import SoftmaxMap
from plait.models.mixers.linear.sums import read_flops

_WINDOW_FACTOR = float(np.log(0.1 / 0.9))
"""Where the factor of the window begins, before its sigmoid: 0.1."""


@register(
    "lolcats",
    kind="linear",
    source="LoLCATs: On Low-Rank Linearizing of Large Language Models (2410.10254)",
    proof="the authors' hybrid_attention_quadratic, outputs and gradients",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoLCATsConfig(GroupedConfig):
    """`o_i = sum_j A_ij v_j / sum_j A_ij` with, for the last `window_size` tokens, `A_ij = c exp(z_ij - m_i)`, `z_ij = q_i . k_j / sqrt(K)`,
    m_i the largest of them, and `A_ij = f(q_i) . g(k_j)` for those before; `f(x) = [softmax(W x), softmax(-W x)]`, c = sigmoid(w).

    Each head has its w, and its W for queries and for keys; both see q and k as the softmax does, rotated. Made to take the place of the
    softmax attention of a trained model: only w and the W are new. Windows slide; the authors' kernels step by blocks.
    """

    directions = ("causal",)

    scale: Positive | None = None
    """What multiplies the logits of the window; None gives head_dim^-1/2."""
    qkv_bias: bool = False
    """Biases of the projections to q, k and v."""
    o_bias: bool = False
    """Bias of the output projection."""
    qk_norm: bool = False
    """Normalise q and k before the positions, with a learned gain, by the model's kind of norm."""
    qk_norm_over: Literal["head", "width"] = "head"
    """Whether that is each head by itself, as in Qwen3, or all heads as one, as in OLMo 2."""
    qk_norm_eps: Epsilon = 1e-6
    """Epsilon of that norm."""
    logit_soft_cap: Positive | None = None
    """Logits of the window become `cap * tanh(logits / cap)`."""
    window_size: Span = 64
    """Tokens with exact weights, the query's own included."""
    feature_dim: Channels = 64
    """Rows of W; its map has twice as many features."""

    def check(self) -> None:
        super().check()
        if self.positions is not None and self.positions.bias_rank:
            raise ValueError(
                f"positions={self.positions.name!r} adds to logits, which the linear part has not; use rotary positions or None"
            )

    @classmethod
    def example(cls) -> LoLCATsConfig:
        return cls(num_heads=4, num_kv_heads=2, head_dim=16, window_size=4, feature_dim=8)

    @property
    def window(self) -> SoftmaxConfig:
        """The softmax attention in the window."""
        shared = {field.name for field in dataclasses.fields(self)} - {"feature_dim"}
        return SoftmaxConfig(**{name: getattr(self, name) for name in shared})

    def settled(self, d_model: int) -> Self:
        num_heads, num_kv_heads = self.heads(d_model)
        return dataclasses.replace(self, num_heads=num_heads, num_kv_heads=num_kv_heads)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        heads = self.heads(d_model)[0]
        return self.window.mixing_flops(d_model, seq_len) + heads * read_flops(2 * self.feature_dim, self.head_dim + 1)

    def build(self, d_model: int, ctx: BuildContext) -> LoLCATs:
        return LoLCATs(self, d_model, ctx)


class LoLCATsState(NamedTuple):
    """Decode memory: the window, and what left it."""

    window: Cache
    memory: jax.Array
    """`[B, H, 2 F, V + 1]` float32, the last column of the sum of the weights."""


class LoLCATs(Softmax):
    """See `LoLCATsConfig`."""

    def __init__(self, config: LoLCATsConfig, d_model: int, ctx: BuildContext):
        super().__init__(config.window, d_model, ctx)
        self.window_size, self.feature_dim = config.window_size, config.feature_dim
        bound = (6 / (config.head_dim * config.feature_dim)) ** 0.5  # the authors' init takes all of a head's matrix for its fan
        init = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
        self.q_map, self.k_map = (
            SoftmaxMap(ctx, self.num_heads, config.head_dim, config.feature_dim, init=init) for _ in range(2)
        )
        self.window_factor = ctx.param(jax.nn.initializers.constant(_WINDOW_FACTOR), (self.num_heads,), (HEADS,))

    def attend(self, inputs, *, at, state):
        o, window = self._window(inputs, at)
        k, v = (_behind(each, at, self.window_size) for each in self._written(inputs.k, inputs.v))
        before, memory = decay(self.q_map(inputs.q), k, v, jnp.zeros(v.shape[:3], jnp.float32), scale=1.0, at=at)
        if state is not None:
            state = LoLCATsState(self.slots.write(state.window, {"k": inputs.k, "v": inputs.v}, at), memory)
        return _together(o, window, before), state

    def attend_active(self, inputs, active, *, at):
        return HeadMixer.attend_active(self, inputs, active, at=at)

    def recall(self, inputs, carry, *, at, state):
        inputs, carry = self.share(inputs, carry)
        window, memory = state
        row, size = jnp.arange(at.positions.shape[0]), self.window_size
        position = at.positions[:, -1]
        slot = position % size % window.positions.shape[1]
        leaves = (position >= size) & (window.positions[row, slot] == position - size)
        if at.segment_ids is not None:
            leaves = leaves & (at.segment_ids[:, -1] > 0)
        k, v = self._written(*(window.entries[name][row, slot][:, None] for name in "kv"))
        written = jnp.einsum("bthf,bthv->bhfv", k, v, precision="highest")
        memory = memory + jnp.where(leaves[:, None, None, None], written, 0)
        window = self.slots.write(window, {"k": inputs.k, "v": inputs.v}, at)
        return QKV(inputs.q, window.entries["k"], window.entries["v"], window.at), carry, LoLCATsState(window, memory)

    def attend_step(self, inputs, *, at, state):
        o, window = self._window(inputs, at)
        before = jnp.einsum("bthf,bhfv->bthv", self.q_map(inputs.q), state.memory, precision="highest")
        return _together(o, window, before), state

    def init_state(self, batch_size, max_len):
        window = super().init_state(batch_size, max_len)
        assert window is not None
        shape = (batch_size, self.num_heads, 2 * self.feature_dim, self.config.head_dim + 1)
        return LoLCATsState(window, constrain(jnp.zeros(shape, jnp.float32), (BATCH, HEADS, None, None)))

    def implied(self, inputs, rows, *, at):
        _, window = self._window(inputs, at)
        exact = attention_rows(inputs.q, inputs.k, rows=rows, at=at, **self.options(inputs, at))
        k, _ = self._written(inputs.k, inputs.v)
        linear = jnp.einsum("brhf,bthf->bhrt", self.q_map(inputs.q)[:, rows], k, precision="highest")
        ids, positions = at.segment_ids, at.positions
        seen = [
            mask.dense(positions[:, rows], positions, ids[:, rows], ids)[:, None]
            for mask in (Mask(causal=True), Mask(causal=True, window_size=self.window_size))
        ]
        a = jnp.moveaxis(window[:, rows], 2, 1)[..., None] * exact + jnp.where(seen[0] & ~seen[1], linear, 0)
        total = a.sum(-1, keepdims=True)
        return a / jnp.where(total > 0, total, 1)

    def observe(self, inputs, x, *, at):
        k, v = (_behind(each, at, self.window_size) for each in self._written(inputs.k, inputs.v))
        g = jnp.zeros(v.shape[:3], jnp.float32)
        _, memory, stats = decay(self.q_map(inputs.q), k, v, g, scale=1.0, at=at, return_stats=True)
        return {"memory": memory, "recurrence": stats}

    def _window(self, inputs: QKV, at: Any) -> tuple[jax.Array, jax.Array]:
        """The window's outputs and the sum of its weights, `[B, T, H, V]` and `[B, T, H]` float32."""
        o, stats = attention(*inputs[:3], at=at, kv_at=inputs.kv_at, return_stats=True, **self.options(inputs, at))
        factor = jax.nn.sigmoid(self.window_factor[...].astype(jnp.float32))
        return o, factor[None, None] * jnp.exp(stats.lse - stats.max_logit)

    def _written(self, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What keys and values `[B, T, Hkv, K]` write: features, and values with a one behind, of every head, float32."""
        k, v = (jnp.repeat(each, self.num_heads // self.num_kv_heads, axis=2) for each in (k, v))
        return self.k_map(k), with_ones(v.astype(jnp.float32))


def _behind(x: jax.Array, at: Any, by: int) -> jax.Array:
    """What stood `by` tokens before in the same document `[B, T, ...]`, or zeros."""
    back = lambda y: jnp.pad(y, [(0, 0), (by, 0)] + [(0, 0)] * (y.ndim - 2))[:, : y.shape[1]]
    same = (back(at.segment_ids) == at.segment_ids) & (at.positions >= by)
    return jnp.where(same[:, :, None, None], back(x), 0)


def _together(o: jax.Array, window: jax.Array, before: jax.Array) -> jax.Array:
    """Outputs of both under one normaliser, in o's dtype; `before` has the sum of its weights in the last column."""
    total = window[..., None] + before[..., -1:]
    both = window[..., None] * o.astype(jnp.float32) + before[..., :-1]
    return (both / jnp.where(total > 0, total, 1)).astype(o.dtype)
