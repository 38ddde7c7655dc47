"""SEA: linear attention estimates a map of the attention, whose largest entries say what softmax attention sees."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from plait.configs.domains import Coefficient, Span, Whole
from plait.kernels import SelectedBlocks, Tokens, attention, attention_rows
from plait.kernels.shapes import accumulation_dtype
from plait.models.axes import BATCH, KV_HEADS, constrain
from plait.models.build import BuildContext
from plait.models.layers.cache import Cache
from plait.models.looks.look import Selection
from plait.models.mixers.base import register
from plait.models.mixers.full.by_rule import MultiHead
from plait.models.mixers.full.dot_product import GroupedConfig
from plait.models.mixers.full.weighted import mean_keys
from plait.models.mixers.linear.sums import Sums, read_flops
from plait.models.mixers.sparse.columns import best, how_many, most_tokens, seen_by, tokens_under
from plait.models.mixers.sparse.estimator import UPSAMPLE, Estimator, EstimatorState, estimator_flops
from plait.models.mixers.sparse.map_loss import map_loss

LOSS = "estimate/sea"
_MOST_COLUMNS = 2**30


@register(
    "sea",
    kind="sparse",
    source="SEA: Sparse Linear Attention with Estimated Attention Mask (2310.01777)",
    proof="estimator, choice, heads and loss by hand in float64",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SEAConfig(GroupedConfig):
    """`o_i = b_i a_i softmax_{j in S_i}(q_i . k_j / sqrt(C)) v_j + (1 - b_i) mean_{j <= i} v_j`, a and b the estimator's scales.

    The estimator (`Estimator`: a Performer, an MLP and causal convolutions over tokens and columns) gives each query and head scores of
    `width` columns, which are stretched over the tokens that the query sees. Of all heads' columns the `heads top_k width / tokens` of the
    largest `softmax(scores)` are chosen, so that heads see `top_k` tokens on average, some more and some less; S_i is what lies under
    them, and may be empty in a head. The choice has no gradient; `estimate/sea` is the mean over queries and heads of
    `0.1 KL(p || e) + mean_j (p_j - e_j)^2`, p being the layer's own attention to all tokens, detached, and e the softmax over tokens of
    the scores of their columns. What the estimator reads is not detached.

    As in the authors' code for OPT, down to the layers. There the target is a teacher's attention, beside losses that pull the layer's
    own logits and outputs to the teacher's, and p is the layer's own where it has no other teacher; learned vectors stand for positions,
    a table as long as the longest sequence, here sines; random features are drawn anew every 1000 steps, here once; the last convolution
    sees two columns of zeros which are then averaged away, here it has none; and a tenth of training steps shift columns by chance, which
    is left out. The squared error is a mean over what the query sees, there over the length of the row.
    """

    directions = ("causal",)

    width: Annotated[int, Whole(UPSAMPLE, 1024)] = 128
    """Columns of the estimated map, K, a multiple of 4."""
    top_k: Span = 64
    """Tokens that a query sees, the mean over heads; in sequences that are no longer, all."""
    estimate_loss: Coefficient | None = 1.0
    """Coefficient of `estimate/sea`, the mean over tokens, heads and layers; None leaves the estimator to the language model's loss, which
    reaches it by its scales alone."""

    def check(self) -> None:
        super().check()
        if self.width % UPSAMPLE:
            near = self.width // UPSAMPLE * UPSAMPLE
            raise ValueError(f"width={self.width} must be a multiple of {UPSAMPLE}; use {near} or {near + UPSAMPLE}")
        if self.positions is not None and self.positions.place == "logits":
            raise ValueError(
                f"positions={self.positions.name} adds to the logits, and the features by which attention is estimated have none; "
                "use 'rotary'"
            )

    def fit(self, d_model: int) -> None:
        super().fit(d_model)
        heads = self.count_heads(d_model)
        if self.top_k * heads * self.width > _MOST_COLUMNS:
            raise ValueError(
                f"top_k={self.top_k} times num_heads={heads} times width={self.width} must be at most {_MOST_COLUMNS}; "
                f"use at most {_MOST_COLUMNS // (heads * self.width)}"
            )

    @classmethod
    def example(cls) -> SEAConfig:
        return cls(num_heads=4, num_kv_heads=2, head_dim=16, width=16, top_k=12)

    def function(self, d_model: int) -> SEAConfig:
        return dataclasses.replace(super().function(d_model), estimate_loss=1.0)

    def from_weights(self, d_model: int) -> SEAConfig:
        return dataclasses.replace(super().from_weights(d_model), estimate_loss=1.0)

    def build(self, d_model: int, ctx: BuildContext) -> SEA:
        return SEA(self, d_model, ctx)

    def seen_keys(self, d_model: int, seq_len: int) -> float:
        return mean_keys(seq_len, self.top_k)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        with_weights, _ = estimator_flops(*self.heads(d_model), self.head_dim, self.width)
        return with_weights + self.between_flops(d_model, seq_len)

    def between_flops(self, d_model: int, seq_len: int) -> float:
        (heads, kv_heads), (maps, keys, values) = self.heads(d_model), self.maps(d_model)
        seen = self.seen_keys(d_model, seq_len)
        _, memory = estimator_flops(heads, kv_heads, self.head_dim, self.width)
        return 2.0 * maps * (keys + values) * seen + memory + kv_heads * read_flops(1, self.head_dim)


class SEAInputs(NamedTuple):
    q: jax.Array  # [B, T, H, C]
    k: jax.Array  # [B, S, Hkv, C]
    v: jax.Array  # [B, S, Hkv, C]
    scores: jax.Array  # [B, T, H, K] float32, of columns
    scales: jax.Array  # [B, T, H, 2] float32
    mean: jax.Array  # [B, T, Hkv, C] float32, of the values up to each token
    kv_at: Tokens | None = None  # where the keys stand, when they are not the queries' own tokens


class SEAState(NamedTuple):
    """Decode memory."""

    tokens: Cache
    estimator: EstimatorState
    values: jax.Array  # [B, Hkv, 1, C] float32, their sum


class SEA(MultiHead):
    """See `SEAConfig`."""

    def __init__(self, config: SEAConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        self.estimator = Estimator(ctx, num_heads=self.num_heads, channels=config.head_dim, width=config.width)

    def project(self, x, *, at, state):
        plain, _ = super().project(x, at=at, state=None)
        estimate, estimator = self.estimator(plain.q, plain.k, plain.v, at=at, state=None if state is None else state.estimator)
        sums = Sums(at, causal=True, state=None if state is None else {"values": state.values})
        mean = sums.total("values", plain.v) / seen_by(at.positions).astype(jnp.float32)[:, :, None, None]
        if state is not None:
            state = state._replace(estimator=estimator, values=sums.after["values"])
        return SEAInputs(plain.q, plain.k, plain.v, estimate.scores, estimate.scales, mean), state

    def select(self, inputs: SEAInputs, at: Tokens) -> SelectedBlocks:
        """The tokens that each query sees."""
        config, keys, seen = self.config, inputs.k.shape[1], seen_by(at.positions)
        chances = jax.nn.softmax(jax.lax.stop_gradient(inputs.scores), axis=-1)
        sizes = self.num_heads, config.width, min(config.top_k, keys)
        columns = best(chances, how_many(seen, *sizes))
        return SelectedBlocks(indices=tokens_under(columns, seen, most_tokens(keys, *sizes)), block_size=1, num_blocks=keys)

    def options(self, inputs, at):
        return {**super().options(inputs, at), "selected": self.select(inputs, at)}

    def weigh(self, inputs, *, at):
        o: Any = attention(inputs.q, inputs.k, inputs.v, at=at, kv_at=inputs.kv_at, **self.options(inputs, at))
        dtype = accumulation_dtype(inputs.scales)
        mean = jnp.repeat(inputs.mean, self.num_heads // inputs.mean.shape[2], axis=2)
        inner, share = inputs.scales[..., :1], inputs.scales[..., 1:]
        return (share * inner * o.astype(dtype) + (1 - share) * mean).astype(inputs.q.dtype)

    def attend_active(self, inputs, active, *, at):
        return self.weigh(inputs, at=at)

    def implied(self, inputs, rows, *, at):
        some = attention_rows(inputs.q, inputs.k, rows=rows, at=at, **self.options(inputs, at))
        even = attention_rows(jnp.zeros_like(inputs.q), inputs.k, rows=rows, at=at, mask=self.mask, scale=self.scale)
        inner, share = (jnp.swapaxes(inputs.scales[:, rows][..., i], 1, 2)[..., None] for i in range(2))
        return share * inner * some + (1 - share) * even

    def auxiliary_losses(self, inputs, x, *, at):
        if self.config.estimate_loss is None:
            return {}
        found = map_loss(inputs.scores, inputs.q, inputs.k, at=at, mask=self.mask, scale=self.scale)
        return {LOSS: (self.config.estimate_loss * found).astype(jnp.float32)}

    def observe(self, inputs, x, *, at):
        dense = lambda rows: attention_rows(inputs.q, inputs.k, rows=rows, at=at, mask=self.mask, scale=self.scale)
        return {"selection": Selection(self.select(inputs, at), dense)}

    def init_state(self, batch_size, max_len):
        values = jnp.zeros((batch_size, self.num_kv_heads, 1, self.config.head_dim), jnp.float32)
        values = constrain(values, (BATCH, KV_HEADS, None, None))
        return SEAState(super().init_state(batch_size, max_len), self.estimator.init_state(batch_size), values)

    def attend(self, inputs, *, at, state):
        o = self.weigh(inputs, at=at)
        return o, None if state is None else self._kept_with(state, inputs, at)

    def recall(self, inputs, carry, *, at, state):
        state = self._kept_with(state, inputs, at)
        return self.recalled(inputs, state.tokens), carry, state

    def _kept_with(self, state: SEAState, inputs: SEAInputs, at: Tokens) -> SEAState:
        return state._replace(tokens=self.slots.write(state.tokens, self.kept(inputs), at))
