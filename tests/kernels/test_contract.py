"""The kernel contract: every implementation of every op gives the reference's outputs, final states and gradients."""

from functools import cache, partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait import kernels
from plait.kernels import DistanceBias, LowRankBias, Mask, Tokens
from plait.tests.kernels import cases
from plait.tests.suites import usually
from plait.tests.tolerances import assert_close, assert_tree_close, in_float64

TESTED = {op: [name for name in names if name != "reference"] for op, names in kernels.registered(everywhere=True).items()}
RECURRENT = [(name, i) for name, r in cases.RECURRENCES.items() for i in TESTED[r.op.__name__]]
CASES = [  # length, segments, decay
    (1, None, "mixed"),
    (63, None, "mixed"),
    (64, "several", "mixed"),
    (64, "long", "weak"),
    (64, "one", "strong"),
    (65, None, "weak"),
    (500, "several", "mixed"),
    (500, "long", "weak"),
]
_ids = lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else str(value)
RECURRENT_CASES = [
    (*one, *case) for one in RECURRENT for case in [*(("float32", *case) for case in CASES), ("bfloat16", 64, "several", "mixed")]
]
USUAL = [case for case in RECURRENT_CASES if case[3] != 63 or case[0] == "kda"]
"""A last chunk that lacks a token is cut like one that has a single one, of 65."""


@pytest.mark.parametrize(("name", "implementation", "dtype", "length", "layout", "decay"), usually(RECURRENT_CASES, *USUAL))
def test_recurrence_matches_reference(name: str, implementation: str, dtype: str, length: int, layout: str | None, decay: str):
    inputs = cases.RECURRENCES[name].inputs(length, decay=decay, dtype=dtype)
    args = (inputs, cases.state(), None if layout is None else cases.segments(length, layout))
    plain = cases.values_and_gradients(name, "reference")
    got = cases.values_and_gradients(name, implementation, 64 if length == 64 else 16)(*args)
    assert got["value"]["o"].dtype == dtype
    assert got["value"]["final_state"].dtype == jnp.float32
    assert_tree_close(got, in_float64(plain, *args), plain(*args), dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "implementation"), RECURRENT, ids=_ids)
def test_recurrence_matches_reference_at_length(name: str, implementation: str):
    args = (cases.RECURRENCES[name].inputs(2048), cases.state(), cases.segments(2048, "several"))
    plain = cases.values_and_gradients(name, "reference")
    got = cases.values_and_gradients(name, implementation, 64)(*args)
    assert_tree_close(got, in_float64(plain, *args), plain(*args), dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "window-sinks", "sigmoid"])
def test_attention_matches_reference_at_length(name: str):
    _assert_attention_matches(name, "chunked", 2048, "several")


@pytest.mark.parametrize("name", cases.RECURRENCES)
def test_recurrence_packed_equals_separate(name: str):
    inputs, lengths = cases.RECURRENCES[name].inputs(50), (19, 1, 30)
    ids = jnp.asarray(np.repeat([1, 2, 3], lengths)[None].repeat(cases.BATCH, 0))
    o, final_state = cases.jitted(name, "chunked", 16)(inputs, cases.state(), ids)
    starts = np.cumsum((0, *lengths))
    for start, stop in pairwise(starts):
        piece = {key: x[:, start:stop] for key, x in inputs.items()}
        state = cases.state() * (start == 0)
        alone, alone_state = cases.jitted(name, "reference")(piece, state)
        assert_close(o[:, start:stop], alone, err_msg=f"tokens {start} to {stop}")
    assert_close(final_state, alone_state, err_msg="final state")


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("name", cases.RECURRENCES)
def test_recurrence_skips_padding(name: str, implementation: str):
    inputs = cases.RECURRENCES[name].inputs(40)
    real = np.r_[5:20, 24:33]  # one segment with padding before, inside and after it
    ids = jnp.zeros((cases.BATCH, 40), jnp.int32).at[:, real].set(7)
    o, final_state = cases.jitted(name, implementation, 16)(inputs, cases.state(), ids)
    alone, alone_state = cases.jitted(name, "reference")({key: x[:, real] for key, x in inputs.items()}, cases.state())
    assert_close(o[:, real], alone)
    assert_close(final_state, alone_state)
    assert not np.asarray(o)[:, np.asarray(ids[0]) == 0].any()


@pytest.mark.parametrize("name", cases.RECURRENCES)
def test_recurrence_steps_equal_one_call(name: str):
    run, inputs = cases.jitted(name, "chunked"), cases.RECURRENCES[name].inputs(5)
    whole, whole_state = run(inputs, cases.state())
    state, outputs = cases.state(), []
    for t in range(5):
        o, state = run({key: x[:, t : t + 1] for key, x in inputs.items()}, state)
        outputs.append(o)
    assert_close(jnp.concatenate(outputs, axis=1), whole)
    assert_close(state, whole_state)


