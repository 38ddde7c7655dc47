"""The TPU cross entropy in Pallas' TPU interpreter, with race detection, against the reference."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from plait.kernels.cross_entropy import by_vocabulary, pallas_tpu, reference
from plait.kernels.cross_entropy.call import CrossEntropyCall
from plait.kernels.target import target
from plait.tests.kernels import cases
from plait.tests.suites import usually
from plait.tests.tolerances import assert_tree_close, in_float64

TILES = pallas_tpu.Tiles(tokens=128, vocabulary=256, width=128)


class Case(NamedTuple):
    """One call."""

    length: int
    width: int = 64
    vocabulary: int = 300
    dtype: str = "float32"
    soft_cap: float | None = None
    chunk_size: int | None = None
    scale: float = 1.0
    tiles: pallas_tpu.Tiles | None = TILES


CASES = {
    "1": Case(1, vocabulary=50),
    "63-bfloat16": Case(63, dtype="bfloat16"),
    "64-cap": Case(64, soft_cap=2.0, vocabulary=256),
    "65-slices": Case(65, chunk_size=10, vocabulary=1300),
    "parts-of-width": Case(130, width=300, vocabulary=513, chunk_size=40),
    "parts-slices-cap-bfloat16": Case(63, width=300, vocabulary=1100, dtype="bfloat16", soft_cap=3.0, chunk_size=30),
    "large-logits": Case(65, scale=30.0, vocabulary=700),
    "500-own-tiles": Case(500, width=200, vocabulary=1000, tiles=None),
}


def run_checked(function: Any, *args: Any) -> Any:
    """Runs under the TPU interpreter; raises on a data race in every supported JAX."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)), target("v5e"):
        out = jax.block_until_ready(jax.jit(function)(*args))
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as state  # before JAX 0.12 a race only sets this flag

    if getattr(getattr(state, "races", None), "races_found", False):
        raise RuntimeError("data race in kernel")
    return out


def _inputs(case: Case) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    rng = np.random.default_rng(case.length)
    weight = case.scale * rng.standard_normal((case.width, case.vocabulary)) / case.width**0.5
    hidden = rng.standard_normal((2, case.length, case.width))
    mask = rng.random((2, case.length)) > 0.3
    mask[0, 0] = True
    targets = np.where(mask, rng.integers(0, case.vocabulary, mask.shape), -100)
    targets[0, 0] = case.vocabulary - 1
    return {"hidden": jnp.asarray(hidden, case.dtype), "weight": jnp.asarray(weight, case.dtype)}, targets, mask


def run(implementation: Any, case: Case, inputs: dict[str, jax.Array], targets: jax.Array, mask: jax.Array) -> Any:
    """nll and lse, and the gradients of hidden and weight."""
    options = {"loss_mask": mask, "logit_soft_cap": case.soft_cap, "chunk_size": case.chunk_size}
    run_call = lambda inputs: implementation.cross_entropy(CrossEntropyCall(**inputs, targets=targets, **options))
    return cases.with_gradients(run_call, inputs)


@pytest.mark.parametrize("name", usually(CASES, *CASES, newest=("parts-slices-cap-bfloat16",)))
def test_kernel_matches_reference(name: str, monkeypatch: pytest.MonkeyPatch):
    case = CASES[name]
    if case.tiles is not None:
        monkeypatch.setattr(pallas_tpu, "choose_tiles", lambda *_: case.tiles)
    args = _inputs(case)
    plain = cases.quick_jit(partial(run, reference, case))
    got = run_checked(partial(run, pallas_tpu, case), *args)
    assert all(x.dtype == jnp.float32 for x in got["value"])
    assert_tree_close(got, in_float64(plain, *args), plain(*args), dtype=case.dtype)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))


def test_masked_tokens_have_no_gradient_however_large():
    case = CASES["1"]._replace(length=64)
    inputs, targets, mask = _inputs(case)
    inputs["hidden"] = jnp.where(mask[..., None], inputs["hidden"], 1e18)
    got = run_checked(partial(run, pallas_tpu, case), inputs, targets, mask)
    off = ~np.asarray(mask)
    assert not any(np.asarray(x)[off].any() for x in (*got["value"], got["gradient"][0]["hidden"]))
    assert np.isfinite(got["gradient"][0]["weight"]).all()


@pytest.mark.parametrize("most", [0, 1, 600, 5000, 50_257, 1 << 30])
def test_slices_cover_the_vocabulary(most: int):
    for vocabulary in (1, 511, 513, 50_257):
        size = by_vocabulary.slice_size(vocabulary, most)
        assert 1 <= size <= vocabulary
        assert size == vocabulary or size % by_vocabulary.SLICE_MULTIPLE == 0
        assert size <= max(most, 0) + by_vocabulary.SLICE_MULTIPLE


def test_unsupported_says_why():
    x, targets = jax.ShapeDtypeStruct((1, 64, 64), jnp.float32), jax.ShapeDtypeStruct((1, 64), jnp.int32)
    weight = jax.ShapeDtypeStruct((64, 100), jnp.float32)

    def reason(hidden: Any, weight: Any) -> str | None:
        options = {"loss_mask": targets, "logit_soft_cap": None, "chunk_size": None}
        return pallas_tpu.unsupported(CrossEntropyCall(hidden=hidden, weight=weight, targets=targets, **options))

    assert "the backend is cpu" in reason(x, weight)
    with target("v5e"):
        assert reason(x, weight) is None
        half = jax.ShapeDtypeStruct(weight.shape, jnp.bfloat16)
        assert "bfloat16, float32" in reason(x, half)
        wide = jax.ShapeDtypeStruct((1, 64, 20_000), jnp.float32)
        assert "20000" in reason(wide, weight)


def test_tiles_are_checked():
    with pytest.raises(ValueError, match=r"tiles\.width=100 must be a positive multiple of 128"):
        pallas_tpu.Tiles(width=100)
