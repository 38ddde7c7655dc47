"""Attention by a rule: blocks give what all rows at once give, in memory that grows with T; and the calls that are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels import Mask, Tokens, weighted_attention, weighted_rows
from plait.kernels.weighted_attention import Rule, chunked, dot_products, softmax
from plait.tests.kernels.cases import quick_jit
from plait.tests.tolerances import assert_close, assert_tree_close, in_float64


@dataclasses.dataclass(frozen=True)
class Before(Rule):
    """Softmax of the logits, less those of the query `halo` tokens before; a learned factor."""

    halo: int = 0

    def __call__(self, q, k, parameters, seen):
        z = parameters["factor"] * jnp.where(seen.visible, dot_products(q, k, seen), 0)
        rows = q.shape[1] - self.halo
        z = z[:, :, self.halo :] - (z[:, :, :rows] if self.halo else 0)
        return softmax(z, seen.visible[:, :, self.halo :])


def inputs(length: int, dtype: str = "float32") -> dict[str, jax.Array]:
    rng = np.random.default_rng(length)
    shapes = {"q": (2, length, 4, 8), "k": (2, length, 2, 8), "v": (2, length, 2, 6)}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()} | {"factor": jnp.asarray(0.7)}


def packed(length: int) -> Tokens:
    ids = np.repeat([[3, 1, 0, 2]], 2, 0).repeat([length // 3, length // 3, 5, length - 2 * (length // 3) - 5], 1)
    ids[1] = 1
    return Tokens(None, jnp.asarray(ids, jnp.int32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("halo", "causal"), [(0, True), (0, False), (3, True)])
def test_blocks_give_the_reference_outputs_and_gradients(monkeypatch, halo, causal, dtype):
    length = 150
    for name, size in (("DENSE_TILE", 0), ("BLOCK_SIZE", 16)):
        monkeypatch.setattr(chunked, name, size)
    arrays, at = inputs(length, dtype), packed(length)

    def both(implementation):
        def outputs(arrays):
            options = {"rule": Before(halo), "parameters": {"factor": arrays["factor"]}, "mask": Mask(causal=causal), "at": at}
            return weighted_attention(arrays["q"], arrays["k"], arrays["v"], implementation=implementation, **options)

        def run(arrays):
            o, pull = jax.vjp(outputs, arrays)
            return o, *pull(jnp.cos(jnp.arange(o.size, dtype=o.dtype)).reshape(o.shape))

        return run

    plain, got = (quick_jit(both(name)) for name in ("reference", "chunked"))
    assert_tree_close(got(arrays), in_float64(both("reference"), arrays), plain(arrays), dtype=dtype)


@pytest.mark.parametrize("halo", [0, 3])
def test_rows_are_those_of_the_whole_and_later_tokens_need_the_halo_only(halo):
    length, arrays = 20, inputs(20)
    options = {"rule": Before(halo), "parameters": {"factor": arrays["factor"]}, "mask": Mask()}
    whole = weighted_attention(arrays["q"], arrays["k"], arrays["v"], **options)
    rows = jnp.array([0, 7, 19])
    a = weighted_rows(arrays["q"], arrays["k"], rows, **options)
    values = jnp.repeat(arrays["v"], 2, axis=2)
    assert_close(jnp.einsum("bhrs,bshv->brhv", a, values), whole[:, rows])
    at, kv_at = Tokens(None, None, jnp.full((2, 1), 19)), Tokens(None, jnp.ones((2, length), jnp.int32))
    before = (
        arrays["q"][:, 19 - halo : 19],
        Tokens(None, jnp.ones((2, halo), jnp.int32), jnp.arange(19 - halo, 19)[None].repeat(2, 0)),
    )
    last = weighted_attention(arrays["q"][:, 19:], arrays["k"], arrays["v"], at=at, kv_at=kv_at, before=before, **options)
    assert_close(last, whole[:, 19:])


def test_queries_that_see_nothing_give_zeros_and_finite_gradients():
    arrays = inputs(6)
    at = Tokens(None, jnp.zeros((2, 6), jnp.int32))
    run = lambda q: weighted_attention(
        q, arrays["k"], arrays["v"], rule=Before(), parameters={"factor": 1.0}, mask=Mask(), at=at
    ).sum()
    assert run(arrays["q"]) == 0
    np.testing.assert_array_equal(jax.grad(run)(arrays["q"]), 0)


def test_memory_grows_with_the_length():
    def temporary(length: int) -> int:
        q = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
        loss = lambda q, k, v: weighted_attention(q, k, v, rule=Before(2), parameters={"factor": 1.0}, mask=Mask()).sum()
        return quick_jit(jax.grad(loss, (0, 1, 2))).lower(q, q, q).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary(8192), temporary(16_384)
    assert large < 2.2 * small
    assert large < 4 * 16_384**2 / 8  # an eighth of one T x T array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": jnp.zeros((2, 20, 3, 8))}, "number of k and v heads=3 must divide"),
        ({"v": jnp.zeros((2, 19, 2, 6))}, "v.shape=.* must be"),
        ({"k": jnp.zeros((2, 9, 2, 8)), "v": jnp.zeros((2, 9, 2, 6))}, "k has S=9 tokens and q has T=20; say with kv_at"),
        ({"q": jnp.zeros((2, 20, 4, 8), jnp.int32)}, "q.dtype=int32 must be a floating-point type"),
        ({"implementation": "pallas"}, "implementation='pallas' is unknown"),
        ({"before": (jnp.zeros((2, 1, 4, 8)), Tokens(None, *jnp.zeros((2, 2, 1), jnp.int32)))}, r"before\[0\].shape"),
    ],
)
def test_bad_calls_are_refused(change, message):
    arrays = inputs(20)
    call = {
        "q": arrays["q"],
        "k": arrays["k"],
        "v": arrays["v"],
        "rule": Before(3),
        "parameters": {"factor": 1.0},
        "mask": Mask(),
    }
    with pytest.raises(ValueError, match=message):
        weighted_attention(**(call | change))
