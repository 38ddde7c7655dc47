"""What full mixers share whatever weighs their values: a cache of past tokens to decode from."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from plait.kernels import Mask, Tokens
from plait.models.build import BuildContext
from plait.models.layers.cache import Cache, Slots
from plait.models.mixers.base import HeadMixer


def mean_keys(seq_len: int, most: int | None = None) -> float:
    """Keys that a causal query sees, the mean over a sequence; `most` of them where there are more."""
    most = seq_len if most is None else min(seq_len, most)
    return most - most * (most - 1) / 2 / seq_len


class QKV(NamedTuple):
    q: jax.Array  # [B, T, H, K]
    k: jax.Array  # [B, S, Hkv, K]
    v: jax.Array  # [B, S, Hkv, V]
    kv_at: Tokens | None = None  # where the keys stand, when they are not the queries' own tokens
    before: tuple[jax.Array, Tokens] | None = None  # the queries of a rule's halo, when decoding


class Cached(HeadMixer):
    """Attention that decodes from a cache of past tokens. Subclasses write `project`, `weigh`, `implied`, `output`, `entries`, and
    `kept` and `recalled` where the cache holds other things than keys and values."""

    slots = Slots()

    def __init__(self, ctx: BuildContext):
        self.dtype, self.mask = ctx.compute_dtype, Mask(causal=ctx.causal)

    @abc.abstractmethod
    def entries(self) -> Mapping[str, tuple[tuple[int, ...], str | None]]:
        """What the cache keeps of a token: shape, and the logical axis of its first dimension."""

    def kept(self, inputs: Any) -> Mapping[str, jax.Array]:
        """What the cache keeps of the inputs."""
        return {"k": inputs.k, "v": inputs.v}

    def recalled(self, inputs: Any, cache: Cache) -> Any:
        """The inputs with the cache's tokens as keys."""
        return inputs._replace(k=cache.entries["k"], v=cache.entries["v"], kv_at=cache.at)

    @abc.abstractmethod
    def weigh(self, inputs: Any, *, at: Tokens) -> Any:
        """Head outputs `[B, T, H, V]` of inputs whose keys are the queries' own tokens or, with `kv_at`, others."""

    def init_state(self, batch_size, max_len) -> Any:
        return self.slots.empty(batch_size, max_len, self.entries(), self.dtype)

    def attend(self, inputs, *, at, state):
        o = self.weigh(inputs, at=at)
        return o, None if state is None else self.slots.write(state, self.kept(inputs), at)

    def recall(self, inputs, carry, *, at, state):
        state = self.slots.write(state, self.kept(inputs), at)
        return self.recalled(inputs, state), carry, state

    def attend_step(self, inputs, *, at, state):
        return self.weigh(inputs, at=at), state
