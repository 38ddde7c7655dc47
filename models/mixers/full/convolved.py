"""What attention shares whose queries, keys or values pass a short convolution over time before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax

from plait.models.layers.cache import Cache
from plait.models.layers.short_conv import Convolving
from plait.models.mixers.full.dot_product import DotProduct


class ConvolvedState(NamedTuple):
    """Decode memory."""

    cache: Cache
    convs: Mapping[str, jax.Array]
    """The last inputs of each convolution."""


class Convolved(Convolving, DotProduct):
    """Subclasses name their convolutions, and call `convolve` in `project`."""

    def attend(self, inputs, *, at, state):
        o, cache = super().attend(inputs, at=at, state=None if state is None else state.cache)
        return o, None if state is None else state._replace(cache=cache)

    def recall(self, inputs, carry, *, at, state):
        inputs, carry, cache = super().recall(inputs, carry, at=at, state=state.cache)
        return inputs, carry, state._replace(cache=cache)

    def init_state(self, batch_size, max_len):
        return ConvolvedState(super().init_state(batch_size, max_len), self.empty_convs(batch_size))