@pytest.mark.parametrize("layout", [None, "several"])
@pytest.mark.parametrize("name", cases.RECURRENCES)
def test_recurrence_rows_reproduce_output(name: str, layout: str | None):
    recurrence, length = cases.RECURRENCES[name], 100
    inputs = recurrence.inputs(length)
    ids = None if layout is None else cases.segments(length, layout)
    rows = jnp.asarray([0, 1, 31, 32, 50, 63, 64, 99], jnp.int32)
    weights = cases.quick_jit(partial(recurrence.implied, at=Tokens(None, ids), chunk_size=32))(inputs, rows)
    o, _ = cases.jitted(name, "reference")(inputs, None, ids)
    assert weights.dtype == jnp.float32
    assert_close(jnp.einsum("bhrs,bshv->brhv", weights, inputs["v"]), o[:, rows])
    ids = np.ones((cases.BATCH, length), int) if ids is None else np.asarray(ids)
    hidden = (np.arange(length)[None, :] > np.asarray(rows)[:, None])[None] | (ids[:, np.asarray(rows), None] != ids[:, None, :])
    assert not np.asarray(weights)[np.broadcast_to(hidden[:, None], weights.shape)].any()


ATTENTION = {
    "causal": (Mask(), {}),
    "full": (Mask(causal=False), {}),
    "window": (Mask(window_size=70), {}),
    "window-sinks": (Mask(window_size=9, num_sink_tokens=3), {}),
    "two-sided-window": (Mask(causal=False, window_size=9, num_sink_tokens=2), {}),
    "sink-logits": (Mask(window_size=40), {"sinks": True}),
    "sigmoid": (Mask(), {"normalizer": "sigmoid", "sigmoid_bias": -3.0}),
    "soft-cap": (Mask(window_size=40), {"sinks": True, "logit_soft_cap": 1.5}),
    "soft-cap-sigmoid": (Mask(), {"normalizer": "sigmoid", "sigmoid_bias": -1.0, "logit_soft_cap": 1.0}),
    "bias": (Mask(window_size=70, num_sink_tokens=2), {"bias": True, "logit_soft_cap": 3.0}),
    "distance-bias": (Mask(causal=False, window_size=40), {"distance_bias": True, "logit_soft_cap": 3.0}),
    "distance-bias-sigmoid": (Mask(), {"distance_bias": True, "normalizer": "sigmoid", "sigmoid_bias": -1.0}),
    "query-sinks": (Mask(window_size=40, num_sink_tokens=2), {"query_sinks": True}),
}
EDGES = (-9, -2, 0, 1, 3, 20)
"""Where the columns of a bias by distance begin."""


def _biases(inputs: dict[str, jax.Array]) -> dict[str, Any]:
    """What an option of `ATTENTION` stands for: the argument's name and value."""
    return {
        "sinks": ("sinks", inputs["sinks"]),
        "query_sinks": ("sinks", inputs["query_sinks"]),
        "bias": ("bias", LowRankBias(inputs["bias_q"], inputs["bias_k"])),
        "distance_bias": ("bias", DistanceBias(inputs["table"], inputs["slopes"], EDGES)),
    }


@cache
def _attention(name: str, implementation: str) -> Any:
    mask, options = ATTENTION[name]

    @cases.quick_jit
    def run(inputs: dict[str, jax.Array], segment_ids: jax.Array | None) -> Any:
        def outputs(inputs: dict[str, jax.Array]) -> Any:
            biases = _biases(inputs)
            named = dict(biases.get(key, (key, x)) for key, x in options.items())
            o, stats = kernels.attention(
                inputs["q"], inputs["k"], inputs["v"], mask=mask, at=Tokens(None, segment_ids), return_stats=True,
                implementation=implementation, **named,
            )  # fmt: skip
            return {"o": o, **{f: jnp.where(x > -1e29, x, 0) for f, x in stats._asdict().items()}}

        return cases.with_gradients(outputs, inputs)

    return run


