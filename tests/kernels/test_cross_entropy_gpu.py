"""The GPU cross entropy in Pallas' GPU interpreter, with race detection, and through ptxas, against the reference."""

import importlib.util
import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from plait.kernels import gpu
from plait.kernels.cross_entropy import pallas_gpu, reference
from plait.kernels.cross_entropy.by_vocabulary import Slope
from plait.kernels.cross_entropy.call import CrossEntropyCall
from plait.kernels.target import target
from plait.tests.kernels import cases
from plait.tests.kernels.gpu_targets import TARGETS
from plait.tests.tolerances import assert_tree_close, in_float64

pytestmark = pytest.mark.newest
needs_interpreter = pytest.mark.skipif(
    jax.__version_info__ < gpu.MIN_JAX, reason=f"the GPU interpreter needs JAX >= {'.'.join(map(str, gpu.MIN_JAX))}"
)
needs_compiler = pytest.mark.skipif(
    jax.__version_info__ < gpu.MIN_JAX or not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)),
    reason="compiling for GPUs needs JAX's CUDA plugin",
)


class Case(NamedTuple):
    """One call."""

    length: int
    width: int = 64
    vocabulary: int = 300
    soft_cap: float | None = None
    chunk_size: int | None = None
    spread: int = 1


CASES = {
    "1": Case(1, vocabulary=50),
    "64-parts-cap": Case(64, width=200, soft_cap=2.0, vocabulary=256),
    "65-slices-shared": Case(65, width=130, chunk_size=10, vocabulary=1300, spread=6),
    "63": Case(63),
}


def _inputs(case: Case) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    rng = np.random.default_rng(case.length)
    weight = rng.standard_normal((case.width, case.vocabulary)) / case.width**0.5
    hidden = rng.standard_normal((2, case.length, case.width))
    mask = rng.random((2, case.length)) > 0.3
    mask[0, 0] = True
    targets = np.where(mask, rng.integers(0, case.vocabulary, mask.shape), -100)
    targets[0, 0] = case.vocabulary - 1
    return {"hidden": jnp.asarray(hidden, jnp.bfloat16), "weight": jnp.asarray(weight, jnp.bfloat16)}, targets, mask


def run(implementation: Any, case: Case, inputs: dict[str, jax.Array], targets: jax.Array, mask: jax.Array) -> Any:
    """nll and lse, and the gradients of hidden and weight."""
    options = {"loss_mask": mask, "logit_soft_cap": case.soft_cap, "chunk_size": case.chunk_size}
    run_call = lambda inputs: implementation.cross_entropy(CrossEntropyCall(**inputs, targets=targets, **options))
    return cases.with_gradients(run_call, inputs)


@needs_interpreter
@pytest.mark.parametrize("name", CASES)
def test_kernel_matches_reference(name: str, monkeypatch: pytest.MonkeyPatch):
    case = CASES[name]
    monkeypatch.setattr(pallas_gpu, "SPREAD", case.spread)
    args = _inputs(case)
    plain = cases.quick_jit(partial(run, reference, case))
    with gpu.interpreting(), target("h100"):
        got = jax.block_until_ready(cases.quick_jit(partial(run, pallas_gpu, case))(*args))
    assert all(x.dtype == jnp.float32 for x in got["value"])
    assert_tree_close(got, in_float64(plain, *args), plain(*args), dtype="bfloat16")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))


@needs_compiler
@pytest.mark.parametrize(
    ("generation", "tokens", "width", "vocabulary", "soft_cap"),
    [("h100", 4096, 1024, 50_257, 30.0), ("h200", 16_384, 4096, 128_256, None)],
)
def test_kernel_compiles_without_spills(
    generation: str, tokens: int, width: int, vocabulary: int, soft_cap: float | None, monkeypatch: pytest.MonkeyPatch, capfd: Any
):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=generation, topology="1x1x1", target_config=TARGETS[generation]
    )
    where = NamedSharding(Mesh(np.array(topology.devices), ("d",), axis_types=(AxisType.Auto,)), PartitionSpec())
    shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype, sharding=where)
    rows, targets = shape(tokens, dtype=jnp.float32), shape(tokens, dtype=jnp.int32)
    with target(generation):
        forward = jax.jit(lambda *x: pallas_gpu.forward(*x, soft_cap))
        forward.lower(shape(tokens, width), shape(width, vocabulary), targets).compile()
        slopes = jax.jit(lambda *x: pallas_gpu.slopes(*x, soft_cap))
        slopes.lower(shape(tokens, width), shape(width, 8192), Slope(rows, rows, rows, targets)).compile()
    captured = capfd.readouterr()
    report = captured.out + captured.err
    assert all(name in report for name in ("cross_entropy_forward", "cross_entropy_slopes"))
    assert "serialized" not in report
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report) == [("0", "0")] * 2, report


def test_unsupported_says_why():
    x, targets = jax.ShapeDtypeStruct((1, 64, 64), jnp.bfloat16), jax.ShapeDtypeStruct((1, 64), jnp.int32)

    def reason(hidden: Any, weight: Any) -> str | None:
        options = {"loss_mask": targets, "logit_soft_cap": None, "chunk_size": None}
        return pallas_gpu.unsupported(CrossEntropyCall(hidden=hidden, weight=weight, targets=targets, **options))

    assert "the backend is cpu" in reason(x, x)
    with target("h100"):
        single = jax.ShapeDtypeStruct((64, 100), jnp.float32)
        expected = "bfloat16, float32" if jax.__version_info__ >= gpu.MIN_JAX else "needs JAX"
        assert expected in reason(x, single)
