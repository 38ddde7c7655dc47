"""Head counts shared by the multi-head mixers' configs. Messages begin with the field; the config's holder puts the path before it."""

from __future__ import annotations

import math

import jax

from plait.configs.domains import choices, divisors


def resolve_heads(num_heads: int | None, width: int, head_dim: int) -> int:
    """`num_heads`, or `width // head_dim` when None. Raises ValueError where that does not divide."""
    if num_heads is not None:
        return num_heads
    if width % head_dim:
        raise ValueError(f"head_dim={head_dim} must divide d_model={width} when num_heads is None; set num_heads or a divisor")
    return width // head_dim


def whole_heads(width: int, head_dim: int) -> int:
    """`width // head_dim`, of mixers whose heads fill the width. Raises ValueError where that does not divide."""
    require_divides(("head_dim", head_dim), ("d_model", width))
    return width // head_dim


def expanded(expand: float, channels: int, *, name: str = "expand", of: str = "d_model") -> int:
    """`expand` times as many channels. Raises ValueError, with the names of both options, where that is none."""
    width = int(channels * expand)
    if width < 1:
        raise ValueError(f"{name}={expand} must leave at least one of {of}={channels} channels; use {1 / channels:g} or more")
    return width


def expansion(width: int, channels: int) -> float:
    """The `expand` of which `expanded` makes `width` of so many channels."""
    ratio = width / channels
    return ratio if int(channels * ratio) == width else math.nextafter(ratio, math.inf)


def require_divides(small: tuple[str, int], big: tuple[str, int]) -> None:
    """Raises ValueError unless `small` divides `big`; each is (field, value). Lists the values that would do."""
    if big[1] % small[1]:
        raise ValueError(f"{small[0]}={small[1]} must divide {big[0]}={big[1]}; use one of {choices(divisors(big[1]))}")


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """`[B, T, H * K] -> [B, T, H, K]`."""
    return x.reshape(*x.shape[:-1], num_heads, -1)


def join_heads(o: jax.Array) -> jax.Array:
    """`[B, T, H, V] -> [B, T, H * V]`."""
    return o.reshape(*o.shape[:-2], -1)
