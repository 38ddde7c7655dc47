"""Short convolution for TPU (Mosaic): one read and one write of every element, forward, and two reads and one write backward.

A tile of tokens is widened to float32 with the eight tokens before it in front, so that a tap is a load some rows higher up. The
backward pass goes through the tiles of tokens from the last to the first: with u the convolution before its activation,
  du_t = dy_t act'(u_t)      dx_s = sum_k weight_{W-1-k} du_{s+k}      dweight_{W-1-k} = sum_t du_t x_{t-k}
and the first rows of du are kept for the tile before. Whether token t may see the token k before it is bit k of an int32, and bit 0
whether t is real at all.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from plait.kernels.costs import cost
from plait.kernels.short_conv.call import ShortConvCall
from plait.kernels.short_conv.reference import first_id, last_inputs
from plait.kernels.target import not_on

Array = jax.Array

LANES = 128
HALO = 8
"""Tokens kept on either side of a tile; also the sublanes of a register."""

MAX_WIDTH = 8
MIN_TOKENS = 16

_ROWS = 32
"""Rows that are worked on at a time, which keeps them in registers."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Sizes of a tile: tokens a multiple of 32, channels of 128. Small problems get smaller ones."""

    tokens: int = 512
    channels: int = 512

    def __post_init__(self) -> None:
        for name, unit in (("tokens", _ROWS), ("channels", LANES)):
            size = getattr(self, name)
            if size < unit or size % unit:
                raise ValueError(f"tiles.{name}={size} must be a positive multiple of {unit}; use {unit} or 512")

    def fit(self, length: int, channels: int) -> "Tiles":
        """These tiles, none longer than the problem needs, and channels such that few are padded."""
        groups = pl.cdiv(channels, LANES)
        most = max(n for n in range(1, self.channels // LANES + 1) if groups % n == 0)
        return Tiles(tokens=min(self.tokens, pl.cdiv(length, _ROWS) * _ROWS), channels=most * LANES)


TILES = Tiles()
"""On every generation: the kernel is as fast as memory from there on."""


def unsupported(call: ShortConvCall) -> str | None:
    """Why this kernel cannot serve a call, or None."""
    if reason := not_on("tpu"):
        return reason
    if (dtype := call.x.dtype.name) not in ("float32", "bfloat16"):
        return f"x is {dtype}, neither float32 nor bfloat16"
    if (taps := call.weight.shape[0]) > MAX_WIDTH:
        return f"{taps} taps exceed {MAX_WIDTH}"
    if (length := call.x.shape[1]) < MIN_TOKENS:
        return f"{length} tokens fill no tile of at least {MIN_TOKENS}"
    return None


def short_conv(call: ShortConvCall) -> tuple[Array, Array]:
    """See `plait.kernels.short_conv`."""
    x, weight, bias, before, segment_ids = call.x, call.weight, call.bias, call.before, call.segment_ids
    reach, (_, length, channels) = call.reach, x.shape
    bits = None if segment_ids is None else _bits(segment_ids, reach)
    bias = jnp.zeros((channels,), jnp.float32) if bias is None else bias.astype(jnp.float32)
    y = _convolve(call.activation == "silu", TILES.fit(length, channels), x, weight.astype(jnp.float32), bias, before, bits)
    if segment_ids is None:
        return y, x[:, length - reach :]
    ids = jnp.concatenate([jnp.repeat(first_id(segment_ids), reach, axis=1), segment_ids], axis=1)
    return y, last_inputs(jnp.concatenate([before, x], axis=1), ids, reach)


def _bits(segment_ids: Array, reach: int) -> Array:
    """int32 [B, T]: bit k where the token and the one k before it are in one segment; nothing for padding."""
    ids = jnp.concatenate([jnp.repeat(first_id(segment_ids), reach, axis=1), segment_ids], axis=1)
    length = segment_ids.shape[1]
    bits = jnp.zeros_like(segment_ids, jnp.int32)
    for k in range(reach + 1):
        same = ids[:, reach - k : reach - k + length] == segment_ids
        bits += jnp.where(same & (segment_ids != 0), 1 << k, 0)
    return bits


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolve(silu: bool, tiles: Tiles, x: Array, weight: Array, bias: Array, before: Array, bits: Array | None) -> Array:
    """y of x [B, T, D], float32 weight [W, D] and bias [D], before [B, W-1, D] and bits [B, T]."""
    call = _Call(tiles, x, weight, bias, before, bits)
    y = call.run(
        partial(_forward_kernel, silu, bits is not None, weight.shape[0]),
        "short_conv_forward",
        outputs=[call.tile],
        scratch=[_rows_of(tiles)],
    )[0]
    return y[:, : x.shape[1], : x.shape[2]]


def _forward(silu: bool, tiles: Tiles, *operands: Any) -> tuple[Array, Any]:
    return _convolve(silu, tiles, *operands), operands


def _backward(silu: bool, tiles: Tiles, saved: Any, d_y: Array) -> Any:
    x, weight, bias, before, bits = saved
    taps, reach = weight.shape[0], weight.shape[0] - 1
    call = _Call(tiles, x, weight, bias, before, bits, backwards=True)
    rows = (taps + 1) * HALO
    sums_tile = (jax.ShapeDtypeStruct((x.shape[0], rows, call.channels), jnp.float32), (1, rows, tiles.channels), call.by_channel)
    d_x, sums = call.run(
        partial(_backward_kernel, silu, bits is not None, taps),
        "short_conv_backward",
        more=[call.pad(d_y.astype(x.dtype))],
        outputs=[call.tile, sums_tile],
        scratch=[_rows_of(tiles)] * 2,
    )
    sums = jnp.sum(sums.reshape(-1, taps + 1, HALO, call.channels), axis=(0, 2))[:, : x.shape[2]]

    def first_outputs(before: Array) -> Array:  # the only ones that the initial state reaches
        start = jax.tree.map(lambda a: a[:, :reach], (x, bits))
        return _plain(silu, start[0], weight, bias, before, start[1])

    d_before = jax.vjp(first_outputs, before)[1](d_y[:, :reach])[0] if reach else before
    return d_x[:, : x.shape[1], : x.shape[2]], sums[:taps], sums[taps], d_before, None


_convolve.defvjp(_forward, _backward)


def _plain(silu: bool, x: Array, weight: Array, bias: Array, before: Array, bits: Array | None) -> Array:
    """`_convolve` written out."""
    inputs, length, reach = jnp.concatenate([before, x], axis=1).astype(jnp.float32), x.shape[1], weight.shape[0] - 1
    y = jnp.broadcast_to(bias[None, None, :], x.shape)
    for k in range(reach + 1):
        tap = inputs[:, reach - k : reach - k + length] * weight[reach - k][None, None, :]
        y = y + (tap if bits is None else jnp.where((bits & (1 << k) != 0)[..., None], tap, 0))
    y = jax.nn.silu(y) if silu else y
    return (y if bits is None else jnp.where((bits != 0)[..., None], y, 0)).astype(x.dtype)


def _rows_of(tiles: Tiles) -> Any:
    """Scratch for a tile in float32 with eight more tokens, each group of lanes apart."""
    return pltpu.VMEM((tiles.channels // LANES, tiles.tokens + HALO, LANES), jnp.float32)


class _Call:
    """Operands padded to whole tiles, and the grid (batch, channel tiles, token tiles) over them."""

    def __init__(
        self, tiles: Tiles, x: Array, weight: Array, bias: Array, before: Array, bits: Array | None, *, backwards: bool = False
    ):
        self.tiles = tiles
        self.batch, length, channels = x.shape
        self.length = pl.cdiv(length, tiles.tokens) * tiles.tokens
        self.channels = pl.cdiv(channels, tiles.channels) * tiles.channels
        self.x, self.bits = self.pad(x), None if bits is None else self.pad(bits[..., None])[..., 0][:, None]
        front = ((0, 0), (HALO - before.shape[1], 0), (0, self.channels - channels))
        self.before = jnp.pad(before, front).astype(jnp.float32)
        constants = jnp.concatenate([weight, bias[None, :]])
        self.constants = jnp.pad(constants, ((0, 0), (0, self.channels - channels)))
        self.steps = self.length // tiles.tokens
        self.order = (lambda t: self.steps - 1 - t) if backwards else (lambda t: t)
        self.by_channel = lambda b, d, t: (b, 0, d)
        shape = jax.ShapeDtypeStruct(self.x.shape, x.dtype)
        self.tile = (shape, (1, tiles.tokens, tiles.channels), lambda b, d, t: (b, self.order(t), d))

    def pad(self, x: Array) -> Array:
        """[B, T, D] with both axes whole; one channel stays one."""
        more = (self.length - x.shape[1], 0 if x.shape[2] == 1 else self.channels - x.shape[2])
        return x if more == (0, 0) else jnp.pad(x, ((0, 0), (0, more[0]), (0, more[1])))

    def run(
        self, kernel: Any, name: str, *, outputs: list[Any], scratch: list[Any], more: list[Array] | None = None
    ) -> list[Array]:
        """Runs a kernel on x, the tokens before each tile, those before the first one, weight and bias, bits, and `more`."""
        tiles, block = self.tiles, pl.BlockSpec(self.tile[1], self.tile[2])
        rows = 2 * HALO  # of a 16-bit tile
        halo = lambda b, d, t: (b, jnp.maximum(self.order(t) * (tiles.tokens // rows) - 1, 0), d)
        inputs = [self.x, self.x, self.before, self.constants]
        specs = [
            block,
            pl.BlockSpec((1, rows, tiles.channels), halo),
            pl.BlockSpec((1, HALO, tiles.channels), self.by_channel),
            pl.BlockSpec((self.constants.shape[0], tiles.channels), lambda b, d, t: (0, d)),
        ]
        if self.bits is not None:
            inputs.append(self.bits)
            specs.append(pl.BlockSpec((1, 1, tiles.tokens), lambda b, d, t: (b, 0, self.order(t))))
            scratch = [*scratch, pltpu.VMEM((tiles.tokens + HALO, LANES), jnp.int32)]
        inputs += more or []
        specs += [block] * len(more or [])
        return pl.pallas_call(
            kernel,
            name=name,
            out_shape=[shape for shape, _, _ in outputs],
            grid=(self.batch, self.channels // tiles.channels, self.steps),
            in_specs=specs,
            out_specs=[pl.BlockSpec(shape, index) for _, shape, index in outputs],
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            cost_estimate=cost(
                (*inputs, *(shape for shape, _, _ in outputs)),
                flops=2 * self.constants.shape[0] * self.x.size * (1 + len(more or [])),
            ),
        )(*inputs)


def _allowed(bits: Any, row: int, taps: int) -> list[Array | None]:
    """Which of R tokens may see the token k before them, [R, 128] for each k; None is all."""
    if bits is None:
        return [None] * taps
    here = bits[row : row + _ROWS]
    return [here & (1 << k) != 0 for k in range(taps)]


def _where(allowed: Array | None, x: Array) -> Array:
    return x if allowed is None else jnp.where(allowed, x, 0)


def _fill(extended: Any, x: Any, halo: Any, before: Any, first: Array) -> None:
    """Writes a tile's tokens and the eight before them, by groups of lanes."""
    for group, lanes in enumerate(_lane_groups(x)):
        extended[group, :HALO] = jnp.where(first, before[0, :, lanes], halo[0, HALO:, lanes].astype(jnp.float32))
        extended[group, HALO:] = x[0, :, lanes].astype(jnp.float32)


def _before_activation(
    rows: Any, constants: Any, lanes: slice, row: int, allowed: list[Array | None]
) -> tuple[Array, list[Array]]:
    """u [R, 128], and what each tap sees, from the current token backwards; `rows` is one group of lanes."""
    seen, taps = [], len(allowed)
    for k in range(taps):
        seen.append(_where(allowed[k], rows[HALO + row - k : HALO + row - k + _ROWS]))
    u = constants[taps : taps + 1, lanes]
    for k in range(taps):
        u = u + seen[k] * constants[taps - 1 - k : taps - k, lanes]
    return u, seen


def _lane_groups(x: Any) -> list[slice]:
    return [slice(at, at + LANES) for at in range(0, x.shape[-1], LANES)]


def _forward_kernel(silu: bool, packed: bool, taps: int, x: Any, halo: Any, before: Any, constants: Any, *refs: Any) -> None:
    bits, y, extended, by_row = refs if packed else (None, *refs, None)
    tokens = x.shape[1]
    if packed:
        by_row[:tokens] = jnp.broadcast_to(bits[0].T, (tokens, LANES))
    _fill(extended, x, halo, before, pl.program_id(2) == 0)
    for row in range(0, tokens, _ROWS):
        allowed = _allowed(by_row, row, taps)
        for group, lanes in enumerate(_lane_groups(x)):
            u, _ = _before_activation(extended.at[group], constants, lanes, row, allowed)
            out = u * jax.nn.sigmoid(u) if silu else u
            y[0, row : row + _ROWS, lanes] = _where(allowed[0], out).astype(y.dtype)


def _backward_kernel(silu: bool, packed: bool, taps: int, x: Any, halo: Any, before: Any, constants: Any, *refs: Any) -> None:
    bits, d_y, d_x, sums, extended, d_u, by_row = refs if packed else (None, *refs, None)
    tokens, step = x.shape[1], pl.program_id(2)
    kept, spare = slice(0, HALO), slice(tokens, tokens + HALO)

    @pl.when(step == 0)
    def _last_tile():
        sums[...] = jnp.zeros_like(sums)
        d_u[:, kept] = jnp.zeros((d_u.shape[0], HALO, LANES), jnp.float32)
        if packed:
            by_row[kept] = jnp.zeros((HALO, LANES), jnp.int32)

    d_u[:, spare] = d_u[:, kept]
    if packed:
        by_row[spare] = by_row[kept]
        by_row[:tokens] = jnp.broadcast_to(bits[0].T, (tokens, LANES))
    _fill(extended, x, halo, before, step == pl.num_programs(2) - 1)
    for row in range(0, tokens, _ROWS):
        allowed = _allowed(by_row, row, taps)
        for group, lanes in enumerate(_lane_groups(x)):
            u, seen = _before_activation(extended.at[group], constants, lanes, row, allowed)
            grad = d_y[0, row : row + _ROWS, lanes].astype(jnp.float32)
            if silu:
                gate = jax.nn.sigmoid(u)
                grad = grad * gate * (1 + u * (1 - gate))
            grad = _where(allowed[0], grad)
            d_u[group, row : row + _ROWS] = grad
            for n, term in enumerate([*(grad * x for x in reversed(seen)), grad]):
                sums[0, n * HALO : (n + 1) * HALO, lanes] += jnp.sum(term.reshape(-1, HALO, LANES), axis=0)
    for row in range(0, tokens, _ROWS):
        allowed = [_allowed(by_row, row + k, taps)[k] for k in range(taps)]
        for group, lanes in enumerate(_lane_groups(x)):
            out = jnp.zeros((_ROWS, LANES), jnp.float32)
            for k in range(taps):
                later = _where(allowed[k], d_u[group, row + k : row + k + _ROWS])
                out += later * constants[taps - 1 - k : taps - k, lanes]
            d_x[0, row : row + _ROWS, lanes] = out.astype(d_x.dtype)
