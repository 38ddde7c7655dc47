"""Loss and scores on held-out rows."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from plait.data.batch import Batch
from plait.data.loader import Data
from plait.models.lm import LM
from plait.train.loss import hidden_losses, tokens_of
from plait.train.mesh import on_mesh
from plait.train.pods.hosts.layout import batch_layout
from plait.train.state import Arrays, Blueprint

LOGITS_AT_ONCE = 1 << 25
"""Logits that judging answers holds at most (128 MiB of float32)."""
EARLY, LATE = 50, 500
"""Positions whose losses the in-context score compares. Source: In-context Learning and Induction Heads (2209.11895)."""
JUDGED = 64
"""Last positions of a row of text whose likeliest tokens are asked whether they repeat; of answers, all are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Sums over held-out tokens and what follows from them."""

    task: str
    """Name of the task whose rows they are."""
    nats: float
    """Negative log-likelihood of all tokens."""
    num_tokens: int
    """Tokens predicted."""
    num_bytes: int | None
    """Bytes of text they stand for; None where they stand for nothing."""
    nats_by_position: np.ndarray
    """`[T]` sums by position in the document's piece."""
    tokens_by_position: np.ndarray
    """`[T]`."""
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """What the task gives by name."""
    in_context: float | None = None
    """In-context score: the loss at position `LATE` less that at `EARLY` of the same document, in nats; None without one so long."""

    repetition: float | None = None
    """Share of predicted tokens, each the likeliest, that the next prediction of the document repeats; None without two that follow each
    other. Source: What Happens During the Loss Plateau? (2506.13688), of what the model predicts of given text here."""

    text_nats: float | None = None
    """Of a mixture, that part of `nats` that `num_bytes` belong to; None where it is all."""
    sources: Mapping[str, Evaluation] = dataclasses.field(default_factory=dict)
    """Of a mixture, by name: that of each source."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of text: comparable between tokenizers and with compressors. None where the tokens are no text."""
        nats = self.nats if self.text_nats is None else self.text_nats
        return None if self.num_bytes is None else nats / math.log(2) / self.num_bytes

    @property
    def named(self) -> dict[str, float]:
        """The results by name: those of text, or loss and the task's scores."""
        if self.bits_per_byte is None:
            return {"loss": self.loss, **self.scores}
        return {"loss": self.loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte, **self.scores}

    def describe(self) -> str:
        """The loss and what says more than it does, for a line of progress; of scores by part, how many there are."""
        if self.bits_per_byte is not None:
            return f"loss {self.loss:.4f}, {self.bits_per_byte:.4f} bits per byte"
        parts = set(filter(is_part, self.named))
        told = ", ".join(f"{name} {value:.4f}" for name, value in self.named.items() if name not in parts)
        return f"{told} and {len(parts)} parts" if parts else told

    def metrics(self) -> dict[str, float]:
        """The metrics of a validation."""
        found = {"loss/val": self.loss}
        if self.bits_per_byte is not None:
            found["loss/bits_per_byte"] = self.bits_per_byte
            found |= {f"position/{first}": loss for first, _, loss in self.by_position()}
        if self.in_context is not None:
            found["loss/in_context"] = self.in_context
        if self.repetition is not None:
            found["predictions/repetition"] = self.repetition
        found |= {f"loss/val_source/{name}": one.loss for name, one in self.sources.items()}
        for name, one in (*self.sources.items(), (self.task, self)):
            found |= {f"task/{name}/{score}": value for score, value in one.scores.items()}
        return found

    def to_json(self) -> dict[str, Any]:
        """All of it, for a file."""
        rows = [{"first": first, "last": last, "loss": loss} for first, last, loss in self.by_position()]
        sizes = {"num_tokens": self.num_tokens} | ({} if self.num_bytes is None else {"num_bytes": self.num_bytes})
        scores = {"in_context": self.in_context, "repetition": self.repetition}
        told = {name: value for name, value in scores.items() if value is not None}
        parts = {"sources": {name: one.to_json() for name, one in self.sources.items()}} if self.sources else {}
        return {**self.named, **told, **sizes, "loss_by_position": rows, **parts}

    def by_position(self) -> list[tuple[int, int, float]]:
        """`(first, last, loss)` of the positions in doubling ranges."""
        edges = [0, *itertools.takewhile(lambda n: n < len(self.nats_by_position), (2**i for i in range(32)))]
        edges.append(len(self.nats_by_position))
        rows = []
        for first, stop in itertools.pairwise(edges):
            if count := self.tokens_by_position[first:stop].sum():
                rows.append((first, stop - 1, float(self.nats_by_position[first:stop].sum() / count)))
        return rows


