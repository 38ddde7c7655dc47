"""Attention on GPUs to tokens that queries choose one by one, in Pallas' GPU interpreter, with race detection, against the reference."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels import Mask, Tokens, gpu
from plait.kernels.attention import pallas_gpu, reference
from plait.kernels.attention.call import AttentionCall
from plait.kernels.masks import SelectedBlocks
from plait.kernels.target import target
from plait.tests.kernels import cases
from plait.tests.tolerances import assert_tree_close, in_float64

pytestmark = [
    pytest.mark.newest,
    pytest.mark.skipif(
        jax.__version_info__ < gpu.MIN_JAX, reason=f"the GPU interpreter needs JAX >= {'.'.join(map(str, gpu.MIN_JAX))}"
    ),
]


class Case(NamedTuple):
    """One call: sizes, a layout of segments and options."""

    mask: Mask = Mask()
    length: int = 13
    heads: tuple[int, int] = (16, 1)
    dims: tuple[int, int | None] = (128, 64)
    """Of keys, and of values that are the first of their channels."""
    own_values: int | None = None
    """Channels of values that are not."""
    chosen: int = 9
    queries: int | None = None
    """So many, the last of the row, of which the keys are all; None is all, with no others' keys."""
    segments: str | None = None
    sinks: bool = False
    stats: bool = True
    """Without, lse alone."""
    dtype: str = "bfloat16"


CASES = {
    "segments": Case(segments="several", length=14, heads=(64, 1), sinks=True),
    "left-padding": Case(segments="left", stats=False, length=9),
    "hidden": Case(segments="none", length=3, stats=False),
    "three-tiles": Case(length=170, chosen=150, heads=(8, 1), dims=(64, 64), queries=3),
    "own-values": Case(heads=(8, 2), own_values=64, dims=(64, None), length=4),
    "both-ways-float16": Case(mask=Mask(causal=False), dtype="float16", heads=(4, 1), length=9, dims=(64, 64)),
    "128-heads": Case(heads=(128, 1), length=3, dims=(192, 128), stats=False),
    "96-heads": Case(heads=(96, 1), length=3),
    "padded-channels": Case(heads=(12, 2), own_values=48, dims=(80, None), length=7, sinks=True),
    "published": Case(heads=(128, 1), dims=(576, 512), length=80, chosen=70, segments="left", queries=2),
    "window": Case(mask=Mask(window_size=5, num_sink_tokens=2), segments="several", length=40, chosen=30, heads=(32, 1)),
    "other-devices": Case(length=16, segments="several", stats=False, queries=5),
}
SLOW = ("96-heads", "padded-channels", "published", "window", "both-ways-float16")


def _inputs(case: Case) -> dict[str, Any]:
    rng = np.random.default_rng(case.length)
    (num_heads, groups), (key_dim, _) = case.heads, case.dims
    batch = 1 if case.segments is None else cases.BATCH
    shapes = {"q": (num_heads, key_dim), "k": (groups, key_dim)}
    if case.own_values is not None:
        shapes["v"] = (groups, case.own_values)
    inputs = {name: jnp.asarray(rng.standard_normal((batch, case.length, *s)), case.dtype) for name, s in shapes.items()}
    if case.sinks:
        inputs["sinks"] = jnp.asarray(rng.standard_normal(num_heads), jnp.float32)
    return inputs


def _tokens(case: Case) -> Tokens | None:
    if case.segments in (None, "none"):
        return None if case.segments is None else Tokens(None, jnp.zeros((cases.BATCH, case.length), jnp.int32))
    return Tokens(None, cases.segments(case.length, case.segments))


def _selected(case: Case, batch: int) -> SelectedBlocks:
    """Distinct tokens in any order, with none among them, and some in the future or beyond the segment."""
    rng = np.random.default_rng(1)
    count, shape = batch * case.length * case.heads[1], (batch, case.length, case.heads[1], case.chosen)
    drawn = np.stack([rng.permutation(max(case.length, case.chosen) + 2)[: case.chosen] for _ in range(count)])
    indices = jnp.asarray(np.where(rng.random(drawn.shape) < 0.2, -1, drawn).reshape(shape), jnp.int32)
    return SelectedBlocks(indices=indices, block_size=1, num_blocks=case.length)


