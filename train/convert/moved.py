"""By how much the logits of one model differ from those of another."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from plait.kernels import Tokens
from plait.train.convert.sample import pieces, rows_of
from plait.train.mesh import on_mesh
from plait.train.scoring.evaluate import LOGITS_AT_ONCE
from plait.train.state import Arrays, Blueprint

Model = tuple[Blueprint, Arrays, Arrays]
"""A blueprint, its parameters and its buffers."""


@dataclasses.dataclass(frozen=True)
class Moved:
    """Differences over the ids that both models have."""

    mean_kl: float
    """`sum p log(p / q)` in nats, p the old model's probabilities and q the new one's; the mean over tokens."""
    largest: float
    """The largest difference of a logit."""
    tokens: int
    of: str
    """What the tokens are."""
    seed: int
    """Of their choice."""

    def describe(self) -> str:
        """One line."""
        return f"mean KL {self.mean_kl:.3g} nats from new to old, largest difference {self.largest:.3g}, on {self.tokens:,} {self.of}"


def moved(old: Model, new: Model, mesh: Mesh, *, num_ids: int, text: np.ndarray | None, seed: int) -> Moved:
    """How far `new` is from `old` on rows of the run's length.

    Args:
        num_ids: of the data, from which random ones are drawn.
        text: ids, of which pieces are chosen; None for random ids.
    """
    config = old[0].config
    accumulate, rows = rows_of(config, mesh, 2)
    ids = pieces(np.random.default_rng(seed), (rows, config.data.seq_len), num_ids, text)

    @jax.jit
    def compare(arrays: tuple[tuple[Arrays, Arrays], ...], ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        with on_mesh(mesh, accumulate, config.mesh.context_exchange):
            models = [blueprint.build(*own) for (blueprint, _, _), own in zip((old, new), arrays, strict=True)]
            hidden = [jnp.moveaxis(model.hidden(Tokens(ids))[0], 1, 0) for model in models]  # [T, B, D]
        shared = min(model.config.vocab_size or 1 for model in models)

        def differ(hidden: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
            before, after = (model.logits(one)[..., :shared] for model, one in zip(models, hidden, strict=True))
            p, q = jax.nn.log_softmax(before), jax.nn.log_softmax(after)
            return jnp.sum(jnp.exp(p) * (p - q), axis=-1), jnp.max(jnp.abs(after - before), axis=-1)

        at_once = max(1, LOGITS_AT_ONCE // (2 * len(ids) * shared))
        kl, largest = jax.lax.map(differ, hidden, batch_size=min(at_once, ids.shape[1]))
        return kl.mean(), largest.max()

    kl, largest = compare((old[1:], new[1:]), jnp.asarray(ids))
    kl = np.maximum(kl, 0)  # below by rounding alone
    return Moved(float(kl), float(largest), ids.size, "random ids" if text is None else "tokens of text", seed)
