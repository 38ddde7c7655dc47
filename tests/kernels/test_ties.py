"""How near the largest logit of a row another must be to get its gradient: as far as a key that the query sees can differ, and no farther."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from plait.kernels import Mask, SelectedBlocks, Tokens, gpu
from plait.kernels.attention import pallas_gpu, pallas_tpu, reference
from plait.kernels.attention.call import AttentionCall
from plait.kernels.attention.ties import longest_keys, ties
from plait.kernels.attention.tpu.tokens import chosen_tokens
from plait.kernels.attention.visits import layout_of
from plait.kernels.target import target
from plait.tests.kernels import cases
from plait.tests.kernels.attention_calls import run_checked
from plait.tests.tolerances import assert_close, assert_tree_close, in_float64


@pytest.mark.parametrize("dim", [16, 64, 256, 576])
def test_ties_are_as_far_apart_as_a_product_of_another_order(dim: int):
    """And not much farther, or keys that are not the largest would get its gradient."""
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((1, 256, 4, dim)).astype(np.float32) for _ in range(2))
    near = np.asarray(ties(0.5, jnp.asarray(q), jnp.linalg.norm(k, axis=-1).max(1, keepdims=True)))
    terms = np.float32(0.5) * q * k
    apart = abs(terms.cumsum(-1)[..., -1] - terms[..., ::-1].cumsum(-1)[..., -1])
    assert (apart < near).all()
    assert near.mean() < 64 * apart.mean()


def test_the_largest_logit_s_gradient_near_a_soft_cap():
    """Where the tangent is near 1 its slope is what rounding leaves, and many a logit is near the largest."""
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.standard_normal((1, 130, n, 16)), jnp.float32) for n in (2, 1))

    def run(implementation: Any, q: jax.Array, k: jax.Array) -> Any:
        def outputs(x: dict[str, jax.Array]) -> dict[str, jax.Array]:
            options: dict[str, Any] = {"mask": Mask(), "logit_soft_cap": 30.0, "return_stats": True}
            return {"max": implementation.attention(AttentionCall.of("attention", v=k, **x, **options))[1].max_logit}

        return cases.with_gradients(outputs, {"q": q, "k": k})

    plain = cases.quick_jit(partial(run, reference))
    got = run_checked(partial(run, pallas_tpu), 96 * q, k)
    assert_tree_close(got, in_float64(plain, 96 * q, k), plain(96 * q, k), dtype="float32")


LAYOUTS = {"one": None, "several": "several", "left": "left", "hidden": "none"}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("keys", ["own", "in order", "a cache"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_longest_key_of_a_query_s_segment(layout: str, keys: str, causal: bool):
    """Exactly that of all it could see; of a cache the entries are shuffled, and some queries' segments have none."""
    rng, length = np.random.default_rng(0), 150
    name = LAYOUTS[layout]
    ids = jnp.zeros((2, length), jnp.int32) if name == "none" else None if name is None else 3 * cases.segments(length, name) % 7
    k = jnp.asarray(rng.standard_normal((2, length, 2, 4)) * rng.lognormal(0, 2, (2, length, 2, 1)), jnp.float32)
    all_of = Tokens(None, ids).placed(2, length)
    at, others = None if ids is None else Tokens(None, ids), {}
    if keys != "own":
        at = jax.tree.map(lambda x: x[:, 90:], all_of)
        order = rng.permutation(length)[:110] if keys == "a cache" else np.arange(length)
        k, kv_at = jax.tree.map(lambda x: x[:, order], (k, all_of))
        others = {"kv_at": kv_at}
    q = jnp.ones((2, length if keys == "own" else 60, 4, 4))
    call = AttentionCall.of("attention", q=q, k=k, v=k, mask=Mask(causal=causal), at=at, **others)
    found = np.asarray(jax.jit(lambda call: longest_keys(layout_of(call), *call.sides, call.k))(call))
    queries, at_keys = call.sides
    shown = call.mask.dense(queries.positions, at_keys.positions, queries.segment_ids, at_keys.segment_ids)
    want = np.where(shown[..., None], np.linalg.norm(k, axis=-1)[:, None], 0).max(2)
    real = np.asarray(queries.segment_ids) != 0
    assert_close(found[real], want[real])
    assert layout == "hidden" or real.sum() > 60


LONG = 1e4
"""Times the length of the others."""

NEWEST = (
    pytest.mark.newest,
    pytest.mark.skipif(jax.__version_info__ < gpu.MIN_JAX, reason="the GPU interpreter needs a newer JAX"),
)
KERNELS = ["tpu", "tpu, chosen tokens", *(pytest.param(name, marks=NEWEST) for name in ("gpu", "gpu, chosen tokens"))]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_long_key_that_a_query_does_not_see_gives_its_gradient_to_no_other_key(kernel: str, monkeypatch: pytest.MonkeyPatch):
    """The gradients of the largest logits are, bit for bit, those beside short keys, where the long ones are in another document and later."""
    monkeypatch.setattr(chosen_tokens, "CHUNK", 32)
    on_gpu, chosen, rng = "gpu" in kernel, "chosen" in kernel, np.random.default_rng(0)
    length, heads = (40, 8) if chosen else (130, 2)
    dim, dtype = (64, "bfloat16") if on_gpu else (16, "float32")
    q, k = (jnp.asarray(rng.standard_normal((1, length, n, dim)), dtype) for n in (heads, 1))
    document = 1 + (jnp.arange(length, dtype=jnp.int32)[None] >= 10)
    options: dict[str, Any] = {"mask": Mask(), "at": Tokens(None, document), "return_stats": True, "value_dim": dim}
    if chosen:
        every = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (1, length, 1, length))
        options["selected"] = SelectedBlocks(indices=every, block_size=1, num_blocks=length)
    attention = (pallas_gpu if on_gpu else pallas_tpu).attention

    @jax.jit
    def gradients(q: jax.Array, k: jax.Array) -> Any:
        largest = lambda q, k: attention(AttentionCall.of("attention", q=q, k=k, **options))[1].max_logit[:, 10:-1].sum()
        return jax.grad(largest, (0, 1))(q, k)

    interpreter = gpu.interpreting() if on_gpu else pltpu.force_tpu_interpret_mode(pltpu.InterpretParams())
    with interpreter, target("h100" if on_gpu else "v5e"):
        want, others, later = (gradients(q, each) for each in (k, k.at[:, 3].multiply(LONG), k.at[:, -1].multiply(LONG)))
    jax.tree.map(np.testing.assert_array_equal, others, want)
    jax.tree.map(np.testing.assert_array_equal, later, want)
    assert all(np.asarray(x).any() for x in want)