class Evaluator:
    """Scores batches of some data with a model; compiled once."""

    def __init__(self, blueprint: Blueprint, mesh: Mesh, data: Data):
        config = blueprint.config
        self._layout, self._data = batch_layout(config, mesh, data.config), data
        has_answers = data.config.task.has_answers

        def score(params: Arrays, buffers: Arrays, batch: Batch, sizes: jax.Array | None) -> tuple[Any, ...]:
            with on_mesh(mesh, config.optimizer.accumulate, config.mesh.context_exchange):
                model = blueprint.build(params, buffers)
                hidden, _ = model.hidden(tokens_of(batch))
                if has_answers:
                    nll, likeliest = judged_losses(model, hidden, batch)
                    repeated = repeats(likeliest, batch)
                else:
                    nll, _ = hidden_losses(model, hidden, batch)
                    last = jax.tree.map(lambda a: a[:, -JUDGED:], batch)
                    repeated = repeats(judged_losses(model, hidden[:, -JUDGED:], last)[1], last)
            mask = batch.loss_mask.astype(jnp.float32)
            num_bytes = None if sizes is None else jnp.where(batch.loss_mask > 0, sizes[batch.targets], 0).sum()
            by_position = lambda values: jnp.zeros(batch.tokens.shape[1], jnp.float32).at[batch.positions].add(values * mask)
            score = None if sizes is None else in_context(nll, batch)
            judged = (batch, nll, (likeliest == batch.targets) & (mask > 0), likeliest) if has_answers else None
            return by_position(nll), by_position(jnp.ones_like(nll)), num_bytes, score, repeated, judged

        self._score = jax.jit(score, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, params: Arrays, buffers: Arrays, batches: Iterable[Batch], limit: int | None = None) -> Evaluation:
        """Scores the first `limit` batches (all by default), of which each host gives its rows. Raises ValueError when there are none."""
        task = self._data.config.task
        tokenizer = self._data.tokenizer if task.counts_bytes else None
        sizes = None if tokenizer is None else tokenizer.bytes_per_token.astype(np.int32)
        nats: Any = 0.0
        counts: Any = 0.0
        num_bytes, in_context, repetition = 0, np.zeros(2), np.zeros(2)
        scores: dict[str, np.ndarray] = {}
        for batch in itertools.islice(iter(batches), limit):
            by_position, count, size, score, repeated, judged = self._score(params, buffers, self._layout.place(batch), sizes)
            nats, counts = nats + np.asarray(by_position, np.float64), counts + np.asarray(count, np.float64)
            num_bytes += 0 if size is None else int(size)
            in_context += 0 if score is None else np.asarray(score, np.float64)
            repetition += np.asarray(repeated, np.float64)
            if judged is not None:
                rows, nll, right, likeliest = jax.tree.map(np.asarray, judged)
                for name, sums in {**task.scores(rows, nll, right), **task.distances(rows, likeliest)}.items():
                    scores[name] = scores.get(name, np.zeros(2)) + np.asarray(sums, np.float64)
        if not np.sum(counts):
            fix = "data.val_fraction or data.source" if task.reads_text else "data.task.val_rows"
            raise ValueError(f"no held-out {'text' if task.reads_text else 'rows'} to evaluate; raise {fix}")
        return Evaluation(
            task=task.name,
            nats=float(nats.sum()),
            num_tokens=int(counts.sum()),
            num_bytes=None if sizes is None else num_bytes,
            nats_by_position=nats,
            tokens_by_position=counts,
            in_context=float(in_context[0] / in_context[1]) if in_context[1] else None,
            repetition=float(repetition[0] / repetition[1]) if repetition[1] else None,
            scores={
                name: float(total / weight) if weight else math.nan
                for name, (total, weight) in sorted(scores.items(), key=_order)
            },
        )


def is_part(name: str) -> bool:
    """Whether a score is of a part of the answers, which its name numbers."""
    return any(char.isdecimal() for char in name)


def _order(item: tuple[str, object]) -> list[tuple[int, str]]:
    """Names by letter, but for the numbers in them."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split("([0-9]+)", item[0])]


def in_context(nll: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The in-context score summed over the documents that are long enough, and their number."""
    back, asked = LATE - EARLY, batch.loss_mask > 0
    both = (batch.positions == LATE)[:, back:] & asked[:, back:] & asked[:, :-back]
    return jnp.where(both, nll[:, back:] - nll[:, :-back], 0).sum(), both.sum()


def repeats(likeliest: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """How many of the predicted tokens `[B, T]` the document's next one repeats, and how many have a next one."""
    asked, segments = batch.loss_mask > 0, batch.segment_ids
    both = asked[:, :-1] & asked[:, 1:] & (segments[:, :-1] == segments[:, 1:])
    return (both & (likeliest[:, :-1] == likeliest[:, 1:])).sum(), both.sum()


def judged_losses(model: LM, hidden: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood in nats of each target, 0 off the loss mask, and the likeliest token of each position, `[B, T]`.

    `hidden` is what the head reads, `[B, T, D]`.
    """

    def judge(one: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, targets = one  # [B, D], [B]
        logits = model.logits(hidden)
        target = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - target, jnp.argmax(logits, axis=-1)

    vocab_size = model.config.vocab_size or 1
    at_once = max(1, LOGITS_AT_ONCE // (hidden.shape[0] * vocab_size))
    columns = (jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(batch.targets, 1, 0))
    nll, likeliest = (jnp.moveaxis(x, 0, 1) for x in jax.lax.map(judge, columns, batch_size=min(at_once, hidden.shape[1])))
    return jnp.where(batch.loss_mask > 0, nll, 0), likeliest
