"""Calls of attention for the tests of its kernels: their inputs, and how a TPU kernel in the interpreter, with race detection, compares."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from plait.kernels import LowRankBias, Mask, Tokens, attention, column_mass
from plait.kernels.attention import pallas_tpu, reference
from plait.kernels.attention.call import AttentionCall
from plait.kernels.attention.tpu import tiling
from plait.kernels.target import target
from plait.tests.kernels import cases
from plait.tests.tolerances import assert_close, assert_tree_close, in_float64

CHOSEN = pallas_tpu.choose_tiles
TILES = ("forward", "gradients")


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles even in sequences of 200."""
    monkeypatch.setattr(
        pallas_tpu, "choose_tiles", lambda *_: tiling.Tiles(**dict.fromkeys(TILES, tiling.Tile(128, 128, 128, 128)))
    )
    monkeypatch.setattr(pallas_tpu, "SELECTED", dict.fromkeys((2, 4), (512, 1 << 15)))


class Case(NamedTuple):
    """One call: sizes, a layout of segments and options."""

    mask: Mask = Mask()
    length: int = 200
    heads: tuple[int, int] = (2, 1)
    dims: tuple[int, int] = (16, 16)
    dtype: str = "float32"
    segments: str | None = None
    sinks: bool = False
    sigmoid: bool = False
    stats: bool = True
    soft_cap: float | None = None
    bias: bool = False
    low: bool = False
    """The keys' weights are tiny; outputs, which then are nothing, are left out."""


def run_checked(function: Callable[..., Any], *args: Any, chip: str = "v5e", **how: Any) -> Any:
    """Runs under the TPU interpreter, with parameters of it; raises on a data race in every supported JAX."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, **how)), target(chip):
        out = jax.block_until_ready(jax.jit(function)(*args))
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as state  # before JAX 0.12 a race only sets this flag

    if getattr(getattr(state, "races", None), "races_found", False):
        raise RuntimeError("data race in kernel")
    return out


def inputs_of(case: Case) -> dict[str, Any]:
    rng = np.random.default_rng(case.length)
    (num_heads, num_kv_heads), (key_dim, value_dim) = case.heads, case.dims
    batch = 1 if case.segments is None else cases.BATCH
    shapes = {"q": (num_heads, key_dim), "k": (num_kv_heads, key_dim), "v": (num_kv_heads, value_dim)}
    inputs = {name: jnp.asarray(rng.standard_normal((batch, case.length, *s)), case.dtype) for name, s in shapes.items()}
    if case.sinks:
        inputs["sinks"] = jnp.asarray(rng.standard_normal(num_heads) + (60 if case.low else 0), jnp.float32)
    if case.bias:
        sides = (jnp.asarray(rng.standard_normal((1, case.length, n, 3)), case.dtype) for n in case.heads)
        inputs["bias"] = LowRankBias(*sides)
    if case.sigmoid:
        inputs["sigmoid_bias"] = jnp.asarray(rng.standard_normal(num_heads) - (150 if case.low else 3), jnp.float32)
    return inputs


def segments_of(case: Case) -> jax.Array | None:
    if case.segments in (None, "none"):
        return None if case.segments is None else jnp.zeros((cases.BATCH, case.length), jnp.int32)
    return cases.segments(case.length, case.segments)


def _run(implementation: Any, case: Case, inputs: dict[str, jax.Array], tokens: dict[str, Any]) -> Any:
    """Outputs and all gradients; `tokens` are further options."""

    def outputs(inputs: dict[str, jax.Array]) -> Any:
        normalizer = "sigmoid" if case.sigmoid else "softmax"
        options = inputs | tokens | {"logit_soft_cap": case.soft_cap, "return_lse": not (case.stats or case.sigmoid)}
        call = AttentionCall.of("attention", mask=case.mask, normalizer=normalizer, return_stats=case.stats, **options)
        o, stats = implementation.attention(call)
        found = {f: jnp.where(x > -1e29, x, 0) for f, x in (stats._asdict() if stats else {}).items() if x is not None}
        return found if case.low else {"o": o, **found}

    return cases.with_gradients(outputs, inputs)


def assert_matches(case: Case, inputs: dict[str, jax.Array], tokens: dict[str, Any], **how: Any) -> Any:
    plain = cases.quick_jit(partial(_run, reference, case))
    got = run_checked(partial(_run, pallas_tpu, case), inputs, tokens, **how)
    assert case.low or got["value"]["o"].dtype == case.dtype
    assert_tree_close(got, in_float64(plain, inputs, tokens), plain(inputs, tokens), dtype=case.dtype)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
    return got


def own(segment_ids: jax.Array | None) -> dict[str, Any]:
    return {"at": Tokens(None, segment_ids)}


def assert_mass_matches(case: Case, soft_cap: float | None, **more: Any) -> None:
    inputs = inputs_of(case)
    options = {"mask": case.mask, "at": Tokens(None, segments_of(case)), "logit_soft_cap": soft_cap, **more}
    q, k, v = (inputs[name] for name in "qkv")
    _, stats = cases.quick_jit(partial(attention, return_stats=True, implementation="reference", **options))(q, k, v)
    plain = cases.quick_jit(partial(column_mass, implementation="reference", **options))
    got = run_checked(partial(column_mass, implementation="pallas_tpu", **options), q, k, stats.lse)
    assert_close(got, in_float64(plain, q, k, stats.lse), plain=plain(q, k, stats.lse))
