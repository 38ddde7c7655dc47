"""The GPU kernels of the linear recurrences in Pallas' GPU interpreter, with race detection, against the reference."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels import Tokens, dispatch, gpu
from plait.kernels.recurrence import RecurrenceCall, gpu_driver
from plait.kernels.target import target
from plait.tests.kernels import cases
from plait.tests.tolerances import assert_tree_close, in_float64

pytestmark = pytest.mark.newest


class Case(NamedTuple):
    """One call: the recurrence, sizes, a layout of segments and the decay; bfloat16."""

    name: str
    length: int = 65
    segments: str | None = None
    decay: str = "mixed"
    heads: tuple[int, int] = (1, 1)
    dims: tuple[int, int] = (64, 64)
    batch: int = 1
    bare: bool = False
    """Without an initial state and statistics, and with gradients of the outputs alone."""


CASES = [
    Case("scalar_decay", 130, "several", heads=(1, 2)),
    Case("vector_decay", 65, "several", heads=(1, 2)),
    Case("deltanet", 63, None, "none", dims=(64, 320)),
    Case("gated_deltanet", 130, "several", heads=(1, 2)),
    Case("kda", 65, "several"),
    Case("gated_deltanet", 130, "several", heads=(1, 2), dims=(256, 64)),
    Case("gated_deltanet", 190, "long", "rare", bare=True),
    Case("kda", 130, None, "rare", dims=(64, 192), bare=True),
]
MORE = [
    Case("scalar_decay", 64, "one", "strong", batch=2),
    Case("scalar_decay", 500, "long", "weak", dims=(128, 64)),
    Case("vector_decay", 63, None, "strong"),
    Case("vector_decay", 500, "several", dims=(64, 128)),
    Case("vector_decay", 64, "long", "weak", dims=(128, 256)),
    Case("deltanet", 500, "several", "none", batch=2),
    Case("gated_deltanet", 65, None, "strong", heads=(2, 4)),
    Case("gated_deltanet", 500, "long", "weak", dims=(128, 128)),
    Case("kda", 500, "several", heads=(1, 2)),
    Case("kda", 130, None, "weak", dims=(128, 64)),
    Case("kda", 64, "one", "strong", dims=(64, 256)),
    Case("gated_deltanet", 130, None, "weak", dims=(256, 128)),
    Case("gated_deltanet", 130, "several", dims=(64, 512)),
    Case("deltanet", 65, "several", "none", heads=(1, 2), dims=(256, 512)),
    Case("scalar_decay", 130, "several", dims=(256, 64)),
    Case("vector_decay", 65, "several", dims=(256, 64)),
    Case("kda", 65, "several", dims=(256, 64)),
    Case("scalar_decay", 190, None, "rare", heads=(1, 2), bare=True),
    Case("vector_decay", 190, "long", "rare", heads=(1, 2), dims=(64, 128), bare=True),
    Case("deltanet", 130, None, "none", heads=(1, 2), dims=(128, 128), bare=True),
    Case("gated_deltanet", 256, None, "strong", bare=True),
    Case("kda", 256, "several", heads=(1, 2), dims=(64, 192), bare=True),
    *(Case(name, 2048, "several") for name in cases.WITH_KERNELS),
]

needs_interpreter = pytest.mark.skipif(
    jax.__version_info__ < gpu.MIN_JAX, reason=f"the GPU interpreter needs JAX >= {'.'.join(map(str, gpu.MIN_JAX))}"
)


def _run(implementation: str, case: Case, inputs: dict[str, jax.Array], state: jax.Array, ids: jax.Array | None) -> Any:
    """Values, statistics and all gradients."""
    run = partial(cases.RECURRENCES[case.name].call, at=Tokens(None, ids), implementation=implementation)

    def outputs(inputs: dict[str, jax.Array], state: jax.Array) -> Any:
        o, final_state, stats = run(inputs, initial_state=state, return_stats=True)
        return {"o": o, "final_state": final_state, **stats._asdict()}

    if case.bare:
        return cases.with_gradients(lambda inputs: {"o": run(inputs)[0]}, inputs)
    return cases.with_gradients(outputs, inputs, state)


def _assert_matches(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"BATCH": case.batch, "NUM_QK_HEADS": case.heads[0], "NUM_HEADS": case.heads[1]}
    for name, size in (sizes | {"KEY_DIM": case.dims[0], "VALUE_DIM": case.dims[1]}).items():
        monkeypatch.setattr(cases, name, size)
    inputs = cases.RECURRENCES[case.name].inputs(case.length, decay=case.decay, dtype=jnp.bfloat16)
    args = inputs, cases.state(), None if case.segments is None else cases.segments(case.length, case.segments)
    plain = cases.quick_jit(partial(_run, "reference", case))
    with gpu.interpreting(), target("h100"):
        got = jax.block_until_ready(cases.quick_jit(partial(_run, "pallas_gpu", case))(*args))
    assert got["value"]["o"].dtype == jnp.bfloat16
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
    assert_tree_close(got, in_float64(plain, *args), plain(*args), dtype="bfloat16")
    if case.segments is not None:
        assert not np.asarray(got["value"]["o"])[np.asarray(args[2]) == 0].any()


_ids = lambda c: f"{c.name}-{c.length}-{c.segments}-{c.decay}-{c.dims[0]}x{c.dims[1]}" + "-bare" * c.bare


@needs_interpreter
@pytest.mark.parametrize("case", CASES, ids=_ids)
def test_kernel_matches_reference(case: Case, monkeypatch: pytest.MonkeyPatch):
    _assert_matches(case, monkeypatch)


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("case", MORE, ids=_ids)
def test_kernel_matches_reference_in_more_cases(case: Case, monkeypatch: pytest.MonkeyPatch):
    _assert_matches(case, monkeypatch)


@needs_interpreter
def test_kernel_is_chosen_where_it_fits():
    def reason(
        length: int = 64,
        dims: tuple[int, int] = (64, 64),
        dtype: Any = jnp.bfloat16,
        return_stats: bool = False,
        generation: str = "h100",
    ) -> str | None:
        q, v = (jnp.zeros((1, length, 1, dim), dtype) for dim in dims)
        with target(generation):
            return gpu_driver.unsupported(
                RecurrenceCall.of("decay", q=q, k=q, v=v, g=v[..., 0], at=None, scale=None, return_stats=return_stats)
            )

    assert reason() is None
    assert "tf32" in str(reason(dtype=jnp.float32))
    assert "one token" in str(reason(length=1))
    assert "not of (64, 128, 256) and" in str(reason(dims=(64, 65)))
    assert reason(dims=(256, 512), return_stats=True) is None
    assert "wgmma" in str(reason(generation="b200"))
    assert all("pallas_gpu" in dispatch.registered()[op] for op in ("decay", "delta_rule"))
