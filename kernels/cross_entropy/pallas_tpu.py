"""Cross entropy for TPU (Mosaic): no logit of the forward pass leaves the chip's vector memory.

The kernel runs over (token tiles, vocabulary tiles, parts of D); the logits of a tile are summed over D and then enter an online
log-sum-exp. Maxima and sums are kept for each of the 128 lanes apart, so that a tile costs elementwise work only:
  m'_l = max(m_l, max_g z_gl),    s_l <- e^(m_l - m'_l) s_l + sum_g e^(z_gl - m'_l)        l a lane, g the groups of 128 columns
and the lanes meet once, after the last tile. The target's logit is picked up on the way. Gradients: `by_vocabulary`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from plait.kernels.costs import cost
from plait.kernels.cross_entropy.by_vocabulary import Kernels, Rows, cross_entropy_of
from plait.kernels.cross_entropy.call import CrossEntropyCall
from plait.kernels.shapes import matmul_precision
from plait.kernels.target import current, not_on

Array = jax.Array

LANES = 128
LOWEST = -1e30
"""In place of minus infinity, so that differences stay finite."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Sizes of a tile; multiples of 128. Small problems get smaller ones."""

    tokens: int = 1024
    """Whose hidden, all D of it, stays in VMEM while weight streams past."""
    vocabulary: int = 512
    width: int = 1024
    """Of the part of D that a step multiplies."""

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if size < LANES or size % LANES:
                raise ValueError(f"tiles.{name}={size} must be a positive multiple of {LANES}; use 128, 256, 512 or 1024")

    def fit(self, num_tokens: int, vocabulary: int, width: int) -> "Tiles":
        """These tiles, none longer than the problem needs; the tiles of D all equally long."""
        steps = pl.cdiv(width, self.width)
        return Tiles(
            tokens=min(self.tokens, _round_up(num_tokens, LANES)),
            vocabulary=min(self.vocabulary, _round_up(vocabulary, LANES)),
            width=_round_up(pl.cdiv(width, steps), LANES),
        )


MAX_WIDTH = 16384
"""A tile of tokens keeps all of their hidden in VMEM."""


