"""What linear attention by features shares: weights that are products of features of queries and keys, in both directions."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from plait.kernels import Mask, Tokens, decay
from plait.kernels.recurrence import over_weights, with_ones
from plait.models.axes import BATCH, HEADS, constrain
from plait.models.build import BuildContext
from plait.models.mixers.base import Direction, HeadMixer, MixerConfig
from plait.models.mixers.linear.recurrent import Recurrent
from plait.models.mixers.linear.sums import Sums, read_flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureConfig(MixerConfig):
    """Options of linear attention by features, which can see as far as the token or all of the document."""

    directions: ClassVar[tuple[Direction, ...]] = ("causal", "bidirectional")

    @abc.abstractmethod
    def heads(self, d_model: int) -> int:
        """Heads at width `d_model`."""

    @abc.abstractmethod
    def sums(self, d_model: int) -> dict[str, tuple[int, int]]:
        """K and V of each sum that decoding keeps of a head; `memory` and `values` are those that heads are read from."""

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        return self.heads(d_model) * sum(read_flops(*shape) for shape in self.sums(d_model).values())


class Features(NamedTuple):
    """Features of queries and keys, and values."""

    q: jax.Array
    """`[B, T, H, K]` float32."""
    k: jax.Array
    v: jax.Array
    """`[B, T, H, V]`."""


class Weights(NamedTuple):
    """The weights `A_ij = q_i . k_j + shift_i` of a token i on those that it sees, float32."""

    q: jax.Array
    """`[B, T, H, K]`."""
    k: jax.Array
    shift: Any = None
    """`[B, T, H, 1]`, or None for 0."""


class SumState(NamedTuple):
    """Decode memory of linear attention by features."""

    sums: Mapping[str, jax.Array]
    """`[B, H, K, V]` float32 each, by name."""
    convs: Mapping[str, jax.Array]
    """The last inputs of each short convolution."""


class FeatureAttention(Recurrent):
    """Heads whose weights are products of features; a token sees its document up to itself or, without `causal`, all of it.

    Subclasses make their projections, `o` the one back, write `project` and, where weights depend on other tokens, `weigh`.
    """

    normalize: bool = False
    """Divides by the summed weights plus 1e-12, as Based does (arXiv 2402.18668); they must not be negative then."""

    def __init__(self, config: FeatureConfig, d_model: int, ctx: BuildContext):
        self.num_heads, self.causal = config.heads(d_model), ctx.causal
        self.sums = tuple(config.sums(d_model).items())

    def weigh(self, inputs: Any, sums: Sums) -> Weights:
        """The weights, from sums over the tokens that each sees."""
        return Weights(inputs.q, inputs.k)

    def read(self, weights: Weights, v: jax.Array, sums: Sums) -> jax.Array:
        """`sum_j A_ij v_j`, `[B, T, H, V]` in v's dtype."""
        o = sums.read("memory", weights.q, weights.k, with_ones(v) if self.normalize else v)
        o = over_weights(o) if self.normalize else o
        o = o if weights.shift is None else o + weights.shift * sums.total("values", v)
        return o.astype(v.dtype)

    def attend(self, inputs, *, at, state):
        if state is not None and not self.causal:
            raise NotImplementedError(f"{type(self).__name__} sees all of a document here; it cannot take it token by token")
        sums = Sums(at, causal=self.causal, state=None if state is None else state.sums)
        o = self.read(self.weigh(inputs, sums), inputs.v, sums)
        return o, None if state is None else state._replace(sums={**state.sums, **sums.after})

    def init_state(self, batch_size, max_len):
        def empty(shape: tuple[int, int]) -> jax.Array:
            return constrain(jnp.zeros((batch_size, self.num_heads, *shape), jnp.float32), (BATCH, HEADS, None, None))

        return SumState({name: empty(shape) for name, shape in self.sums}, self.empty_convs(batch_size))

    def finish(self, o, inputs, x):
        return HeadMixer.finish(self, o, inputs, x)

    def implied(self, inputs, rows, *, at):
        q, k, shift = self.weigh(inputs, Sums(at, causal=self.causal))
        a = jnp.einsum("brhk,bthk->bhrt", q[:, rows], k, precision="highest")
        if shift is not None:
            a = a + jnp.moveaxis(shift[:, rows], 2, 1)
        a = jnp.where(seen(at, rows, self.causal), a, 0)
        return a / (a.sum(-1, keepdims=True) + 1e-12) if self.normalize else a

    def observe(self, inputs, x, *, at):
        q, k, _ = self.weigh(inputs, Sums(at, causal=self.causal))
        g = jnp.zeros(inputs.v.shape[:3], jnp.float32)
        _, memory, stats = decay(q, k, inputs.v.astype(jnp.float32), g, scale=1.0, at=at, return_stats=True)
        return {"memory": memory, "recurrence": stats}


def seen(at: Tokens, rows: jax.Array, causal: bool) -> jax.Array:
    """Which tokens those at `rows` `[R]` see, bool `[B, 1, R, T]`."""
    ids, positions = at.segment_ids, at.positions
    return Mask(causal=causal).dense(positions[:, rows], positions, ids[:, rows], ids)[:, None]
