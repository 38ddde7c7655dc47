"""The GPU attention kernel in Pallas' GPU interpreter, with race detection, against the reference."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels import Mask, gpu
from plait.kernels.attention import pallas_gpu, reference
from plait.kernels.masks import BlockTable
from plait.kernels.target import target
from plait.tests.kernels import cases
from plait.tests.tolerances import assert_tree_close, in_float64


class Case(NamedTuple):
    """One call: sizes, a layout of segments and options."""

    mask: Mask = Mask()
    length: int = 200
    heads: tuple[int, int] = (1, 1)
    dims: tuple[int, int] = (16, 16)
    dtype: str = "bfloat16"
    segments: str | None = None
    sinks: bool = False
    sigmoid: bool = False
    stats: bool = True
    table: tuple[int, int] | None = None


SINKS = Mask(window_size=9, num_sink_tokens=3)
CASES = {
    "causal": Case(heads=(2, 1)),
    "65-without-statistics": Case(length=65, dims=(32, 16), sinks=True, stats=False),
    "full-sigmoid": Case(mask=Mask(causal=False), sigmoid=True, length=130, heads=(2, 2)),
    "sigmoid-without-statistics": Case(sigmoid=True, length=63, stats=False, dims=(96, 64)),
    "window-float16": Case(mask=Mask(window_size=40), length=256, dtype="float16"),
    "window-sinks-segments": Case(mask=SINKS, segments="several", sinks=True, length=140),
    "segments": Case(segments="several", length=130, dims=(192, 128)),
    "hidden": Case(segments="none", length=65, sinks=True),
    "table": Case(heads=(2, 1), table=(64, 32), length=192),
}

needs_interpreter = pytest.mark.skipif(
    jax.__version_info__ < gpu.MIN_JAX, reason=f"the GPU interpreter needs JAX >= {'.'.join(map(str, gpu.MIN_JAX))}"
)


def _inputs(case: Case) -> dict[str, jax.Array]:
    rng = np.random.default_rng(case.length)
    (num_heads, num_kv_heads), (key_dim, value_dim) = case.heads, case.dims
    batch = 1 if case.segments is None else cases.BATCH
    shapes = {"q": (num_heads, key_dim), "k": (num_kv_heads, key_dim), "v": (num_kv_heads, value_dim)}
    inputs = {name: jnp.asarray(rng.standard_normal((batch, case.length, *s)), case.dtype) for name, s in shapes.items()}
    if case.sinks:
        inputs["sinks"] = jnp.asarray(rng.standard_normal(num_heads), jnp.float32)
    if case.sigmoid:
        inputs["sigmoid_bias"] = jnp.asarray(rng.standard_normal(num_heads) - 3, jnp.float32)
    return inputs


def _segments(case: Case) -> jax.Array | None:
    if case.segments in (None, "none"):
        return None if case.segments is None else jnp.zeros((cases.BATCH, case.length), jnp.int32)
    return cases.segments(case.length, case.segments)


def _table(case: Case) -> BlockTable | None:
    if case.table is None:
        return None
    rng, (block_q, block_kv) = np.random.default_rng(1), case.table
    shape = (1, case.heads[0], -(-case.length // block_q), -(-case.length // block_kv))
    return BlockTable(visible=jnp.asarray(rng.random(shape) < 0.5), block_q=block_q, block_kv=block_kv)


def _run(implementation: Any, case: Case, inputs: dict[str, jax.Array], tokens: dict[str, jax.Array | None]) -> Any:
    """Outputs and all gradients; the tokens are all four of the op's arguments."""

    def outputs(inputs: dict[str, jax.Array]) -> Any:
        options = {"sinks": None, "sigmoid_bias": None, "scale": case.dims[0] ** -0.5, "return_stats": case.stats} | inputs
        normalizer = "sigmoid" if case.sigmoid else "softmax"
        q, k, v = (options.pop(name) for name in "qkv")
        o, stats = implementation.attention(
            q, k, v, mask=case.mask, normalizer=normalizer, block_table=_table(case), **options, **tokens
        )
        return {"o": o, **{f: jnp.where(x > -1e29, x, 0) for f, x in (stats._asdict() if stats else {}).items()}}

    return cases.with_gradients(outputs, inputs)


def _assert_matches(case: Case, inputs: dict[str, jax.Array], tokens: dict[str, jax.Array | None]) -> Any:
    plain = cases.quick_jit(partial(_run, reference, case))
    with gpu.interpreting(), target("h100"):
        got = jax.block_until_ready(cases.quick_jit(partial(_run, pallas_gpu, case))(inputs, tokens))
    assert got["value"]["o"].dtype == case.dtype
    assert_tree_close(got, in_float64(plain, inputs, tokens), plain(inputs, tokens), dtype=case.dtype)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
    return got


def _own(segment_ids: jax.Array | None) -> dict[str, jax.Array | None]:
    return {"segment_ids": segment_ids, "positions": None, "kv_segment_ids": None, "kv_positions": None}


@needs_interpreter
@pytest.mark.parametrize("name", CASES)
def test_kernel_matches_reference(name: str):
    case = CASES[name]
    got = _assert_matches(case, _inputs(case), _own(_segments(case)))
    if name == "hidden":
        assert not any(np.asarray(x).any() for key, x in got["value"].items() if key != "lse")


@needs_interpreter
def test_kernel_matches_reference_with_shuffled_keys():
    case = Case(mask=Mask(window_size=90, num_sink_tokens=2), length=64)
    inputs, rng = _inputs(case), np.random.default_rng(0)
    longer = {name: jnp.asarray(rng.standard_normal((1, 200, *x.shape[2:])), case.dtype) for name, x in inputs.items()}
    positions = jnp.asarray(rng.permutation(200)[None], jnp.int32)
    tokens = _own(None) | {
        "positions": 130 + jnp.arange(64)[None, :],
        "kv_positions": positions,
        "kv_segment_ids": (positions < 190).astype(jnp.int32),
    }
    _assert_matches(case, inputs | {"k": longer["k"], "v": longer["v"]}, tokens)
