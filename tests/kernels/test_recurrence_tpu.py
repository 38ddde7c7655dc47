"""The TPU kernels of the linear recurrences in Pallas' TPU interpreter, with race detection, against the reference."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from plait.kernels import Tokens, recurrence
from plait.kernels.recurrence import RecurrenceCall, tpu_driver
from plait.kernels.recurrence.tpu_driver import choose_tiles
from plait.kernels.recurrence.tpu_grid import Tiles, heads_a_step
from plait.kernels.shapes import l2_normalize
from plait.kernels.target import target
from plait.tests.kernels import cases
from plait.tests.suites import usually
from plait.tests.tolerances import assert_close, assert_tree_close, in_float64


class Case(NamedTuple):
    """One call: the recurrence, sizes, a layout of segments and the decay."""

    name: str
    length: int = 65
    segments: str | None = None
    decay: str = "mixed"
    dtype: str = "float32"
    heads: tuple[int, int] = (1, 2)
    dims: tuple[int, int] = (8, 4)
    batch: int = 1
    tiles: Tiles = Tiles(chunk_size=32, forward_chunks=2, backward_chunks=1)
    stats: bool = True
    l2_norm: bool = False
    """Queries and keys of other norms are normalised by the op."""


LARGE = Tiles(forward_chunks=2, backward_chunks=2)
FLOAT32 = choose_tiles("v5e", 8, 4, True, False, delta=True)
"""Chunks of 64: longer ones are never taken with float32, where roundings of the inverse of 128 tokens show: with beta up to 2 in 8
channels 10 times the reference's error, of 64 tokens 4."""
SEVERAL = Tiles(chunk_size=32, forward_chunks=2, backward_chunks=1, forward_heads=4, backward_heads=4)
CASES = [
    Case("scalar_decay", 63, None, "mixed"),
    Case("scalar_decay", 65, "several", "strong", dtype="bfloat16", batch=2),
    Case("vector_decay", 65, "several", "mixed", batch=2),
    Case("vector_decay", 64, None, "weak", dtype="bfloat16", heads=(2, 2), dims=(128, 8)),
    Case("deltanet", 300, None, "none", dtype="bfloat16", heads=(1, 1), tiles=LARGE),
    Case("gated_deltanet", 65, "several", "mixed", batch=2),
    Case("kda", 65, "several", "mixed", batch=2),
    Case("gated_deltanet", 65, "several", "mixed", heads=(2, 4), tiles=SEVERAL, l2_norm=True),
]
MORE = [
    Case("deltanet", 65, None, "none", dtype="bfloat16", heads=(4, 4), dims=(128, 8), tiles=SEVERAL),
    Case("kda", 65, "several", "mixed", heads=(1, 8), tiles=SEVERAL),
    Case("gated_deltanet", 65, "several", "mixed", heads=(2, 4), tiles=SEVERAL),
    Case("gated_deltanet", 130, "left", "weak", dtype="bfloat16", heads=(1, 3), dims=(128, 64), batch=2, l2_norm=True),
    Case("kda", 130, "several", "mixed", heads=(1, 2), dims=(64, 32), l2_norm=True),
    Case("deltanet", 65, None, "none", heads=(2, 2), l2_norm=True, stats=False),
    Case("scalar_decay", 64, "several", "strong", batch=2),
    Case("scalar_decay", 65, "long", "weak", dtype="bfloat16"),
    Case("scalar_decay", 500, "several", "mixed", heads=(2, 2), dims=(16, 128), tiles=LARGE),
    Case("vector_decay", 63, "several", "mixed", batch=2),
    Case("vector_decay", 65, None, "strong", dtype="bfloat16"),
    Case("vector_decay", 64, "one", "weak", heads=(2, 2), dims=(128, 8)),
    Case("vector_decay", 500, "several", "mixed", heads=(1, 1), tiles=LARGE),
    Case("deltanet", 64, "several", "none", batch=2),
    Case("gated_deltanet", 500, "long", "weak", heads=(1, 1), tiles=FLOAT32),
    Case("gated_deltanet", 63, None, "strong", dtype="bfloat16", heads=(1, 3)),
    Case("kda", 130, None, "weak", dtype="bfloat16"),
    Case("kda", 300, "several", "mixed", heads=(1, 1), dims=(128, 64), tiles=FLOAT32),
]
LONG = [
    Case(name, 2048, "several", "mixed", dtype=dtype, tiles=choose_tiles("v5e", 8, 4, dtype == "float32", False))
    for name in cases.WITH_KERNELS
    for dtype in ("float32", "bfloat16")
]


