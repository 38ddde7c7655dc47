"""Statistics of rows whose weights are tiny, or far apart, and their gradients, against the loop and its finite differences."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels import Mask, Tokens, attention, first_masses
from plait.tests.kernels import cases, loops
from plait.tests.tolerances import assert_close

IDS = np.int32([[0, 0, 1, 1, 1, 1, 0, 2], [1, 1, 1, 1, 1, 2, 2, 0]])
"""Leading padding, padding between, and rows that see one key."""

LEVELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "beside a sink": {"sinks": np.float32([60, 200])},
    "weights below float32": {"sigmoid_bias": np.float32([-150, -60])},
    "far apart": {"far": True},
    "far apart beside a sink": {"far": True, "sinks": np.float32([-9e4, 2e4])},
    "saturated": {"sigmoid_bias": np.float32([30, 5])},
}


def inputs(level: str, dtype: str = "float32", dim: int = 2, heads: int = 2) -> dict[str, jax.Array]:
    """q, k and v by name; where they are `far`, logits are integers of up to some ten thousand, with ties."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((*IDS.shape, n, dim)) for n in (heads, 1, 1))
    if LEVELS[level].get("far"):
        q, k = (64 * np.round(x) for x in (q, k))
    return {name: jnp.asarray(x, dtype) for name, x in zip("qkv", (q, k, v))}


def statistics(run: Callable[..., Any], level: str, x: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """All statistics but the largest logit, which has no derivative at ties; -1e30 as 0."""
    given = LEVELS[level]
    options: dict[str, Any] = {"mask": Mask(), "at": Tokens(None, jnp.asarray(IDS)), "sinks": x.get("sinks")}
    if "sigmoid_bias" in given:
        options |= {"normalizer": "sigmoid", "sigmoid_bias": x["sigmoid_bias"]}
    _, stats = run(x["q"], x["k"], x["v"], return_stats=True, **options)
    found = {name: getattr(stats, name) for name in ("lse", "entropy", "first_mass")}
    if "sigmoid_bias" not in given:
        _, found["lse"] = run(x["q"], x["k"], x["v"], return_lse=True, **options)
    options.pop("sinks")
    found["first_masses"] = first_masses(x["q"], x["k"], stats.lse, first_k=3, **options)
    return {name: jnp.where(a > -1e29, a, 0) for name, a in found.items()}


def by_loop(level: str, x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = loops.attention(x["q"], x["k"], x["v"], IDS, Mask(), sinks=x.get("sinks"), sigmoid_bias=x.get("sigmoid_bias"))
    return {name: np.where(found[name] > -1e29, found[name], 0) for name in ("lse", "entropy", "first_mass", "first_masses")}


def gradients_by_loop(level: str, x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of the sum of waves that `cases.with_gradients` takes, by central differences."""
    wave = lambda a: np.cos(np.arange(a.size) % 97 * 1.7).reshape(a.shape)
    total = lambda x: sum((a * wave(a)).sum() for a in by_loop(level, x).values())
    found = {}
    for name, array in x.items():
        gradient, step = np.zeros(array.shape), 1e-5
        for at in np.ndindex(array.shape):
            moved = [
                {
                    **x,
                    name: array
                    + sign * step * (np.arange(array.size).reshape(array.shape) == np.ravel_multi_index(at, array.shape)),
                }
                for sign in (1, -1)
            ]
            gradient[at] = (total(moved[0]) - total(moved[1])) / (2 * step)
        found[name] = gradient
    return found


def assert_right(run: Callable[..., Any], level: str, dtype: str = "float32", **sizes: int) -> None:
    """`run` is called like `attention`."""
    x = inputs(level, dtype, **sizes) | {name: jnp.asarray(a) for name, a in LEVELS[level].items() if name != "far"}
    exact = {name: np.asarray(a, np.float64) for name, a in x.items()}
    found = cases.with_gradients(partial(statistics, run, level), x)
    for name, want in by_loop(level, exact).items():
        assert_close(found["value"][name], want, dtype=dtype, err_msg=name)
    for name, want in gradients_by_loop(level, exact).items():
        got = np.asarray(found["gradient"][0][name], np.float64)
        assert np.isfinite(got).all(), name
        if name != "v":
            assert_close(got, want, dtype=dtype, err_msg=f"gradient of {name}")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_statistics_are_the_loop_s(implementation: str, level: str):
    assert_right(partial(attention, implementation=implementation), level)


@pytest.mark.parametrize("level", ["beside a sink", "weights below float32"])
def test_statistics_in_bfloat16(level: str):
    assert_right(partial(attention, implementation="chunked"), level, "bfloat16")
