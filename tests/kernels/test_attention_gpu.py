"""The GPU attention kernel in Pallas' GPU interpreter, with race detection, against the reference."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait import kernels
from plait.kernels import DistanceBias, Mask, Tokens, dispatch, gpu
from plait.kernels.attention import pallas_gpu, reference
from plait.kernels.attention.call import AttentionCall
from plait.kernels.masks import PowerMask, SelectedBlocks
from plait.kernels.target import target
from plait.tests.kernels import cases
from plait.tests.kernels.attention_calls import inputs_of, segments_of
from plait.tests.kernels.test_ring import assert_shares_add_up
from plait.tests.tolerances import assert_tree_close, in_float64

pytestmark = pytest.mark.newest


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
    soft_cap: float | None = None
    bias: bool = False
    low: bool = False
    """The keys' weights are tiny; outputs, which then are nothing, are left out."""
    selected: tuple[int, int] | None = None
    """Tokens a block, and heads that select."""


SINKS = Mask(window_size=9, num_sink_tokens=3)
CASES = {
    "causal": Case(heads=(2, 1)),
    "65-without-statistics": Case(length=65, dims=(32, 16), sinks=True, stats=False),
    "full-sigmoid": Case(mask=Mask(causal=False), sigmoid=True, length=130, heads=(2, 2)),
    "sigmoid-without-statistics": Case(sigmoid=True, length=63, stats=False, dims=(96, 64)),
    "window-float16": Case(mask=Mask(window_size=40), length=256, dtype="float16"),
    "window-sinks-segments": Case(mask=SINKS, segments="several", sinks=True, length=140),
    "segments": Case(segments="several", length=65, dims=(192, 128)),
    "hidden": Case(segments="none", length=65, sinks=True),
    "power": Case(mask=PowerMask(block_size=16, window_size=5, num_sink_tokens=3), segments="long", length=160, stats=False),
    "selected": Case(heads=(4, 2), selected=(32, 2), length=192),
    "selected-segments": Case(selected=(24, 1), segments="several", length=140, stats=False),
    "left-padding": Case(mask=SINKS, segments="left", sinks=True, length=140),
    "low-sinks": Case(segments="left", sinks=True, low=True, length=65),
    "low-sigmoid": Case(segments="several", sigmoid=True, low=True, length=140),
    "soft-cap": Case(segments="several", soft_cap=1.5, sinks=True, length=140),
    "soft-cap-sigmoid": Case(soft_cap=2.0, sigmoid=True, length=65),
    "soft-cap-bias": Case(soft_cap=5.0, bias=True, length=65, stats=False),
}

SLOW = ("causal", "sigmoid-without-statistics", "window-float16", "power", "left-padding", "soft-cap-sigmoid")

needs_interpreter = pytest.mark.skipif(
    jax.__version_info__ < gpu.MIN_JAX, reason=f"the GPU interpreter needs JAX >= {'.'.join(map(str, gpu.MIN_JAX))}"
)


