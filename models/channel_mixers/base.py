"""The channel-mixer contract: the half of a block that acts on each token alone, on each where a router sends it, or on each and the one
before."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from plait.configs.components import Component, Registry
from plait.kernels import Tokens
from plait.models.build import BuildContext
from plait.models.looks.look import Statistics
from plait.models.mixers.base import Losses, products


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelMixerConfig(Component, abc.ABC):
    """Options of a channel mixer."""

    @classmethod
    def example(cls) -> Self:
        """A small config for width 64, for tests and tables; override where the defaults do not fit it."""
        return cls()

    @abc.abstractmethod
    def build(self, d_model: int, ctx: BuildContext) -> ChannelMixer:
        """The module of this config for width `d_model`."""

    def fit(self, d_model: int) -> None:
        """Raises ValueError, in a message that begins with the field, where this config does not fit the width."""

    def settled(self, d_model: int) -> Self:
        """This config with what it leaves to follow from the width written out."""
        return self

    def function(self, d_model: int) -> Self:
        """This config settled, with options of training alone at one value: equal where what it computes is equal."""
        return self.settled(d_model)

    @property
    def own_norm(self) -> bool:
        """Whether it reads the stream as it is, and normalises it itself."""
        return False

    @property
    def experts(self) -> int | None:
        """How many experts the mesh axis `expert` must divide; None without any."""
        return None

    def num_params(self, d_model: int) -> int:
        """Trained parameters."""
        return sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(_abstract(self, d_model), nnx.Param)))

    def flops(self, d_model: int) -> float:
        """Forward operations per token, 2 per multiply-add; override where a token does not meet every weight."""
        return products(_abstract(self, d_model))

    def state_bytes(self, d_model: int, dtype: Any) -> int:
        """Bytes of decode state of one sequence, computed in `dtype`."""
        state = jax.eval_shape(lambda: _abstract(self, d_model, jnp.dtype(dtype).name).init_state(1))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


CHANNEL_MIXERS: Registry[ChannelMixerConfig] = Registry("channel mixer", "plait.models.channel_mixers", ChannelMixerConfig)
register = CHANNEL_MIXERS.register


@functools.lru_cache(maxsize=64)
def _abstract(config: ChannelMixerConfig, d_model: int, dtype: str = "float32") -> Any:
    context = lambda: BuildContext(rngs=nnx.Rngs(0), seq_len=1, compute_dtype=jnp.dtype(dtype))
    return nnx.eval_shape(lambda: config.build(d_model, context()))


Counts = Mapping[str, jax.Array]
"""Sums over tokens by name, float32."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MixedChannels:
    """What a channel mixer gives."""

    y: jax.Array
    """`[B, T, D]`."""
    losses: Losses = dataclasses.field(default_factory=dict)
    """Auxiliary losses by name, coefficients applied."""
    observed: Statistics = dataclasses.field(default_factory=dict)
    """What it alone can tell of the batch, for probes to read by name."""
    counts: Counts = dataclasses.field(default_factory=dict)
    """What `settle` needs of the tokens."""


class ChannelMixer(nnx.Module, abc.ABC):
    """Mixes the channels of `x` `[B, T, D]`, whose tokens stand where `at` says; padding takes part in nothing."""

    @abc.abstractmethod
    def __call__(self, x: jax.Array, *, at: Tokens) -> MixedChannels:
        """Training and scoring."""

    def init_state(self, batch_size: int) -> Any:
        """Empty decode state: a pytree of arrays, batch first; None where a token needs no other."""
        return None

    def advance(self, x: jax.Array, state: Any, *, at: Tokens) -> tuple[jax.Array, Any]:
        """Decoding: y of left-padded prompts from the empty state, or of one token each, and the state after the last token."""
        return self(x, at=at).y, state

    def settle(self, counts: Counts) -> None:
        """Moves buffers once a step, after its gradient, by the counts of all its tokens; leading axes are stacked layers."""
