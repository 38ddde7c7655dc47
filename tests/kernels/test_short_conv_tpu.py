"""The TPU short convolution in Pallas' TPU interpreter, with race detection, and through the compiler, against the reference."""

import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from plait.kernels import Tokens, short_conv
from plait.kernels.short_conv import pallas_tpu, reference
from plait.kernels.short_conv.call import ShortConvCall
from plait.kernels.target import target
from plait.tests.kernels import cases
from plait.tests.suites import usually
from plait.tests.tolerances import assert_tree_close, in_float64

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
SCOPED_VMEM = 16 << 20


class Case(NamedTuple):
    """One call."""

    length: int
    width: int = 4
    channels: int = 100
    layout: str | None = None
    dtype: str = "float32"
    activation: str | None = "silu"
    bare: bool = False
    """No bias and no initial state."""


CASES = {
    "63-several": Case(63, layout="several"),
    "64-bfloat16": Case(64, dtype="bfloat16", channels=130),
    "33-long-bfloat16": Case(33, layout="long", dtype="bfloat16", width=2),
    "one-tap": Case(32, width=1, activation=None),
    "eight-taps": Case(40, width=8, layout="several", channels=64),
    "linear-bare": Case(90, activation=None, bare=True, layout="several"),
    "16": Case(16, channels=6),
}


def run_checked(function: Any, *args: Any) -> Any:
    """Runs under the TPU interpreter; raises on a data race in every supported JAX."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)), target("v5e"):
        out = jax.block_until_ready(jax.jit(function)(*args))
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as state  # before JAX 0.12 a race only sets this flag

    if getattr(getattr(state, "races", None), "races_found", False):
        raise RuntimeError("data race in kernel")
    return out


def _inputs(case: Case) -> tuple[dict[str, jax.Array], jax.Array | None]:
    rng = np.random.default_rng(case.length)
    shapes = {"x": (2, case.length, case.channels), "weight": (case.width, case.channels)}
    if not case.bare:
        shapes |= {"bias": (case.channels,), "initial_state": (2, case.width - 1, case.channels)}
    inputs = {name: jnp.asarray(rng.standard_normal(shape), case.dtype) for name, shape in shapes.items()}
    return inputs, None if case.layout is None else cases.segments(case.length, case.layout)


def run(implementation: Any, case: Case, inputs: dict[str, jax.Array], segment_ids: jax.Array | None) -> Any:
    """y and the last inputs, and the gradients of all inputs."""
    options = {"bias": None, "initial_state": None, "activation": case.activation, "segment_ids": segment_ids}
    return cases.with_gradients(lambda inputs: implementation.short_conv(ShortConvCall(**(options | inputs))), inputs)


def _assert_matches(case: Case) -> None:
    args = _inputs(case)
    plain = cases.quick_jit(partial(run, reference, case))
    got = run_checked(partial(run, pallas_tpu, case), *args)
    assert all(x.dtype == case.dtype for x in got["value"])
    assert_tree_close(got, in_float64(plain, *args), plain(*args), dtype=case.dtype)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))


@pytest.mark.parametrize("name", usually(CASES, "63-several", "33-long-bfloat16", "one-tap", newest=("63-several",)))
def test_kernel_matches_reference(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pallas_tpu, "TILES", pallas_tpu.Tiles(tokens=32, channels=256))
    _assert_matches(CASES[name])


@pytest.mark.slow
def test_kernel_matches_reference_with_its_own_tiles():
    _assert_matches(Case(600, layout="several", channels=256))


def test_harmful_padding_goes_nowhere(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pallas_tpu, "TILES", pallas_tpu.Tiles(tokens=32, channels=128))
    case = Case(64, layout="several", bare=True, channels=64)
    inputs, ids = _inputs(case)
    clean = run_checked(partial(run, pallas_tpu, case), inputs, ids)
    harmful = inputs | {"x": jnp.where((ids != 0)[..., None], inputs["x"], jnp.inf)}
    got = run_checked(partial(run, pallas_tpu, case), harmful, ids)
    y = got["value"][0]
    np.testing.assert_array_equal(y, clean["value"][0])


def test_unsupported_says_why():
    def reason(length: int = 64, taps: int = 4, dtype: Any = jnp.float32) -> str | None:
        x, weight = jax.ShapeDtypeStruct((1, length, 64), dtype), jax.ShapeDtypeStruct((taps, 64), jnp.float32)
        options = {"bias": None, "initial_state": None, "activation": None, "segment_ids": None}
        return pallas_tpu.unsupported(ShortConvCall(x=x, weight=weight, **options))

    assert "the backend is cpu" in reason()
    with target("v5e"):
        assert reason() is None
        assert "1 tokens" in reason(length=1)
        assert "9 taps" in reason(taps=9)
        assert "float16" in reason(dtype=jnp.float16)


def test_tiles_are_checked():
    with pytest.raises(ValueError, match=r"tiles\.channels=100 must be a positive multiple of 128"):
        pallas_tpu.Tiles(channels=100)


@pytest.mark.parametrize(
    ("generation", "channels", "dtype"), [("v5e", 2048, "bfloat16"), ("v5p", 1280, "float32"), ("v6e", 1024, "bfloat16")]
)
def test_kernel_compiles(generation: str, channels: int, dtype: str, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu: pip install 'jax[tpu]'")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation]).devices[0]
    shape = lambda *s, dtype=dtype: jax.ShapeDtypeStruct(s, dtype, sharding=SingleDeviceSharding(device))

    def loss(x: jax.Array, weight: jax.Array, segment_ids: jax.Array) -> jax.Array:
        y, _ = short_conv(x, weight, at=Tokens(None, segment_ids), implementation="pallas_tpu")
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    with target(generation):
        operands = shape(2, 4000, channels), shape(4, channels), shape(2, 4000, dtype=jnp.int32)
        text = jax.jit(jax.grad(loss, (0, 1))).lower(*operands).compile().as_text()
    kernels = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    assert {re.search(r"short_conv_[a-z]+", line)[0] for line in kernels} == {"short_conv_forward", "short_conv_backward"}
    for line in kernels:
        vmem = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1".*?"size":"(\d+)"', line)
        assert int(vmem[1]) <= SCOPED_VMEM
