"""What a layer shows of itself while it trains."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from plait.kernels.recurrence import RecurrenceStats

SINK_THRESHOLD = 0.3
"""alpha_1 above which a head counts as a sink for a sequence (arXiv 2410.10781)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Which part of a batch the probes look at: enough for stable statistics, little enough to cost nothing."""

    rows: int = 32
    """Query positions per sequence whose attention is looked at, evenly spaced (all of them when the sequence is shorter)."""
    sequences: int = 4
    """Sequences of the batch looked at."""
    first_k: int = 4
    """Number of leading document positions whose received attention alpha_1..alpha_K is reported."""
    keep_attention: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(
                    f"probe.{field.name}={getattr(self, field.name)} must be at least 1; turn probes off with probe_every=None"
                )

    def pick_rows(self, length: int) -> jax.Array:
        """Evenly spaced query positions `[R]` int32, the last one included."""
        count = min(self.rows, length)
        return jnp.asarray([(i + 1) * length // count - 1 for i in range(count)], jnp.int32)

    def pick_sequences(self, batch_size: int) -> slice:
        """An even stride over the batch, so that every data shard contributes."""
        count = min(self.sequences, batch_size)
        return slice(0, count * (batch_size // count), batch_size // count)


class PictureProbe(ProbeConfig):
    """A probe of every row that also keeps the attention itself, for pictures of short texts."""

    keep_attention = True

    def pick_rows(self, length: int) -> jax.Array:
        return jnp.arange(length, dtype=jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Stats:
    """Statistics of one layer, float32; None where the layer has no such thing or no probe was asked for.

    `auxiliary_loss` is there at every step (its coefficient applied); all else only on probe steps. Attention weights are of the
    implied attention with |A| normalised per query row, so that every layer kind can be compared (`docs/diagnostics.md`).
    """

    auxiliary_loss: jax.Array | None = None
    """Scalar added to the loss, averaged over the layers that have one."""
    entropy: jax.Array | None = None
    """`[H]` nats, mean over probed queries."""
    entropy_ratio: jax.Array | None = None
    """`[H]` entropy over log(visible positions of the document), mean over queries that see two or more."""
    sink: jax.Array | None = None
    """`[H, K]` alpha_k: mean weight on the document's k-th token by the queries after it."""
    sink_rate: jax.Array | None = None
    """`[H]` share of sequences with alpha_1 above `SINK_THRESHOLD`."""
    max_logit: jax.Array | None = None
    """`[H]` largest attention logit of the probed sequences, all queries (softmax and sigmoid layers)."""
    value_drain: jax.Array | None = None
    """`[H]` mean |v| at document starts over mean |v| elsewhere; far below 1 for sink heads."""
    decay_horizon: jax.Array | None = None
    """`[H]` tokens after which the state has decayed by e, 1 / mean(-g)."""
    write_strength: jax.Array | None = None
    """`[H]` mean Frobenius norm of one token's write to the state."""
    state_norm: jax.Array | None = None
    """`[H]` Frobenius norm of the state at the end of the sequence."""
    head_load: jax.Array | None = None
    """`[H]` share of tokens that use the head (MoH); 1 for shared heads."""
    attention: jax.Array | None = None
    """`[B, H, R, S]` implied attention of the probed rows, for pictures only."""
    residual_top: jax.Array | None = None
    """`[3]` three largest |x| of the residual stream after the block, mean over sequences."""
    residual_median: jax.Array | None = None
    """Scalar, median |x|."""
    residual_peak: jax.Array | None = None
    """Scalar, |x| at document starts over |x| elsewhere."""

    def merged(self, **fields: jax.Array | None) -> Stats:
        """A copy with `fields` set."""
        return dataclasses.replace(self, **fields)


def over_microbatches(stacked: Any) -> Any:
    """A tree of `Stats` of one step from those of its micro-batches, stacked: the mean of auxiliary losses, of all else the last."""

    def one(stats: Stats) -> Stats:
        last = jax.tree.map(lambda a: a[-1], stats)
        return last if stats.auxiliary_loss is None else last.merged(auxiliary_loss=stats.auxiliary_loss.mean(0))

    return jax.tree.map(one, stacked, is_leaf=lambda s: isinstance(s, Stats))


def attention_statistics(
    a: jax.Array, rows: jax.Array, *, segment_ids: jax.Array, positions: jax.Array, first_k: int
) -> dict[str, jax.Array]:
    """Entropy and sink statistics of implied attention rows.

    Args:
        a: `[B, H, R, S]` weights of the query positions `rows` `[R]`; may be signed or unnormalised: |a| is normalised per row.
        segment_ids, positions: `[B, S]`; rows of segment 0 (padding) are left out.
        first_k: how many leading document positions to report.

    Returns:
        `entropy`, `entropy_ratio`, `sink_rate` `[H]` and `sink` `[H, first_k]`, float32.

    Source: entropy arXiv 2303.06296 section 2; alpha_k and the sink rate arXiv 2410.10781 section 3, per document here.
    """
    a = jnp.abs(a.astype(jnp.float32))
    a = a / jnp.maximum(a.sum(-1, keepdims=True), 1e-30)
    entropy = -(a * jnp.log(a + 1e-6)).sum(-1)  # [B, H, R]
    row_segment, row_position = segment_ids[:, rows], positions[:, rows]  # [B, R]
    real = (row_segment > 0)[:, None, :]
    wide = real & (row_position > 0)[:, None, :]
    ratio = entropy / jnp.log(jnp.maximum(row_position, 1).astype(jnp.float32) + 1.0)[:, None, :]
    document = row_segment[:, :, None] == segment_ids[:, None, :]  # [B, R, S]
    k = jnp.arange(first_k)
    starts = document[:, None] & (positions[:, None, None, :] == k[None, :, None, None])  # [B, K, R, S]
    received = jnp.einsum("bhrs,bkrs->bhkr", a, starts.astype(jnp.float32))
    sees = real[:, :, None, :] & (row_position[:, None, None, :] >= k[None, None, :, None])  # [B, 1, K, R]
    alpha = _masked_mean(received, sees, axis=-1)  # [B, H, K]
    return {
        "entropy": _masked_mean(entropy, real, axis=(0, 2)),
        "entropy_ratio": _masked_mean(ratio, wide, axis=(0, 2)),
        "sink": _masked_mean(received, sees, axis=(0, 3)),
        "sink_rate": _masked_mean((alpha[:, :, 0] > SINK_THRESHOLD).astype(jnp.float32), real.any(-1), axis=0),
    }


