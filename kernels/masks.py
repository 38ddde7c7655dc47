"""The one mask object of attention: which keys a query may see, by position and segment."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Which keys a query sees, as a rule on positions; hashable, so it can be a static argument of a jitted function.

    A query sees a key when both are in the same segment (padding, id 0, sees nothing and is not seen), when the key is not in its
    future, and when the key is within reach: inside the window, or one of the segment's first tokens.
    Other kinds of reach subclass this and override `reaches` and `key_range`; nothing else knows the kind.
    """

    causal: bool = True
    """A query sees no key at a later position."""

    window_size: int | None = None
    """Keys a query sees, itself included (tokens); without `causal`, as many on the other side. None is no limit."""

    num_sink_tokens: int = 0
    """The first tokens of each segment, visible to every later query of the segment whatever the window, to earlier ones not."""

    def __post_init__(self) -> None:
        if self.window_size is not None and self.window_size < 1:
            raise ValueError(f"mask.window_size={self.window_size} must be at least 1 (the query itself); use None for no limit")
        if self.num_sink_tokens < 0:
            raise ValueError(f"mask.num_sink_tokens={self.num_sink_tokens} must be at least 0; use 0 for none")
        if self.num_sink_tokens and self.window_size is None:
            raise ValueError(
                f"mask.num_sink_tokens={self.num_sink_tokens} needs a window, without which every token is visible; "
                "set window_size or use 0"
            )

    def reaches(self, q_positions: Array, kv_positions: Array) -> Array:
        """Whether a query position reaches a key position of its segment; broadcasts its arguments."""
        distance = q_positions - kv_positions
        seen = jnp.ones(distance.shape, bool)
        if self.window_size is not None:
            seen = (abs(distance) < self.window_size) | ((kv_positions < self.num_sink_tokens) & (distance >= 0))
        return seen & (distance >= 0) if self.causal else seen

    def dense(self, q_positions: Array, kv_positions: Array, q_segment_ids: Array, kv_segment_ids: Array) -> Array:
        """The boolean mask [..., T, S] of positions and segment ids [..., T] and [..., S]; True is visible."""
        q_segment_ids, kv_segment_ids = q_segment_ids[..., :, None], kv_segment_ids[..., None, :]
        same = (q_segment_ids == kv_segment_ids) & (kv_segment_ids != 0)
        return same & self.reaches(q_positions[..., :, None], kv_positions[..., None, :])

    def key_range(self, start: int, stop: int, num_keys: int) -> tuple[int, int]:
        """The keys [lo, hi) that queries [start, stop) of the same sequence can see, sink tokens aside; indices, no positions."""
        reach = num_keys if self.window_size is None else self.window_size - 1
        return max(0, start - reach), min(num_keys, stop if self.causal else stop + reach)