def run_checked(function: Callable[..., Any], *args: Any) -> Any:
    """Runs under the TPU interpreter; raises on a data race in every supported JAX."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)), target("v5e"):
        out = jax.block_until_ready(cases.quick_jit(function)(*args))
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as state  # before JAX 0.12 a race only sets this flag

    if getattr(getattr(state, "races", None), "races_found", False):
        raise RuntimeError("data race in kernel")
    return out


def _inputs(case: Case, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    sizes = {"BATCH": case.batch, "NUM_QK_HEADS": case.heads[0], "NUM_HEADS": case.heads[1]}
    for name, size in (sizes | {"KEY_DIM": case.dims[0], "VALUE_DIM": case.dims[1]}).items():
        monkeypatch.setattr(cases, name, size)
    monkeypatch.setattr(tpu_driver, "choose_tiles", lambda *_: case.tiles)
    inputs = cases.RECURRENCES[case.name].inputs(case.length, decay=case.decay, dtype=case.dtype)
    if case.l2_norm:
        inputs |= {"q": 3 * inputs["q"], "k": inputs["k"] / 4}
    return inputs, cases.state(), None if case.segments is None else cases.segments(case.length, case.segments)


def _run(implementation: str, case: Case, inputs: dict[str, jax.Array], state: jax.Array, ids: jax.Array | None) -> Any:
    """Values, statistics and all gradients."""

    options = {"l2_norm_eps": 1e-6} if case.l2_norm else {}

    def outputs(inputs: dict[str, jax.Array], state: jax.Array) -> Any:
        o, final_state, *stats = cases.RECURRENCES[case.name].call(
            inputs, initial_state=state, at=Tokens(None, ids), implementation=implementation, return_stats=case.stats, **options
        )
        return {"o": o, "final_state": final_state, **(stats[0]._asdict() if stats else {})}

    return cases.with_gradients(outputs, inputs, state)


def _assert_matches(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    args = _inputs(case, monkeypatch)
    plain = cases.quick_jit(partial(_run, "reference", case))
    got = run_checked(partial(_run, "pallas_tpu", case), *args)
    assert got["value"]["o"].dtype == case.dtype
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
    assert_tree_close(got, in_float64(plain, *args), plain(*args), dtype=case.dtype)
    if case.segments is not None:
        assert not np.asarray(got["value"]["o"])[np.asarray(args[2]) == 0].any()


_name = lambda c: f"{c.name}-{c.length}-{c.segments}-{c.decay}-{c.dtype}{'-l2_norm' * c.l2_norm}"


@pytest.mark.parametrize("case", usually(CASES, *CASES, newest=(CASES[1], CASES[2], CASES[6], CASES[7])), ids=_name)
def test_kernel_matches_reference(case: Case, monkeypatch: pytest.MonkeyPatch):
    _assert_matches(case, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE + LONG, ids=_name)
def test_kernel_matches_reference_in_more_cases(case: Case, monkeypatch: pytest.MonkeyPatch):
    _assert_matches(case, monkeypatch)


@pytest.mark.parametrize("name", ["gated_deltanet", pytest.param("kda", marks=pytest.mark.slow)])
def test_heads_of_a_step_do_not_touch_each_other(name: str, monkeypatch: pytest.MonkeyPatch):
    case = Case(name, 65, "several", heads=(4, 4), tiles=SEVERAL)
    args = _inputs(case, monkeypatch)
    several = run_checked(partial(_run, "pallas_tpu", case), *args)
    monkeypatch.setattr(tpu_driver, "choose_tiles", lambda *_: replace(SEVERAL, forward_heads=1, backward_heads=1))
    one = run_checked(partial(_run, "pallas_tpu", case), *args)
    jax.tree.map(np.testing.assert_array_equal, several, one)


def test_heads_a_step_are_chosen_by_heads():
    chosen = lambda *heads, delta=True: choose_tiles("v5e", 128, 128, False, False, delta, 1, heads)
    assert [chosen(*heads).forward_heads for heads in ((1, 1), (2, 2), (3, 3), (4, 4), (6, 6), (16, 16))] == [1, 2, 1, 4, 2, 4]
    assert [chosen(*heads).forward_heads for heads in ((1, 4), (2, 4), (2, 6), (4, 32), (1, 3))] == [4, 4, 1, 4, 1]
    assert chosen(4, 4, delta=False).forward_heads == 1
    on_two_cores = lambda batch, *heads: choose_tiles("v5p", 128, 128, False, False, True, batch, heads).forward_heads
    assert [on_two_cores(1, 4, 4), on_two_cores(2, 4, 4), on_two_cores(1, 8, 8), on_two_cores(1, 2, 2)] == [2, 4, 4, 1]
    assert [heads_a_step(*heads, 4) for heads in ((4, 4), (2, 4), (1, 8), (6, 12), (2, 6))] == [
        (4, 1),
        (2, 2),
        (1, 4),
        (2, 2),
        (1, 3),
    ]


def test_wide_values_are_cut_into_heads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recurrence, "MAX_VALUE_DIM", 8)
    _assert_matches(Case("scalar_decay", 33, "several", dims=(8, 16), stats=False), monkeypatch)


def test_unsupported_says_why():
    def reason(q: Any, v: Any) -> str | None:
        return tpu_driver.unsupported(RecurrenceCall.of("decay", q=q, k=q, v=v, g=g, at=None, scale=None))

    shape = lambda length=64, heads=2, dim=64, dtype=jnp.float32: jax.ShapeDtypeStruct((1, length, heads, dim), dtype)
    g = jax.ShapeDtypeStruct((1, 64, 2), jnp.float32)
    assert "the backend is cpu" in reason(shape(), shape())
    with target("v5e"):
        assert reason(shape(), shape()) is None
        assert "float16" in reason(shape(dtype=jnp.float16), shape(dtype=jnp.float16))
        assert "512" in reason(shape(dim=512), shape())
        g = jax.ShapeDtypeStruct((1, 1, 2), jnp.float32)
        assert "1 tokens" in reason(shape(1), shape(1))
        g = jax.ShapeDtypeStruct((1, 64, 256), jnp.float32)
        assert "more than" in reason(shape(), shape(heads=256))


def test_tiles_are_checked():
    with pytest.raises(ValueError, match=r"tiles\.chunk_size=100 must be a power of two"):
        Tiles(chunk_size=100)
    with pytest.raises(ValueError, match=r"tiles\.backward_chunks=3 must be positive and divide tiles\.forward_chunks=4"):
        Tiles(forward_chunks=4, backward_chunks=3)
    with pytest.raises(ValueError, match=r"tiles\.backward_heads=0 must be positive"):
        Tiles(backward_heads=0)
    for length in (16, 17, 100, 129, 500, 1025):
        fitted = Tiles().fit(length)
        assert fitted.chunk_size * fitted.forward_chunks < 2 * max(length, 64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_inside_are_those_outside(dtype: str, monkeypatch: pytest.MonkeyPatch):
    """To the bit in bfloat16, to which both round."""
    case = Case("gated_deltanet", 65, "several", dtype=dtype, dims=(16, 8), stats=False)
    inputs, state, ids = _inputs(case, monkeypatch)
    inputs |= {"q": 3 * inputs["q"], "k": inputs["k"] / 4}
    outside = inputs | {name: l2_normalize(inputs[name]) for name in "qk"}
    call = partial(cases.RECURRENCES[case.name].call, initial_state=state, at=Tokens(None, ids), implementation="pallas_tpu")
    got, expected = run_checked(partial(call, l2_norm_eps=1e-6), inputs), run_checked(call, outside)
    compare = np.testing.assert_array_equal if dtype == "bfloat16" else assert_close
    jax.tree.map(compare, got, expected)