def _run(implementation: Any, case: Case, inputs: dict[str, jax.Array], tokens: dict[str, Any], **static: Any) -> Any:
    """Outputs and all gradients; `tokens` are further options, and so is `static`."""

    def outputs(inputs: dict[str, jax.Array]) -> Any:
        call = AttentionCall.of(
            "attention",
            mask=case.mask,
            value_dim=case.dims[1],
            return_stats=case.stats,
            return_lse=not case.stats,
            **inputs,
            **tokens,
            **static,
        )
        o, stats = implementation.attention(call)
        return {"o": o} | {f: jnp.where(x > -1e29, x, 0) for f, x in stats._asdict().items() if x is not None}

    return cases.with_gradients(outputs, inputs)


def _assert_matches(case: Case, inputs: dict[str, jax.Array], tokens: dict[str, Any], **static: Any) -> Any:
    plain = cases.quick_jit(partial(_run, reference, case, **static))
    with gpu.interpreting(), target("h100"):
        got = jax.block_until_ready(cases.quick_jit(partial(_run, pallas_gpu, case, **static))(inputs, tokens))
    assert got["value"]["o"].dtype == case.dtype
    assert_tree_close(got, in_float64(plain, inputs, tokens), plain(inputs, tokens), dtype=case.dtype)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
    return got


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_kernels_match_reference(name: str):
    case = CASES[name]
    inputs, row = _inputs(case), _tokens(case)
    selected = _selected(case, inputs["q"].shape[0])
    tokens, options = {"at": row, "selected": selected}, {}
    if case.queries is not None:
        row = (row or Tokens()).placed(*inputs["q"].shape[:2])
        last = lambda x: x[:, -case.queries :]
        inputs["q"], options = last(inputs["q"]), {"kv_in_order": True}
        tokens = {"at": jax.tree.map(last, row), "kv_at": row, "selected": jax.tree.map(last, selected)}
    got = _assert_matches(case, inputs, tokens, **options)
    if name == "hidden":
        assert not any(np.asarray(x).any() for x in got["value"].values())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"heads": (8, 2), "choosing": 1}, "1 heads choose tokens of 2 key heads"),
        ({"heads": (8, 2), "choosing": 8}, "8 heads choose tokens of 2 key heads"),
        ({"normalizer": "sigmoid", "sigmoid_bias": -3.0}, "softmax only"),
        ({"logit_soft_cap": 30.0}, "soft cap"),
        ({"value_dim": 48}, "first 48 channels"),
        ({"dim": 640, "value_dim": 512}, "bytes of shared memory"),
        ({"heads": (1, 1), "chosen": 17}, "too few"),
        ({"dtype": "float32"}, "not all bfloat16"),
        ({"foreign": True}, "not the tokens of the queries' documents"),
    ],
    ids=str,
)
def test_what_is_not_served_is_said(options: dict[str, Any], reason: str | None):
    sizes = {"heads": (64, 1), "choosing": None, "dim": 128, "chosen": 16, "dtype": "bfloat16", "value_dim": 64, "foreign": False}
    options, sizes = {x: options[x] for x in options if x not in sizes}, sizes | {x: options[x] for x in options if x in sizes}
    (heads, groups), length = sizes["heads"], 128
    q, k = (jnp.zeros((1, length, n, sizes["dim"]), sizes["dtype"]) for n in (heads, groups))
    indices = jnp.zeros((1, length, sizes["choosing"] or groups, sizes["chosen"]), jnp.int32)
    selected = SelectedBlocks(indices=indices, block_size=1, num_blocks=length)
    if sizes["foreign"]:
        options = {"kv_at": Tokens().placed(1, length)}
    with target("h100"):
        said = pallas_gpu.unsupported(
            AttentionCall.of("attention", q=q, k=k, value_dim=sizes["value_dim"], mask=Mask(), selected=selected, **options)
        )
    assert said is None if reason is None else reason in said
