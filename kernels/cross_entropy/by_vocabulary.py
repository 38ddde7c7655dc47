"""What the accelerator kernels of cross entropy share: flat tokens in front, and a backward pass by slices of the vocabulary.

A kernel gives lse and the target's logit of each token. With a = dnll + dlse and b = dnll, for one slice of the vocabulary
  dz = softmax(z) a - onehot(target) b          times 1 - (z / c)^2 with a cap
is made from recomputed logits, and dweight = hidden^T dz of the slice is final at once, while dhidden = dz weight^T is summed over
slices in float32. Slices of tokens would read and write all of dweight once a slice instead. The compiler's own matrix products
serve well here; where it does not fuse dz with the first of the three, which is elementwise behind it, a kernel does.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from plait.kernels.cross_entropy.call import CrossEntropyCall
from plait.kernels.shapes import accumulation_dtype, matmul_precision

Array = jax.Array

MAX_BYTES = 1 << 28
"""Memory that the logit gradients of one slice take at most, in the dtype of hidden."""

SLICE_MULTIPLE = 512


class Rows(NamedTuple):
    """What a kernel gives for each token, float32 [N]."""

    lse: Array
    target: Array
    """The target's logit, capped."""


class Slope(NamedTuple):
    """What dz of a slice of the vocabulary is made of, each [N]: dz = exp(z - lse) a + onehot(target) b, times 1 - (z / c)^2."""

    lse: Array
    """float32, infinite for masked tokens."""
    a: Array
    b: Array
    target: Array
    """int32, counted from the slice's first column; outside of it where the target is."""


class Kernels(NamedTuple):
    """An accelerator's part; functions, so that it can be a static argument."""

    rows: Callable[[Array, Array, Array, float | None], Rows]
    """(hidden [N, D], weight [D, Vocab], targets int32 [N], soft cap) to `Rows`."""
    slopes: Callable[[Array, Array, Slope, float | None], Array] | None = None
    """(hidden, a slice of weight [D, V], its `Slope`, soft cap) to dz [N, V] in hidden's dtype; None leaves it to the compiler."""


def cross_entropy_of(kernels: Kernels, call: CrossEntropyCall) -> tuple[Array, Array]:
    """`plait.kernels.cross_entropy` by the kernels of an accelerator.

    With `chunk_size`, a slice holds as many logit gradients as that many tokens of each sequence have.
    """
    hidden, weight, loss_mask, chunk_size = call.hidden, call.weight, call.loss_mask, call.chunk_size
    batch, length, width = hidden.shape
    vocabulary = weight.shape[1]
    most = MAX_BYTES // hidden.dtype.itemsize if chunk_size is None else batch * chunk_size * vocabulary
    columns = slice_size(vocabulary, most // (batch * length))
    flat = lambda x: x.reshape(batch * length)
    targets = jnp.where(loss_mask, call.targets, 0).astype(jnp.int32)
    rows = _rows(kernels, call.logit_soft_cap, columns, hidden.reshape(-1, width), weight, flat(targets), flat(loss_mask))
    lse, target = (x.reshape(batch, length) for x in rows)
    return jnp.where(loss_mask, lse - target, 0), jnp.where(loss_mask, lse, 0)


def slice_size(vocabulary: int, most: int) -> int:
    """Columns of a slice: about equally many in each, a multiple of 512 unless one slice is enough."""
    slices = -(-vocabulary // max(most, 1))
    return min(vocabulary, -(-vocabulary // (slices * SLICE_MULTIPLE)) * SLICE_MULTIPLE)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _rows(
    kernels: Kernels, soft_cap: float | None, columns: int, hidden: Array, weight: Array, targets: Array, mask: Array
) -> Rows:
    return kernels.rows(hidden, weight, targets, soft_cap)


def _forward(kernels: Kernels, soft_cap: float | None, columns: int, *operands: Array) -> tuple[Rows, Any]:
    rows = _rows(kernels, soft_cap, columns, *operands)
    return rows, (*operands, rows.lse)


def _backward(kernels: Kernels, soft_cap: float | None, columns: int, saved: Any, cotangents: Rows) -> Any:
    hidden, weight, targets, mask, lse = saved
    lse = jnp.where(mask, lse, jnp.inf)  # a softmax of zeros, whatever the logits are
    d_lse, d_target = (jnp.where(mask, x, 0) for x in cotangents)
    dot = partial(jnp.einsum, precision=matmul_precision(hidden.dtype), preferred_element_type=accumulation_dtype(hidden))

    slopes = kernels.slopes or _slopes

    def gradients(start: Any, weight: Array) -> tuple[Array, Array]:
        """Of hidden, [N, D], and of a slice of weight, from column `start` on."""
        slope = Slope(lse, d_lse, d_target, targets - start)
        d_z = slopes(hidden, weight, slope, soft_cap)
        return dot("nv,dv->nd", d_z, weight), dot("nd,nv->dv", hidden, d_z).astype(weight.dtype)

    def visit(done: tuple[Array, Array], start: Any, columns: int) -> tuple[Array, Array]:
        own = jax.lax.dynamic_slice_in_dim(weight, start, columns, axis=1)
        more, own = gradients(start, jax.lax.optimization_barrier(own))  # sliced once; inside the products it slows them down
        return done[0] + more, jax.lax.dynamic_update_slice_in_dim(done[1], own, start, axis=1)

    whole, rest = divmod(weight.shape[1], columns)
    if whole == 1 and not rest:
        done = gradients(0, weight)
    else:
        done = jnp.zeros(hidden.shape, accumulation_dtype(hidden)), jnp.zeros(weight.shape, weight.dtype)
        done, _ = jax.lax.scan(lambda done, start: (visit(done, start, columns), None), done, jnp.arange(whole) * columns)
        done = visit(done, whole * columns, rest) if rest else done
    d_hidden, d_weight = done
    return d_hidden.astype(hidden.dtype), d_weight, None, None


def _slopes(hidden: Array, weight: Array, slope: Slope, soft_cap: float | None) -> Array:
    """`Kernels.slopes` written out: elementwise behind one product."""
    precision, dtype = matmul_precision(hidden.dtype), accumulation_dtype(hidden)
    z = jnp.einsum("nd,dv->nv", hidden, weight, precision=precision, preferred_element_type=dtype)
    z = z if soft_cap is None else soft_cap * jnp.tanh(z / soft_cap)
    lse, a, b, target = (x[:, None] for x in slope)
    d_z = jnp.exp(z - lse) * a + jnp.where(target == jnp.arange(weight.shape[1])[None, :], b, 0)
    d_z = d_z if soft_cap is None else d_z * (1 - jnp.square(z / soft_cap))
    return d_z.astype(hidden.dtype)


_rows.defvjp(_forward, _backward)
