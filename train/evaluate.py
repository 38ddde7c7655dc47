"""Loss on held-out text."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from plait.data.batch import Batch
from plait.data.tokenizer import Tokenizer
from plait.train.loss import token_losses
from plait.train.mesh import on_mesh
from plait.train.pods.hosts.layout import batch_layout
from plait.train.state import Arrays, Blueprint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Sums over held-out tokens and what follows from them."""

    nats: float
    """Negative log-likelihood of all tokens."""
    num_tokens: int
    """Tokens predicted."""
    num_bytes: int
    """Bytes of text they stand for."""
    nats_by_position: np.ndarray
    """`[T]` sums by position in the document's piece."""
    tokens_by_position: np.ndarray
    """`[T]`."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text: comparable between tokenizers and with compressors."""
        return self.nats / math.log(2) / self.num_bytes

    def metrics(self) -> dict[str, float]:
        """The metrics of a validation."""
        return {"loss/val": self.loss, "loss/bits_per_byte": self.bits_per_byte}

    def to_json(self) -> dict[str, Any]:
        """All of it, for a file."""
        rows = [{"first": first, "last": last, "loss": loss} for first, last, loss in self.by_position()]
        numbers = {"loss": self.loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        return {**numbers, "num_tokens": self.num_tokens, "num_bytes": self.num_bytes, "loss_by_position": rows}

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
    """Scores batches with a model; compiled once."""

    def __init__(self, blueprint: Blueprint, mesh: Mesh):
        self._layout = batch_layout(blueprint.config, mesh)

        def score(params: Arrays, buffers: Arrays, batch: Batch, sizes: jax.Array) -> tuple[jax.Array, ...]:
            with on_mesh(mesh, blueprint.config.optimizer.accumulate):
                nll, _, _ = token_losses(blueprint.build(params, buffers), batch)
            mask = batch.loss_mask.astype(jnp.float32)
            position = jax.nn.one_hot(batch.positions, batch.tokens.shape[1], dtype=jnp.float32) * mask[..., None]
            num_bytes = jnp.where(batch.loss_mask > 0, sizes[batch.targets], 0).sum()
            return jnp.einsum("bt,btp->p", nll, position, precision="highest"), position.sum((0, 1)), num_bytes

        self._score = jax.jit(score, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(
        self, params: Arrays, buffers: Arrays, batches: Iterable[Batch], tokenizer: Tokenizer, limit: int | None = None
    ) -> Evaluation:
        """Scores the first `limit` batches (all by default), of which each host gives its rows. Raises ValueError when there are none."""
        sizes = tokenizer.bytes_per_token.astype(np.int32)
        nats: Any = 0.0
        counts: Any = 0.0
        num_bytes = 0
        for batch in itertools.islice(iter(batches), limit):
            by_position, count, size = self._score(params, buffers, self._layout.place(batch), sizes)
            nats, counts = nats + np.asarray(by_position, np.float64), counts + np.asarray(count, np.float64)
            num_bytes += int(size)
        if not np.sum(counts):
            raise ValueError("no held-out text to evaluate; raise data.val_fraction or data.source")
        return Evaluation(
            nats=float(nats.sum()),
            num_tokens=int(counts.sum()),
            num_bytes=num_bytes,
            nats_by_position=nats,
            tokens_by_position=counts,
        )


TASKS = ("ppl",)
"""What a run can be evaluated on."""


def check_tasks(text: str) -> tuple[str, ...]:
    """The names of a comma-separated list of tasks. Raises ValueError for one that does not exist."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        raise ValueError(f"--tasks {text!r} must name tasks among {', '.join(TASKS)}")
    return names