def choose_tiles(generation: str, width: int, dtype: Any) -> Tiles:
    """Tiles that compile within 16 MiB of scoped VMEM, the default limit of v5e and v5p; weight is read once a tile of tokens."""
    itemsize = jnp.dtype(dtype).itemsize
    tokens = 1024 if width <= 2048 else 512 if width <= 8192 else 256
    return Tiles(tokens=2 * tokens // itemsize, vocabulary=512, width=2048 // itemsize)


def unsupported(call: CrossEntropyCall) -> str | None:
    """Why this kernel cannot serve a call, or None."""
    if reason := not_on("tpu"):
        return reason
    dtypes = {x.dtype.name for x in (call.hidden, call.weight)}
    if len(dtypes) > 1 or not dtypes <= {"float32", "bfloat16"}:
        return f"hidden and weight are {', '.join(sorted(dtypes))}, not both float32 or both bfloat16"
    if (width := call.hidden.shape[-1]) > MAX_WIDTH:
        return f"D of {width} exceeds {MAX_WIDTH}, of which a tile of tokens fits into VMEM"
    return None


def cross_entropy(call: CrossEntropyCall) -> tuple[Array, Array]:
    """See `plait.kernels.cross_entropy`."""
    return cross_entropy_of(Kernels(_rows), call)


def _rows(hidden: Array, weight: Array, targets: Array, soft_cap: float | None) -> Rows:
    here = current()
    generation = here.generation if here is not None else "v5e"
    tiles = choose_tiles(generation, hidden.shape[1], hidden.dtype)
    return forward(hidden, weight, targets, soft_cap, tiles.fit(hidden.shape[0], weight.shape[1], hidden.shape[1]))


def forward(hidden: Array, weight: Array, targets: Array, soft_cap: float | None, tiles: Tiles) -> Rows:
    """lse and target logit, float32 [N], of hidden [N, D], weight [D, Vocab] and targets int32 [N]."""
    (num_tokens, width), vocabulary = hidden.shape, weight.shape[1]
    steps = pl.cdiv(width, tiles.width)
    padding = steps * tiles.width - width
    if padding:  # what is summed over must not be garbage
        hidden, weight = jnp.pad(hidden, ((0, 0), (0, padding))), jnp.pad(weight, ((0, padding), (0, 0)))
    row = lambda count: pl.BlockSpec((count, tiles.tokens), lambda i, j, k: (0, i))
    state = pltpu.VMEM((tiles.tokens, LANES), jnp.float32)
    shape = jax.ShapeDtypeStruct((2, num_tokens), jnp.float32)
    rows = pl.pallas_call(
        partial(_kernel, vocabulary, steps, soft_cap),
        name="cross_entropy_forward",
        out_shape=shape,
        grid=(pl.cdiv(num_tokens, tiles.tokens), pl.cdiv(vocabulary, tiles.vocabulary), steps),
        in_specs=[
            row(1),
            pl.BlockSpec((tiles.tokens, steps * tiles.width), lambda i, j, k: (i, 0), pipeline_mode=pl.Buffered(1)),
            pl.BlockSpec((tiles.width, tiles.vocabulary), lambda i, j, k: (k, j)),
        ],
        out_specs=row(2),
        scratch_shapes=[
            pltpu.VMEM((tiles.tokens, tiles.vocabulary), jnp.float32),
            pltpu.VMEM((tiles.tokens, LANES), jnp.int32),
            *[state] * 3,
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=cost(
            (targets, hidden, weight, shape),
            flops=2 * num_tokens * hidden.shape[1] * vocabulary,
            transcendentals=num_tokens * vocabulary,
        ),
    )(targets[None, :], hidden, weight)
    return Rows(rows[0], rows[1])


def _kernel(vocabulary: int, steps: int, soft_cap: float | None, *refs: Any) -> None:
    targets, hidden, weight, rows, logits, target, peak, total, hit = refs
    j, k = pl.program_id(1), pl.program_id(2)
    num_groups = logits.shape[1] // LANES
    first_column = j * logits.shape[1]

    @pl.when((j == 0) & (k == 0))
    def _start():
        target[...] = jnp.broadcast_to(targets[...].T, target.shape)
        peak[...] = jnp.full_like(peak, LOWEST)
        total[...] = jnp.zeros_like(total)
        hit[...] = jnp.zeros_like(hit)

    def product() -> Array:
        here = pl.ds(pl.multiple_of(k * weight.shape[0], LANES), weight.shape[0]) if steps > 1 else slice(None)
        precision = matmul_precision(hidden.dtype)
        return jnp.dot(hidden[:, here], weight[...], precision=precision, preferred_element_type=jnp.float32)

    @pl.when((k == 0) & (steps > 1))
    def _first():
        logits[...] = product()

    @pl.when((k > 0) & (k < steps - 1))
    def _further():
        logits[...] += product()

    @pl.when(k == steps - 1)
    def _reduce():
        if steps > 1:
            logits[...] += product()
        else:
            logits[...] = product()
        lane = jax.lax.broadcasted_iota(jnp.int32, target.shape, 1)
        wanted = target[...] - first_column - lane  # 128 g where group g holds the target in this lane

        def group(g: int) -> Array:
            z = logits[:, g * LANES : (g + 1) * LANES]
            z = z if soft_cap is None else soft_cap * jnp.tanh(z / soft_cap)
            return jnp.where(lane < vocabulary - first_column - g * LANES, z, LOWEST) if vocabulary % logits.shape[1] else z

        groups = [group(g) for g in range(num_groups)]
        old = peak[...]
        new = old
        for z in groups:
            new = jnp.maximum(new, z)
        mass, found = jnp.exp(old - new) * total[...], hit[...]
        for g, z in enumerate(groups):
            mass += jnp.exp(z - new)
            found += jnp.where(wanted == g * LANES, z, 0)
        peak[...], total[...], hit[...] = new, mass, found

    @pl.when((j == pl.num_programs(1) - 1) & (k == steps - 1))
    def _finish():
        highest = jnp.max(peak[...], axis=1, keepdims=True)
        mass = jnp.sum(total[...] * jnp.exp(peak[...] - highest), axis=1, keepdims=True)
        rows[0:1] = (highest + jnp.log(mass)).T
        rows[1:2] = jnp.sum(hit[...], axis=1, keepdims=True).T


def _round_up(n: int, multiple: int) -> int:
    return pl.cdiv(n, multiple) * multiple
