"""How likely texts go on as they do."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from plait.data.batch import Batch
from plait.kernels import Tokens
from plait.train.harness.shapes import Shapes
from plait.train.mesh import on_mesh
from plait.train.run import Trained
from plait.train.scoring.evaluate import judged_losses
from plait.train.state import Arrays

Pair = tuple[Sequence[int], Sequence[int]]
"""Tokens that are given, and tokens that follow."""
_SHORTEST = 4
"""Columns that the head reads at least."""
_SHARED = 4
"""Continuations that are scored for each row where many texts are given more than once, as before answers of one token."""


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Of the tokens that follow."""

    log: float
    """Sum of the logarithms of their probabilities, in nats."""
    greedy: bool
    """Whether each is the likeliest one."""


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """What is scored at once."""

    texts: list[tuple[int, ...]]
    width: int
    rows: int
    slots: int
    asked: list[tuple[int, int]]
    """The number of each pair and of the text that it reads."""


class Likelihoods:
    """Scores pairs with a run; compiled once for a shape."""

    def __init__(self, trained: Trained, shapes: Shapes):
        self._trained, self._shapes = trained, shapes
        blueprint = trained.program.blueprint

        def score(
            params: Arrays, buffers: Arrays, at: Tokens, row: jax.Array, targets: jax.Array, mask: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            with on_mesh(shapes.mesh, shapes.microbatches):
                model = blueprint.build(params, buffers)
                hidden = model.hidden(at)[0][:, -targets.shape[1] :]
                hidden = hidden if len(row) == len(hidden) else hidden[row]
                nll, likeliest = judged_losses(model, hidden, Batch(targets, targets, targets, targets, mask))
                return nll, (likeliest == targets) | (mask == 0)

        self._score = jax.jit(score, out_shardings=NamedSharding(shapes.mesh, PartitionSpec()))

    def __call__(self, pairs: Sequence[Pair], told: Callable[[int], None] = lambda done: None) -> list[Likelihood]:
        """The likelihood of each pair's second part after its first.

        A pair with more tokens than a row and one more, of which the last is not read, loses its first ones.

        Args:
            pairs: each part of at least one token.
            told: is told how many are scored so far.

        Raises:
            ValueError: a part is empty, or the second has more tokens than a row.
        """
        longest = self._shapes.longest
        for given, follows in pairs:
            if not len(given) or not len(follows):
                raise ValueError(
                    f"{'nothing is given' if not len(given) else 'nothing follows'}; each part must have at least one token"
                )
            if len(follows) > longest:
                raise ValueError(
                    f"max_length={longest} must be at least the {len(follows)} tokens that are to be scored; raise it, or leave that text out"
                )
        found: list[Likelihood | None] = [None] * len(pairs)
        done = 0
        for chunk in self._chunks(pairs):
            for (number, _), one in zip(chunk.asked, self._scored(chunk, pairs)):
                found[number] = one
            done += len(chunk.asked)
            told(done)
        return [one for one in found if one is not None]

    def _chunks(self, pairs: Sequence[Pair]) -> Iterator[_Chunk]:
        """Longest first, pairs that read the same text together."""
        texts = [(*given, *follows)[-self._shapes.longest - 1 :][:-1] for given, follows in pairs]
        order = sorted(range(len(pairs)), key=lambda number: (-len(texts[number]), texts[number]))
        if len(pairs) >= 2 * len(set(texts)):
            each, groups = _SHARED, [list(numbers) for _, numbers in itertools.groupby(order, key=texts.__getitem__)]
        else:
            each, groups = 1, [[number] for number in order]
        queue = collections.deque(groups)
        while queue:
            width = self._shapes.width(len(texts[queue[0][0]]))
            rows = self._shapes.rows(width, len(queue))
            chunk = _Chunk([], width, rows, rows * each, [])
            while queue and len(chunk.texts) < rows and (room := chunk.slots - len(chunk.asked)):
                numbers = queue.popleft()
                chunk.asked.extend((number, len(chunk.texts)) for number in numbers[:room])
                chunk.texts.append(texts[numbers[0]])
                if numbers[room:]:
                    queue.appendleft(numbers[room:])
            yield chunk

    def _scored(self, chunk: _Chunk, pairs: Sequence[Pair]) -> Iterator[Likelihood]:
        follows = [pairs[number][1] for number, _ in chunk.asked]
        columns = min(chunk.width, max(_SHORTEST, 1 << (max(map(len, follows)) - 1).bit_length()))
        row = np.arange(chunk.slots, dtype=np.int32) % chunk.rows
        targets, mask = np.zeros((chunk.slots, columns), np.int32), np.zeros((chunk.slots, columns), np.float32)
        for slot, ((_, text), tokens) in enumerate(zip(chunk.asked, follows)):
            row[slot] = text
            targets[slot, columns - len(tokens) :] = tokens
            mask[slot, columns - len(tokens) :] = 1
        place = self._shapes.everywhere
        at = self._shapes.place(chunk.texts, chunk.width, chunk.rows)
        nll, right = self._score(self._trained.params, self._trained.buffers, at, place(row), place(targets), place(mask))
        sums = -np.asarray(nll, np.float64).sum(-1)
        every: Any = np.asarray(right).all(-1).tolist()
        for slot in range(len(chunk.asked)):
            yield Likelihood(float(sums[slot]), every[slot])
