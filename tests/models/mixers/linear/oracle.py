"""Layers with the weights of a golden file of `generate_maps`."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from plait.models.build import BuildContext
from plait.models.mixers.base import MixerConfig
from plait.tests.models import golden
from plait.tests.models.common import layout, quick_jit
from plait.tests.models.golden.generate_maps import BATCH, HEADS, WIDTH, Arrays
from plait.tests.models.test_oracles import filled
from plait.tests.tolerances import assert_close

HEAD_DIM = WIDTH // HEADS


def read(name: str) -> Arrays:
    """A golden file."""
    with np.load(Path(golden.__path__[0]) / f"{name}.npz") as arrays:
        return dict(arrays)


def dense(arrays: Arrays, **names: str) -> Arrays:
    """Kernels, and biases where there are some, of projections; each by our name from theirs."""
    found = {}
    for ours, theirs in names.items():
        weight = arrays[f"weights/{theirs}.weight"]
        found[f"{ours}.kernel"] = weight.reshape(weight.shape[:2]).T
        if f"weights/{theirs}.bias" in arrays:
            found[f"{ours}.bias"] = arrays[f"weights/{theirs}.bias"]
    return found


def assert_agrees(config: MixerConfig, weights: Arrays, arrays: Arrays, *, causal: bool = True) -> None:
    """Raises AssertionError unless the layer of `config` gives the file's output and input gradient."""
    length = arrays["x"].shape[1]
    at = layout(*[(length,)] * BATCH, length=length)
    graph, state = nnx.split(filled(config.build(WIDTH, BuildContext(rngs=nnx.Rngs(0), seq_len=length, causal=causal)), weights))

    @quick_jit
    def run(state: nnx.State, x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, pull = jax.vjp(lambda x: nnx.merge(graph, state)(x, at=at, carry={}).y, x)
        return y, *pull(cotangent)

    y, dx = run(state, *(jnp.asarray(arrays[name]) for name in ("x", "cotangent")))
    assert_close(y, arrays["output"])
    assert_close(dx, arrays["dx"], err_msg="input gradient")
