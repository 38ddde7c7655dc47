"""The channelwise scans: every form against loops in float64, segments, states, decays, memory, and parts of sequences."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels import Tokens, linear_scan, selective_scan
from plait.kernels.context import Exchange
from plait.tests.kernels import cases
from plait.tests.kernels.test_context import SEGMENTS, assert_same, mesh_of, segment_ids
from plait.tests.tolerances import assert_close, assert_tree_close, in_float64

BATCH, WIDTH, STATES = 2, 6, 3
DECAYS = {"weak": (-1e-4,), "strong": (-20.0,), "total": (-1e4,), "mixed": (-20.0, -1.0, -0.05, -1e-4)}
LENGTHS = [(1, None, "mixed"), (64, "several", "mixed"), (65, None, "weak"), (65, "left", "total"), (200, "several", "strong")]
Inputs = dict[str, jax.Array]


def inputs(name: str, length: int, decay: str = "mixed", dtype: str = "float32") -> Inputs:
    """Random arguments by name, `start` among them."""
    rng = np.random.default_rng(length)
    normal = lambda *shape: rng.standard_normal(shape)
    rates = lambda *shape: rng.choice(DECAYS[decay], shape) * rng.uniform(0.5, 1, shape)
    named = {"x": jnp.asarray(normal(BATCH, length, WIDTH), dtype)}
    if name == "linear":
        rest = {"g": rates(BATCH, length, WIDTH), "start": normal(BATCH, WIDTH)}
    else:
        rest = {"A": rates(STATES, WIDTH), "start": normal(BATCH, STATES, WIDTH)}
    if name == "selective":
        rest["dt"] = rng.uniform(0.1, 1, (BATCH, length, WIDTH))
        named |= {key: jnp.asarray(normal(BATCH, length, STATES), dtype) for key in "BC"}
    if name == "average":
        rest["C"] = normal(STATES, WIDTH)
    return named | {key: jnp.asarray(x, jnp.float32) for key, x in rest.items()}


def call(name: str, given: Inputs, ids: Any = None, **options: Any) -> dict[str, jax.Array]:
    """Outputs and state by name; `average` is the selective scan without dt and B, and with one C."""
    options |= {"initial_state": given.get("start"), "at": Tokens(None, ids)}
    if name == "linear":
        y, state = linear_scan(given["x"], given["g"], **options)
    else:
        y, state = selective_scan(given["x"], given.get("dt"), given["A"], given.get("B"), given["C"], **options)
    return {"y": y, "state": state}


@cache
def compiled(name: str, implementation: str) -> Any:
    """A function of (inputs, ids) to outputs and gradients."""
    run = partial(call, name, implementation=implementation, chunk_size=16)
    return cases.quick_jit(lambda given, ids: cases.with_gradients(lambda given: run(given, ids), given))


def loop(name: str, given: Inputs, ids: Any) -> dict[str, np.ndarray]:
    """What the scans mean, in float64."""
    a = {key: np.asarray(x, np.float64) for key, x in given.items()}
    y, state, before = np.zeros(a["x"].shape), np.array(a["start"]), [None] * BATCH
    for b, t in np.ndindex(*a["x"].shape[:2]):
        if ids[b, t] == 0:
            continue
        if before[b] not in (None, ids[b, t]):
            state[b] = 0
        before[b] = ids[b, t]
        if name == "linear":
            state[b] = np.exp(a["g"][b, t]) * state[b] + a["x"][b, t]
            y[b, t] = state[b]
            continue
        dt = a["dt"][b, t] if "dt" in a else np.ones(WIDTH)
        for n, d in np.ndindex(STATES, WIDTH):
            written = dt[d] * a["x"][b, t, d] * (a["B"][b, t, n] if "B" in a else 1)
            state[b, n, d] = np.exp(dt[d] * a["A"][n, d]) * state[b, n, d] + written
            y[b, t, d] += (a["C"][n, d] if name == "average" else a["C"][b, t, n]) * state[b, n, d]
    return {"y": y, "state": state}


NAMES = ["linear", "selective", "average"]


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_loop_wherever_segments_and_padding_are(name: str, implementation: str):
    given, ids = inputs(name, 65), cases.segments(65, "several")
    expected = loop(name, given, np.asarray(ids))
    got = compiled(name, implementation)(given, ids)["value"]
    assert_close(got["y"], expected["y"])
    assert_close(got["state"], expected["state"])
    assert not np.asarray(got["y"])[np.asarray(ids) == 0].any()


@pytest.mark.parametrize("case", LENGTHS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_chunks_match_the_reference_and_its_gradients(name: str, case: tuple[int, str | None, str]):
    length, layout, decay = case
    args = inputs(name, length, decay), None if layout is None else cases.segments(length, layout)
    got, plain = compiled(name, "chunked")(*args), compiled(name, "reference")
    assert_tree_close(got, in_float64(plain, *args), plain(*args), dtype="float32")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_inputs_have_float32_states(name: str):
    args = inputs(name, 64, dtype="bfloat16"), cases.segments(64, "several")
    got, plain = compiled(name, "chunked")(*args), compiled(name, "reference")
    assert (got["value"]["y"].dtype, got["value"]["state"].dtype) == (jnp.bfloat16, jnp.float32)
    assert_tree_close(got, in_float64(plain, *args), plain(*args), dtype="bfloat16")


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name: str):
    """Central differences in float64 along a random direction of all arguments at once."""
    given, ids = inputs(name, 37, "weak"), cases.segments(37, "several")
    given = {key: x - 0.3 if key in ("g", "A") else x for key, x in given.items()}
    rng = np.random.default_rng(0)
    along = {key: jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32) for key, x in given.items()}

    @cases.quick_jit
    def both(given: Inputs, along: Inputs) -> tuple[jax.Array, jax.Array]:
        total = lambda given: sum(jnp.sum(jnp.sin(3 * y)) for y in call(name, given, ids, chunk_size=8).values())
        step = lambda size: jax.tree.map(lambda x, d: x + size * d, given, along)
        slope = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (jax.grad(total)(given), along))))
        return slope, (total(step(1e-5)) - total(step(-1e-5))) / 2e-5

    slope, difference = in_float64(both, given, along)
    assert_close(slope, difference, dtype="float32")


@pytest.mark.parametrize("name", NAMES)
def test_steps_equal_one_call(name: str):
    given = inputs(name, 5)
    whole = compiled(name, "chunked")(given, None)["value"]
    state, outputs = given["start"], []
    for t in range(5):
        one = {
            key: x[:, t : t + 1] if key in ("x", "g", "dt", "B") or (key == "C" and x.ndim == 3) else x
            for key, x in given.items()
        }
        y, state = call(name, one | {"start": state}).values()
        outputs.append(y)
    assert_close(jnp.concatenate(outputs, axis=1), whole["y"])
    assert_close(state, whole["state"])


CUTS = [("packed", 2, "gather"), ("padded", 8, "gather"), ("one", 4, "gather"), ("padded", 4, "ring")]


@pytest.mark.parametrize(("segments", "count", "exchange"), CUTS)
@pytest.mark.parametrize("name", NAMES)
def test_parts_of_a_sequence_equal_all_of_it(name: str, segments: str, count: int, exchange: Exchange):
    ids = segment_ids(SEGMENTS[segments])
    function = lambda given: call(name, given, ids, chunk_size=8)
    assert_same(function, inputs(name, 64, "weak"), mesh_of(context=count), exchange=exchange)


@pytest.mark.parametrize("name", NAMES)
def test_memory_of_training_is_linear_in_tokens(name: str):
    """Bytes that a compiled gradient holds."""

    def held(length: int) -> int:
        given = jax.eval_shape(lambda: inputs(name, length))
        loss = lambda given: jnp.sum(jnp.square(call(name, given)["y"]))
        return jax.jit(jax.grad(loss)).lower(given).compile().memory_analysis().temp_size_in_bytes

    assert held(4096) < 2.2 * held(2048)


def test_states_of_all_tokens_never_exist_at_once():
    """Sixteen numbers a channel: what training holds is far less than one of their arrays."""
    length, states, width = 8192, 16, 32
    shape = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    given = [shape(1, length, width), shape(1, length, width), shape(states, width), *[shape(1, length, states)] * 2]
    loss = lambda *given: jnp.sum(jnp.square(selective_scan(*given)[0]))
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4))).lower(*given).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.8 * 4 * length * states * width


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda x, g: linear_scan(x, g[:, :2]), "g.shape=(2, 2, 4) must be [B, T, C] as x = (2, 3, 4)"),
        (lambda x, g: linear_scan(x, -g), "a log decay must be at most 0"),
        (lambda x, g: linear_scan(x, g, initial_state=x), "initial_state.shape=(2, 3, 4) must be [B, C] = (2, 4)"),
        (lambda x, g: linear_scan(x, g, chunk_size=24), "chunk_size=24 must be a power of two"),
        (lambda x, g: linear_scan(x, g, implementation="fast"), "implementation='fast' is unknown"),
        (lambda x, g: selective_scan(x, None, g[0], None, x), "C.shape=(2, 3, 4) must be [B, T, N] or [N, D] = (2, 3, 3)"),
        (lambda x, g: selective_scan(x, x[:1], g[0], None, g[0]), "dt.shape=(1, 3, 4) must be [B, T, D] as x"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(run: Any, message: str):
    with pytest.raises(ValueError) as error:
        run(jnp.zeros((2, 3, 4)), -jnp.ones((2, 3, 4)))
    assert message in str(error.value)
