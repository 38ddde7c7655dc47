"""How much attention the first tokens of a document get, and whether another token gets as much."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from plait.kernels import Tokens
from plait.train.probes.base import Probe, register
from plait.train.probes.means import masked_mean, weights
from plait.train.probes.statistic import Metric, Panel, Statistic, Threshold, Trend
from plait.train.probes.words import count

THRESHOLD = 0.3
"""Mean weight that a token gets from later ones, above which a head counts as a sink (arXiv 2410.10781)."""
MODEL_THRESHOLD = 0.1
"""Mean sink rate above which the model has sinks."""
_FEWEST_QUERIES = 32  # that can see a token for it to be a sink: of few, uniform attention alone gives it more than the threshold


def is_sink(values: Any) -> Any:
    """bool: which are above the threshold."""
    return values > THRESHOLD


@register("sinks", source="When Attention Sink Emerges in Language Models (2410.10781), section 3, per document here")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sinks(Probe):
    """Mean weights on tokens: of all queries where the mixer tells them, else of the looked-at ones."""

    statistics = (
        Statistic(
            name="sink",
            per="head",
            unit="share",
            meaning="αₖ: mean weight on the document's k-th token by the queries from it on; a token's own too",
            size=lambda config: config.first_k,
            panel=Panel(
                title="Sink weight α₁",
                section="Attention over training",
                trends=(
                    Trend(
                        title="Heads with a sink",
                        unit=f"share of heads, α₁ > {THRESHOLD}",
                        reduce=lambda alpha: np.mean(is_sink(alpha)),
                    ),
                    Trend(title="Strongest sink", unit="largest α₁ of a head", reduce=np.max, limit=THRESHOLD),
                ),
                map=True,
                by_entry="αₖ by position k",
                limits=(0, 1),
                column=("sink heads", lambda alpha: f"{is_sink(alpha).sum()}/{np.isfinite(alpha).sum()}"),
            ),
            event=Threshold(
                kind="sink_onset",
                limits=(THRESHOLD,),
                meaning="a head's α₁ rises above the limit",
                message="{where} became a sink: {value:.2f} of its attention goes to the first token",
                start_kind="sink_at_start",
                start_message="{where} is a sink since the first probe: {value:.2f} of its attention went to the first token",
            ),
        ),
        Statistic(
            name="sink_rate",
            per="head",
            unit="share of documents",
            meaning=f"share of the documents of at least {_FEWEST_QUERIES} tokens whose α₁ is above {THRESHOLD}",
            metric=Metric(name="attn/sink_rate", reduce=np.nanmean, meaning="mean over heads and layers"),
            panel=Panel(title="Sink rate", section="Attention over training", limits=(0, 1), compared=False),
            event=Threshold(
                kind="model_sink_onset",
                limits=(MODEL_THRESHOLD,),
                per="model",
                meaning="the model's mean sink rate rises above the limit",
                message="{value:.0%} of (head, document) pairs have a sink",
                start_kind="model_sink_at_start",
            ),
        ),
        Statistic(
            name="sink_elsewhere",
            per="head",
            unit="share",
            meaning="largest mean weight on one token that is not its document's first, by all queries from it on, at least "
            f"{_FEWEST_QUERIES} (softmax layers); mean over sequences",
            metric=Metric(name="attn/sink_elsewhere", reduce=np.nanmax, meaning="the largest of all heads"),
            panel=Panel(title="Sink elsewhere", section="Attention over training", limits=(0, 1), compared=False),
        ),
    )

    def measure(self, look, config):
        if look.implied is None:
            return {}
        positions, documents = look.at.positions, look.at.numbered()
        if (first_masses := look.observed.get("first_masses")) is not None:
            received = jnp.moveaxis(first_masses(first_k=config.first_k), 1, -1)  # [B, H, K, T]
            query_document, query_position = documents, positions
        else:
            query_document, query_position = documents[:, look.rows], positions[:, look.rows]  # [B, R]
            document = query_document[:, :, None] == documents[:, None, :]  # [B, R, S]
            k = jnp.arange(config.first_k)
            starts = document[:, None] & (positions[:, None, None, :] == k[None, :, None, None])  # [B, K, R, S]
            received = jnp.einsum("bhrs,bkrs->bhkr", weights(look.implied), starts.astype(jnp.float32))
        real = (query_document > 0)[:, None, None, :]
        sees = real & (query_position[:, None, None, :] >= jnp.arange(config.first_k)[None, None, :, None])
        sink, first = masked_mean(received, sees, axis=(0, 3)), received[:, :, 0]
        if (exact := look.observed.get("attention")) is not None:
            first, query_document = jnp.moveaxis(exact.first_mass, 1, -1), documents
            sink = sink.at[:, 0].set(masked_mean(first, (documents > 0)[:, None, :], axis=(0, 2)))
        found = {"sink": sink, "sink_rate": _share_of_documents(first, query_document, documents)}
        if (column_mass := look.observed.get("column_mass")) is not None:
            found["sink_elsewhere"] = _largest_elsewhere(column_mass(), look.at)
        return found

    def summary(self, run):
        sentences = []
        onsets, starts = ([e for e in run.events_of(kind) if e["layer"] is not None] for kind in ("sink_onset", "sink_at_start"))
        for group, part in run.by_group("sink").items():
            last = part[-1]
            heads, now = int(np.isfinite(last).sum()), int(is_sink(last).sum())
            if not heads:
                continue
            mine, early = ([e for e in some if np.isfinite(last[e["layer"], e["head"]])] for some in (onsets, starts))
            text = f"{now} of {count(heads, 'head')} of the {group.words} {'is a sink' if now == 1 else 'are sinks'} at the end"
            if mine:
                text += f"; the first onset was layer {mine[0]['layer']} head {mine[0]['head']} at step {mine[0]['step']:,}"
                text += f", the last of {len(mine)} at step {mine[-1]['step']:,}" if len(mine) > 1 else ""
            if early:
                text += f"; {len(early)} had α₁ > {THRESHOLD} from the first probe on, which is no emergence"
            if now:
                layer, head = np.unravel_index(np.nanargmax(last), last.shape)
                text += f"; strongest is layer {layer} head {head} with α₁ = {last[layer, head]:.2f}"
            sentences.append(text + ".")
        return " ".join(sentences) or None


def _share_of_documents(first: jax.Array, query_document: jax.Array, documents: jax.Array) -> jax.Array:
    """`[H]`: how many of the documents have a sink; NaN where none is long enough.

    Args:
      first: weights `[B, H, R]` of queries on their document's first token.
      query_document: the number in its row `[B, R]` of the document in which each query stands, from 1; 0 for padding.
      documents: that of every token, `[B, T]`.
    """
    length = documents.shape[1]
    sums = lambda values, numbers, most: jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=most + 1))(values, numbers)[
        :, 1:
    ]
    long = sums(jnp.ones(documents.shape), documents, length) >= _FEWEST_QUERIES  # by document, [B, T]
    place = jnp.pad(jnp.where(long, jnp.cumsum(long, axis=1), 0), ((0, 0), (1, 0)))  # among the long ones, of which there are few
    of_query, most = jnp.take_along_axis(place, query_document, axis=1), length // _FEWEST_QUERIES
    queries = sums(jnp.ones(of_query.shape), of_query, most)[..., None]
    alpha = sums(jnp.moveaxis(first, 1, -1), of_query, most) / jnp.maximum(queries, 1)  # [B, documents, H]
    told = queries > 0
    return jnp.where(told.any(), masked_mean(is_sink(alpha).astype(jnp.float32), told, axis=(0, 1)), jnp.nan)


def _largest_elsewhere(mass: jax.Array, at: Tokens) -> jax.Array:
    """`[H]` from what each key receives, `[B, T, H]`; NaN where no key beyond the first of a document has queries enough."""
    index = jnp.arange(mass.shape[1])[None, :]
    last = jnp.diff(at.segment_ids, axis=1, append=-1) != 0
    end = jax.lax.cummin(jnp.where(last, index, mass.shape[1]), axis=1, reverse=True)
    queries = end - index + 1  # of the document, from the key on
    counts = (at.segment_ids > 0) & (at.positions > 0) & (queries >= _FEWEST_QUERIES)
    largest = jnp.where(counts[..., None], mass / queries[..., None], -jnp.inf).max(1)  # [B, H]
    there = counts.any(1)[:, None]
    return jnp.where(there.any(), masked_mean(jnp.where(there, largest, 0.0), there, axis=0), jnp.nan)
