"""Products of rows with their group's matrix, against one product a group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.models.layers.grouped import _BLOCK, _blocks, _ragged
from plait.tests.models.common import quick_jit
from plait.tests.tolerances import assert_tree_close, in_float64

FORMS = {"blocks": _blocks, "ragged": _ragged}
SIZES = {
    "even": (100, 100, 100),
    "all to one": (0, 2 * _BLOCK + 7, 0),
    "empty groups, whole blocks": (0, _BLOCK, 0, 2 * _BLOCK, 1, 0),
    "none": (0, 0),
}
BEHIND = 5  # rows in no group


def by_group(x, w, sizes):
    ends = np.cumsum(sizes)
    parts = [x[end - n : end] @ w[g] for g, (n, end) in enumerate(zip(sizes, ends, strict=True))]
    return jnp.concatenate([*parts, jnp.zeros((x.shape[0] - ends[-1], w.shape[2]), x.dtype)])


def with_gradients(product, x, w, dy):
    y, pull = jax.vjp(product, x, w)
    return y, *pull(dy.astype(y.dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_rows_meet_the_matrix_of_their_group(form, sizes, dtype):
    keys, rows = jax.random.split(jax.random.key(0), 3), sum(sizes) + BEHIND
    shapes = ((rows, 24), (len(sizes), 24, 16), (rows, 16))
    arrays = [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]
    arrays[0] = arrays[0].at[sum(sizes) :].set(jnp.inf)  # rows that nothing may read
    found = quick_jit(lambda *a: with_gradients(lambda x, w: form(x, w, jnp.asarray(sizes, jnp.int32)), *a))(*arrays)
    plain, exact = (run(with_gradients, lambda x, w: by_group(x, w, sizes), *arrays) for run in (direct, widened))
    assert_tree_close(found, exact, plain, dtype=dtype)


def direct(function, product, *arrays):
    return function(product, *arrays)


def widened(function, product, *arrays):
    return in_float64(lambda *a: function(product, *a), *arrays)