def _attention_inputs(length: int, dtype: str = "float32", num_heads: int = 4, num_kv_heads: int = 2) -> dict[str, jax.Array]:
    rng = np.random.default_rng(length)
    shapes = {"q": (2, length, num_heads, 8), "k": (2, length, num_kv_heads, 8), "v": (2, length, num_kv_heads, 4)}
    shapes |= {"bias_q": (1, length, num_heads, 3), "bias_k": (2, length, 1, 3)}
    inputs = {key: jnp.asarray(rng.standard_normal(shape), dtype) for key, shape in shapes.items()}
    shapes = {"sinks": (), "query_sinks": (2, length), "table": (), "slopes": ()}
    inputs |= {key: jnp.asarray(rng.standard_normal((*shape, num_heads)), jnp.float32) for key, shape in shapes.items()}
    return inputs | {"table": jnp.asarray(rng.standard_normal((num_heads, len(EDGES) + 1)), jnp.float32)}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has the chunked form cut short sequences as it cuts long ones."""
    from plait.kernels.attention import chunked

    monkeypatch.setattr(chunked, "DENSE_TILE", 0)
    monkeypatch.setattr(chunked, "BLOCK_SIZE", 16)
    monkeypatch.setattr(chunked, "MAX_GROUPS", 2)
    _attention.cache_clear()
    yield
    _attention.cache_clear()


def _assert_attention_matches(name: str, implementation: str, length: int, layout: str | None, dtype: str = "float32") -> None:
    args = (_attention_inputs(length, dtype), None if layout is None else cases.segments(length, layout))
    plain, got = _attention(name, "reference"), _attention(name, implementation)(*args)
    assert got["value"]["o"].dtype == dtype
    assert got["value"]["lse"].dtype == jnp.float32
    assert_tree_close(got, in_float64(plain, *args), plain(*args), dtype=dtype)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("implementation", TESTED["attention"])
def test_attention_matches_reference(implementation: str, name: str):
    _assert_attention_matches(name, implementation, 65, "several")


@pytest.mark.parametrize(("length", "dtype"), [(1, "float32"), (63, "bfloat16"), (64, "float32"), (500, "float32")], ids=_ids)
@pytest.mark.parametrize("implementation", TESTED["attention"])
def test_causal_attention_matches_reference(implementation: str, length: int, dtype: str):
    _assert_attention_matches("causal", implementation, length, None if length == 64 else "long", dtype)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_by_blocks_matches_reference(name: str, small_blocks: None):
    _assert_attention_matches(name, "chunked", 90, None if name in ("causal", "window") else "several")


def test_attention_by_blocks_bfloat16(small_blocks: None):
    _assert_attention_matches("window-sinks", "chunked", 90, "several", "bfloat16")


def test_attention_hidden_row_is_zero_and_gradients_finite():
    inputs, ids = _attention_inputs(64), jnp.zeros((2, 64), jnp.int32)
    for name in ("causal", "sink-logits", "sigmoid"):
        got = _attention(name, "chunked")(inputs, ids)
        assert all(not np.asarray(x).any() for x in (got["value"]["o"], got["value"]["entropy"]))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))


@pytest.mark.parametrize("biased", [None, "rank", "distance"], ids=["plain", "biased and capped", "biased by distance"])
@pytest.mark.parametrize("implementation", TESTED["attention"])
def test_attention_decodes_from_shuffled_cache(implementation: str, biased: str | None):
    inputs, mask, rng = _attention_inputs(40), Mask(window_size=12, num_sink_tokens=2), np.random.default_rng(0)
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    options = {"mask": mask, "logit_soft_cap": 1.5 if biased else None}
    bias = {
        None: lambda t, at: None,
        "rank": lambda t, at: LowRankBias(inputs["bias_q"][:, t], inputs["bias_k"][:, at]),
        "distance": lambda t, at: DistanceBias(inputs["table"], inputs["slopes"], EDGES),
    }[biased]
    whole = kernels.attention(q, k, v, implementation="reference", bias=bias(slice(None), slice(None)), **options)
    order, spare = rng.permutation(40), ((0, 0), (0, 8), (0, 0), (0, 0))
    cache_k, cache_v = (jnp.pad(x[:, order], spare, constant_values=9.0) for x in (k, v))
    positions = jnp.pad(jnp.asarray(order, jnp.int32)[None].repeat(2, 0), ((0, 0), (0, 8)))

    @cases.quick_jit
    def decode(q: jax.Array, t: jax.Array) -> jax.Array:
        filled = (positions <= t) & (jnp.arange(48)[None, :] < 40)
        return kernels.attention(
            q, cache_k, cache_v, at=Tokens(None, None, jnp.full((2, 1), t)), bias=bias(t[None], jnp.minimum(positions[0], 39)),
            kv_at=Tokens(None, filled.astype(jnp.int32), positions), implementation=implementation, **options,
        )  # fmt: skip

    for t in (0, 5, 39):
        o = decode(q[:, t : t + 1], jnp.asarray(t))
        assert_close(o, whole[:, t : t + 1], err_msg=f"token {t}")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sinks": True},
        {"query_sinks": True, "distance_bias": True},
        {"normalizer": "sigmoid", "sigmoid_bias": -1.0},
        {"bias": True, "logit_soft_cap": 1.0},
    ],
    ids=str,
)
def test_attention_rows_reproduce_output(options: dict[str, Any]):
    inputs, ids, rows = _attention_inputs(50), cases.segments(50, "several"), jnp.asarray([0, 7, 31, 49])
    biases = _biases(inputs)
    options = dict(biases.get(key, (key, x)) for key, x in options.items())
    options |= {"mask": Mask(window_size=20, num_sink_tokens=2), "at": Tokens(None, ids)}

    @cases.quick_jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights = kernels.attention_rows(q, k, rows, **options)
        by_rows = jnp.einsum("bhrs,bshv->brhv", weights, jnp.repeat(v, 2, axis=2))
        return by_rows, kernels.attention(q, k, v, **options)[:, rows]

    assert_close(*both(*(inputs[name] for name in "qkv")))


@cache
def _short_conv(implementation: str, activation: str | None) -> Any:
    @cases.quick_jit
    def run(inputs: dict[str, jax.Array], segment_ids: jax.Array | None) -> Any:
        def outputs(inputs: dict[str, jax.Array]) -> Any:
            return kernels.short_conv(
                **inputs, activation=activation, at=Tokens(None, segment_ids), implementation=implementation
            )

        return cases.with_gradients(outputs, inputs)

    return run


def _conv_inputs(length: int, width: int, dtype: str = "float32") -> dict[str, jax.Array]:
    rng = np.random.default_rng(length)
    shapes = {"x": (2, length, 6), "weight": (width, 6), "bias": (6,), "initial_state": (2, width - 1, 6)}
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("length", "width", "layout"), [(1, 4, None), (2, 4, None), (65, 4, "several"), (64, 1, None), (9, 4, "long")], ids=_ids
)
@pytest.mark.parametrize("implementation", TESTED["short_conv"])
def test_short_conv_matches_reference(implementation: str, length: int, width: int, layout: str | None, dtype: str):
    args = (_conv_inputs(length, width, dtype), None if layout is None else cases.segments(length, layout))
    plain, activation = _short_conv("reference", "silu" if width > 1 else None), "silu" if width > 1 else None
    got = _short_conv(implementation, activation)(*args)
    assert_tree_close(got, in_float64(plain, *args), plain(*args), dtype=dtype)


def test_short_conv_packed_equals_separate():
    inputs = _conv_inputs(20, 4)
    ids = jnp.asarray(np.repeat([1, 2, 3], [9, 1, 10])[None].repeat(2, 0))

    @cases.quick_jit
    def run(x, weight, bias, initial_state):
        first = kernels.short_conv(x[:, :9], weight, bias=bias, initial_state=initial_state)
        last = kernels.short_conv(x[:, 10:], weight, bias=bias)
        return kernels.short_conv(x, weight, bias=bias, initial_state=initial_state, at=Tokens(None, ids)), first, last

    (y, state), (first, _), (last, last_state) = run(**inputs)
    assert_close(y[:, :9], first)
    assert_close(y[:, 10:], last)
    assert_close(state, last_state)


def test_short_conv_steps_equal_one_call():
    inputs = _conv_inputs(7, 4)
    run = cases.quick_jit(lambda x, state: kernels.short_conv(x, inputs["weight"], bias=inputs["bias"], initial_state=state))
    state = inputs["initial_state"]
    whole, whole_state = run(inputs["x"], state)
    for t in range(7):
        y, state = run(inputs["x"][:, t : t + 1], state)
        assert_close(y, whole[:, t : t + 1])
    assert_close(state, whole_state)


@cache
def _cross_entropy(implementation: str, soft_cap: float | None) -> Any:
    @cases.quick_jit
    def run(inputs: dict[str, jax.Array], targets: jax.Array, loss_mask: jax.Array) -> Any:
        def outputs(inputs: dict[str, jax.Array]) -> Any:
            return kernels.cross_entropy(
                **inputs,
                targets=targets,
                loss_mask=loss_mask,
                logit_soft_cap=soft_cap,
                chunk_size=16,
                implementation=implementation,
            )

        return cases.with_gradients(outputs, inputs)

    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("length", [1, 37])
@pytest.mark.parametrize("implementation", TESTED["cross_entropy"])
def test_cross_entropy_matches_reference(implementation: str, length: int, soft_cap: float | None, dtype: str):
    rng = np.random.default_rng(length)
    inputs = {
        "hidden": jnp.asarray(rng.standard_normal((2, length, 8)), dtype),
        "weight": jnp.asarray(rng.standard_normal((8, 50)), dtype),
    }
    loss_mask = jnp.asarray(rng.random((2, length)) > 0.3).at[0, 0].set(True)
    targets = jnp.where(loss_mask, jnp.asarray(rng.integers(0, 50, (2, length))), -100)
    args = (inputs, targets, loss_mask)
    plain, got = _cross_entropy("reference", soft_cap), _cross_entropy(implementation, soft_cap)(*args)
    assert all(x.dtype == jnp.float32 for x in got["value"])
    assert_tree_close(got, in_float64(plain, *args), plain(*args), dtype=dtype)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
