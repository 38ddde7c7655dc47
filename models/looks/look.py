"""What a layer shows of itself on a probe step, and who looks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from plait.kernels import SelectedBlocks, Tokens

if TYPE_CHECKING:
    from plait.models.mixers.base import HeadMixer

Statistics = Mapping[str, jax.Array]
"""Arrays by name, float32; NaN where a head or layer has no such value."""


class GateValues(NamedTuple):
    """A gate of every token and head, as a mixer's `observe` tells it: `gates` has those of the `output`, of `decay` and of the `write`."""

    values: jax.Array
    """`[B, T, H]`, or `[B, T, H, C]` where channels have their own."""
    largest: float | None
    """What |values| stay below; None where nothing bounds them."""


class LogitMap(NamedTuple):
    """Logits as a form of the layer's input and nothing else, `scale x_i W_q R W_k^T x_j`, as a mixer's `observe` tells it."""

    q: jax.Array
    """`[D, H, K]`."""
    k: jax.Array
    """`[D, Hkv, K]`."""
    scale: float
    turned: bool
    """Whether R turns queries and keys by their positions; it is 1 else."""
    causal: bool
    """Whether a query sees the tokens of its document up to itself; all of them else."""


class Selection(NamedTuple):
    """What queries choose to see, as a mixer's `observe` tells it as `selection`; a mixer that chooses nothing tells none."""

    blocks: SelectedBlocks
    """Of the queries, among their own tokens."""
    dense: Callable[[jax.Array], jax.Array]
    """Rows `[B, H, R, S]` of attention with the same logits to all that the mask shows, of query positions `[R]`."""


class DocumentRanks(NamedTuple):
    """What the ends of a prompt's query attend to among its documents, as a mixer's `observe` tells it as `document_ranks`."""

    shares: jax.Array
    """float32 `[B, T, N]`: of each document, over the documents of the prompt they sum to 1."""
    documents: jax.Array
    """bool `[B, T, N]`: which there are."""
    right: jax.Array
    """bool `[B, T, N]`: which are right; none where no query ends, or its answer is no document."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """Sequences of a batch in one layer, or in one of the parallel parts of one."""

    at: Tokens
    """`[B, T]`, token ids with it."""
    x: jax.Array
    """`[B, T, D]`, what the mixer read."""
    rows: jax.Array
    """int32 `[R]`: query positions whose attention is looked at."""
    mixer: HeadMixer | None = None
    """None where the layer's output is not linear in its values; it has no heads to look at then."""
    inputs: Any = None
    """Queries, keys, values and gates as the mixer projects them, `v` among them."""
    o: jax.Array | None = None
    """`[B, T, H, V]` head outputs before norm, gates and projection."""
    residual: jax.Array | None = None
    """`[B, T, D]`, the residual stream after the block."""

    channels: Statistics = dataclasses.field(default_factory=dict)
    """What the channel mixer alone can tell of the whole batch."""

    def seen_by(self, observer: Observer) -> Look:
        """What an observer gets to see of a look at everything; gradients are stopped."""
        keep = observer.pick_sequences(self.x.shape[0])
        seen = (self.at, self.x, self.inputs, self.o, self.residual)
        at, x, inputs, o, residual = jax.lax.stop_gradient(jax.tree.map(lambda a: a[keep], seen))
        rows, channels = observer.pick_rows(x.shape[1]), jax.lax.stop_gradient(self.channels)
        return dataclasses.replace(self, at=at, x=x, inputs=inputs, o=o, residual=residual, rows=rows, channels=channels)

    @functools.cached_property
    def max_logits(self) -> jax.Array | None:
        """The largest attention logit of each head, `[H]`, all queries; None where the mixer does not tell them."""
        exact = self.observed.get("attention")
        if exact is None:
            return None
        return jnp.where((self.at.segment_ids > 0)[:, :, None], exact.max_logit, -jnp.inf).max((0, 1))

    @functools.cached_property
    def implied(self) -> jax.Array | None:
        """Implied attention of the rows, `[B, H, R, S]` float32; None where the mixer has none."""
        return None if self.mixer is None else self.mixer.implied(self.inputs, self.rows, at=self.at)

    @functools.cached_property
    def observed(self) -> Mapping[str, Any]:
        """What the mixer alone can tell: see `HeadMixer.observe`."""
        return {} if self.mixer is None else self.mixer.observe(self.inputs, self.x, at=self.at)


class Observer(Protocol):
    """Chooses what of a batch is looked at, and makes statistics of it."""

    @property
    def whole(self) -> bool:
        """Whether it looks at all of it, gradients included, in place of what it picks."""

    def pick_sequences(self, batch_size: int) -> slice:
        """The rows of the batch."""

    def pick_rows(self, length: int) -> jax.Array:
        """The query positions in them, int32 `[R]`."""

    def measure(self, looks: tuple[Look, ...]) -> Statistics:
        """The statistics of a layer, whose heads are those of the looks one after another."""


class Everyone:
    """An observer that looks at all of a layer, gradients included, and measures nothing: what the layer itself needs of its looks."""

    whole = True

    def pick_sequences(self, batch_size: int) -> slice:
        return slice(None)

    def pick_rows(self, length: int) -> jax.Array:
        return jnp.arange(length)

    def measure(self, looks: tuple[Look, ...]) -> Statistics:
        return {}


def look(
    observer: Observer, *, at: Tokens, x: jax.Array, mixer: HeadMixer | None = None, inputs: Any = None, o: Any = None
) -> Look:
    """What an observer gets to see of a layer's whole batch."""
    whole = Look(at=at, x=x, rows=jnp.arange(x.shape[1]), mixer=mixer, inputs=inputs, o=o)
    return whole if observer.whole else whole.seen_by(observer)