def _selected(case: Case, batch: int) -> SelectedBlocks | None:
    if case.selected is None:
        return None
    size, heads = case.selected
    count = -(-case.length // size)
    indices = np.random.default_rng(1).integers(-1, count, (batch, case.length, heads, 2), np.int32)
    return SelectedBlocks(indices=jnp.asarray(indices), block_size=size, num_blocks=count)


def _run(implementation: Any, case: Case, inputs: dict[str, jax.Array], tokens: dict[str, Any], **static: Any) -> Any:
    """Outputs and all gradients; `tokens` are further options, and so is `static`."""

    def outputs(inputs: dict[str, jax.Array]) -> Any:
        normalizer = "sigmoid" if case.sigmoid else "softmax"
        options = inputs | tokens | {"logit_soft_cap": case.soft_cap}
        call = AttentionCall.of(
            "attention",
            mask=case.mask,
            normalizer=normalizer,
            return_stats=case.stats,
            return_lse=not (case.stats or case.sigmoid),
            selected=_selected(case, inputs["q"].shape[0]),
            **options,
            **static,
        )
        o, stats = implementation.attention(call)
        found = {f: jnp.where(x > -1e29, x, 0) for f, x in (stats._asdict() if stats else {}).items() if x is not None}
        return found if case.low else {"o": o, **found}

    return cases.with_gradients(outputs, inputs)


def _assert_matches(case: Case, inputs: dict[str, jax.Array], tokens: dict[str, Any], **static: Any) -> Any:
    plain = cases.quick_jit(partial(_run, reference, case, **static))
    with gpu.interpreting(), target("h100"):
        got = jax.block_until_ready(cases.quick_jit(partial(_run, pallas_gpu, case, **static))(inputs, tokens))
    assert case.low or got["value"]["o"].dtype == case.dtype
    assert_tree_close(got, in_float64(plain, inputs, tokens), plain(inputs, tokens), dtype=case.dtype)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
    return got


def _own(segment_ids: jax.Array | None) -> dict[str, Any]:
    return {"at": Tokens(None, segment_ids)}


@needs_interpreter
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_kernel_matches_reference(name: str):
    case = CASES[name]
    got = _assert_matches(case, inputs_of(case), _own(segments_of(case)))
    if name == "hidden":
        assert not any(np.asarray(x).any() for key, x in got["value"].items() if key != "lse")


@needs_interpreter
def test_kernel_matches_reference_with_selected_blocks_of_other_devices():
    """The queries are a part of the row, the keys all of it."""
    case = Case(heads=(4, 2), selected=(32, 2), length=128, stats=False)
    inputs, rng, first, length = inputs_of(case), np.random.default_rng(0), 64, 192
    for name in ("k", "v"):
        inputs[name] = jnp.asarray(rng.standard_normal((1, length, *inputs[name].shape[2:])), case.dtype)
    row = Tokens(None, jnp.asarray(np.repeat([1, 2, 3], [40, 110, 42])[None], jnp.int32)).placed(1, length)
    own = Tokens(None, row.segment_ids[:, first:], row.positions[:, first:])
    _assert_matches(case, inputs, {"at": own, "kv_at": row}, kv_in_order=True)


@needs_interpreter
def test_kernel_matches_reference_with_shuffled_keys():
    case = Case(mask=Mask(window_size=90, num_sink_tokens=2), length=64)
    inputs, rng = inputs_of(case), np.random.default_rng(0)
    longer = {name: jnp.asarray(rng.standard_normal((1, 200, *x.shape[2:])), case.dtype) for name, x in inputs.items()}
    positions = jnp.asarray(rng.permutation(200)[None], jnp.int32)
    tokens = {
        "at": Tokens(None, None, 130 + jnp.arange(64)[None, :]),
        "kv_at": Tokens(None, (positions < 190).astype(jnp.int32), positions),
    }
    _assert_matches(case, inputs | {"k": longer["k"], "v": longer["v"]}, tokens)


@needs_interpreter
def test_routed_matches_reference():
    case = Case(mask=Mask(window_size=90), heads=(2, 1), segments="several", sinks=True, length=140)
    inputs, rng = inputs_of(case), np.random.default_rng(0)
    active = jnp.asarray(rng.random(inputs["q"].shape[:3]) < 0.4).at[0, :, 0].set(False)

    def run(implementation: str, inputs: dict[str, jax.Array]) -> Any:
        def outputs(inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
            q, k, v = (inputs[name] for name in "qkv")
            options = {"mask": case.mask, "at": Tokens(None, segments_of(case)), "sinks": inputs["sinks"]}
            return {"o": kernels.routed_attention(q, k, v, active, implementation=implementation, **options)}

        return cases.with_gradients(outputs, inputs)

    plain = cases.quick_jit(partial(run, "reference"))
    with gpu.interpreting(), target("h100"):
        got = jax.block_until_ready(cases.quick_jit(partial(run, "pallas_gpu"))(inputs))
    assert_tree_close(got, in_float64(plain, inputs), plain(inputs), dtype=case.dtype)
    assert not np.asarray(got["value"]["o"])[~np.asarray(active)].any()


def _reason(shapes: list[Any], **options: Any) -> str | None:
    q, k, v = shapes
    return pallas_gpu.unsupported(AttentionCall.of("attention", q=q, k=k, v=v, mask=Mask(), **options))


def _shapes(length: int = 128, heads: tuple[int, int] = (4, 2), dim: int = 64, dtype: str = "bfloat16") -> list[Any]:
    return [jax.ShapeDtypeStruct((1, length, n, dim), dtype) for n in (heads[0], heads[1], heads[1])]


@needs_interpreter
def test_unsupported_says_why():
    assert "the backend is cpu" in _reason(_shapes())
    with target("b200"):
        assert "wgmma" in _reason(_shapes())
    with target("h200"):
        assert _reason(_shapes()) is None
        assert "float32" in _reason(_shapes(dtype="float32"))
        assert "head dim 24" in _reason(_shapes(dim=24))
        q, k, _ = _shapes(dim=256)
        assert "shared memory" in _reason([q, k, _shapes(dim=240)[2]])
        assert "head dim 512" in _reason(_shapes(dim=512))
        assert "1 queries" in _reason(_shapes(length=1))
        assert "scale" in _reason(_shapes(), scale=-1.0)
        assert "by distance" in _reason(_shapes(), bias=DistanceBias(slopes=jnp.ones(4)))
        selected = SelectedBlocks(indices=jnp.ones((1, 128, 1, 3), jnp.int32), block_size=2, num_blocks=64)
        assert "block_size=2 puts more than 32 blocks" in _reason(_shapes(), selected=selected)


@needs_interpreter
def test_auto_chooses_for_the_gpu():
    with target("h100"):
        jax.eval_shape(lambda q, k, v: kernels.attention(q, k, v, mask=Mask()), *_shapes())
    assert "pallas_gpu" in dispatch.chosen()["attention"]


@needs_interpreter
def test_shares_of_a_known_whole():
    """As a ring of devices asks for them: see `tests/kernels/test_ring.py`."""
    rng = np.random.default_rng(0)
    shapes = {"q": (1, 256, 4, 32), "k": (1, 256, 2, 32), "v": (1, 256, 2, 16)}
    inputs = {name: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for name, shape in shapes.items()}
    with gpu.interpreting(), target("h100"):
        assert_shares_add_up(inputs, "pallas_gpu", "bfloat16")