def row_statistics(entropy: jax.Array, first: jax.Array, *, segment_ids: jax.Array, positions: jax.Array) -> dict[str, jax.Array]:
    """What `attention_statistics` gives, from every row instead of some, as attention kernels return it.

    Args:
        entropy: `[B, T, H]` nats of each row.
        first: `[B, T, H]` weight of each row on the first token of its document.
        segment_ids, positions: `[B, T]`.

    Returns:
        `entropy`, `entropy_ratio`, `sink_rate` and `sink_first` (alpha_1), all `[H]` float32.
    """
    real = (segment_ids > 0)[:, :, None]
    ratio = entropy / jnp.log(jnp.maximum(positions, 1).astype(jnp.float32) + 1.0)[:, :, None]
    alpha = _masked_mean(first, real, axis=1)  # [B, H]
    return {
        "entropy": _masked_mean(entropy, real, axis=(0, 1)),
        "entropy_ratio": _masked_mean(ratio, real & (positions > 0)[:, :, None], axis=(0, 1)),
        "sink_first": _masked_mean(first, real, axis=(0, 1)),
        "sink_rate": _masked_mean((alpha > SINK_THRESHOLD).astype(jnp.float32), real.any(1), axis=0),
    }


def start_ratio(norms: jax.Array, *, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
    """Mean of `norms` `[B, T, ...]` at document starts over the mean elsewhere (padding left out): `[...]`, NaN-free."""
    shape = segment_ids.shape + (1,) * (norms.ndim - 2)
    real = (segment_ids > 0).reshape(shape)
    start = (positions == 0).reshape(shape)
    first = _masked_mean(norms, real & start, axis=(0, 1))
    rest = _masked_mean(norms, real & ~start, axis=(0, 1))
    return first / jnp.maximum(rest, 1e-30)


def recurrent_statistics(stats: RecurrenceStats, *, state: jax.Array, segment_ids: jax.Array) -> dict[str, jax.Array]:
    """Statistics of a decaying state; padding is left out.

    Args:
        stats: as the recurrence's kernel gives them, by spans of tokens.
        state: final state `[B, H, K, V]`.
        segment_ids: `[B, T]`, 0 for padding.
    """
    weight = stats.num_tokens / jnp.maximum(stats.num_tokens.sum((0, 1)), 1.0)[None, None, :]  # [B, spans, H]
    real = (segment_ids > 0).any(1)[:, None]
    return {
        "write_strength": (stats.write_strength * weight).sum((0, 1)),
        "state_norm": _masked_mean(jnp.linalg.norm(state, axis=(-2, -1)), real, axis=0),
        "decay_horizon": 1.0 / jnp.maximum((weight / stats.decay_horizon).sum((0, 1)), 1e-9),
    }


def residual_statistics(
    x: jax.Array, *, segment_ids: jax.Array, positions: jax.Array, probe: ProbeConfig
) -> dict[str, jax.Array]:
    """Extremes of the residual stream `x` `[B, T, D]` after a block (arXiv 2402.17762; residual peak, 2410.13835)."""
    keep = probe.pick_sequences(x.shape[0])
    x, segment_ids, positions = jnp.abs(x[keep].astype(jnp.float32)), segment_ids[keep], positions[keep]
    real = segment_ids > 0
    stride = max(1, x.shape[1] // 64)
    sample = jnp.where(real[:, ::stride, None], x[:, ::stride], jnp.nan)
    norms = jnp.sqrt(jnp.mean(jnp.square(x), axis=-1))
    return {
        "residual_top": _masked_mean(_largest_three(jnp.where(real[:, :, None], x, 0.0)), real.any(1)[:, None], axis=0),
        "residual_median": jnp.nan_to_num(jnp.nanmedian(sample)),
        "residual_peak": start_ratio(norms, segment_ids=segment_ids, positions=positions),
    }


def _largest_three(x: jax.Array) -> jax.Array:
    """The three largest entries of each x[i], `[B, 3]`, by maxima and counts alone: sorting would gather sharded axes."""
    axes = tuple(range(1, x.ndim))
    first = x.max(axes, keepdims=True)
    second = jnp.where(x < first, x, -jnp.inf).max(axes, keepdims=True)
    third = jnp.where(x < second, x, -jnp.inf).max(axes, keepdims=True)
    ones, twos = ((x == value).sum(axes, keepdims=True) for value in (first, second))
    two = jnp.where(ones > 1, first, second)
    three = jnp.where(ones > 2, first, jnp.where(ones + twos > 2, second, third))
    return jnp.concatenate([value.reshape(-1, 1) for value in (first, two, three)], axis=1)


def _masked_mean(x: jax.Array, mask: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    weight = jnp.broadcast_to(mask, x.shape).astype(jnp.float32)
    return (x * weight).sum(axis) / jnp.maximum(weight.sum(axis), 1.0)
