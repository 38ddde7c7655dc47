"""What attention shares whose queries, keys or values pass a short convolution over time before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import jax

from plait.kernels import Tokens
from plait.models.cache import Cache
from plait.models.mixers.full.dot_product import DotProduct


class ConvolvedState(NamedTuple):
    """Decode memory."""

    cache: Cache
    convs: Mapping[str, jax.Array]
    """The last inputs of each convolution."""


class Convolved(DotProduct):
    """Subclasses name their convolutions, and call `convolve` in `project`."""

    convs: ClassVar[tuple[str, ...]]

    def convolve(
        self, streams: Mapping[str, jax.Array], *, at: Tokens, state: ConvolvedState | None
    ) -> tuple[list[jax.Array], ConvolvedState | None]:
        """Each stream `[B, T, C]` through the convolution of its name, and the state with their last inputs."""
        old = {} if state is None else state.convs
        found = {name: getattr(self, name)(y, at=at, state=old.get(name)) for name, y in streams.items()}
        if state is not None:
            state = state._replace(convs={name: last for name, (_, last) in found.items()})
        return [y for y, _ in found.values()], state

    def attend(self, inputs, *, at, state):
        o, cache = super().attend(inputs, at=at, state=None if state is None else state.cache)
        return o, None if state is None else state._replace(cache=cache)

    def recall(self, inputs, carry, *, at, state):
        inputs, carry, cache = super().recall(inputs, carry, at=at, state=state.cache)
        return inputs, carry, state._replace(cache=cache)

    def init_state(self, batch_size, max_len):
        convs = {name: getattr(self, name).init_state(batch_size) for name in self.convs}
        return ConvolvedState(super().init_state(batch_size, max_len), convs)
