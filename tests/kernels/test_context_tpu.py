"""The TPU kernels on parts of sequences, interpreted on two devices: the values and gradients of the reference on one."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels import Mask, SelectedBlocks, Tokens, attention, dispatch, short_conv
from plait.kernels.sharding import splitting
from plait.kernels.target import target
from plait.tests.kernels import cases
from plait.tests.kernels.test_context import arrays, mesh_of, segment_ids
from plait.tests.suites import usually
from plait.tests.tolerances import assert_close

pltpu = pytest.importorskip("jax.experimental.pallas.tpu")
LENGTH = 128
IDS = segment_ids([[10, 90, 28]])


def case(name: str) -> tuple[Any, dict[str, jax.Array]]:
    """A function of (inputs, implementation) and its inputs."""
    if name in ("causal", "window", "ring"):
        mask = Mask(window_size=40) if name == "window" else Mask()
        inputs = arrays(q=(1, LENGTH, 2, 8), k=(1, LENGTH, 1, 8), v=(1, LENGTH, 1, 8))
        return lambda x, how: {"o": attention(**x, mask=mask, at=Tokens(None, IDS), implementation=how)}, inputs
    if name == "selected":
        blocks = jnp.asarray(np.random.default_rng(4).integers(-1, 6, (1, LENGTH, 2, 2)), jnp.int32)
        options = {"mask": Mask(), "selected": SelectedBlocks(indices=blocks, block_size=16, num_blocks=6)}
        inputs = arrays(q=(1, LENGTH, 4, 8), k=(1, LENGTH, 2, 8), v=(1, LENGTH, 2, 8))
        return lambda x, how: {"o": attention(**x, at=Tokens(None, IDS), implementation=how, **options)}, inputs
    if name == "short_conv":
        call = partial(short_conv, at=Tokens(None, IDS))
        return lambda x, how: {"y": call(**x, implementation=how)[0]}, arrays(x=(1, LENGTH, 8), weight=(4, 8))
    op = cases.RECURRENCES[name]
    inputs = {key: x if key == "weight" else x[:1] for key, x in op.inputs(LENGTH, decay="weak").items()}
    return lambda x, how: dict(zip(("o", "state"), op.call(x, at=Tokens(None, IDS), implementation=how))), inputs


@pytest.mark.parametrize(
    "name",
    usually(
        ["causal", "ring", "selected", "gated_deltanet", "window", "short_conv", "vector_decay"],
        "causal",
        "ring",
        "selected",
        "gated_deltanet",
        newest=("gated_deltanet",),
    ),
)
def test_kernels_on_parts(name: str):
    function, inputs = case(name)
    alone = cases.quick_jit(partial(cases.with_gradients, lambda x: function(x, "reference")))(inputs)
    dispatch._chosen.clear()
    exchange = "ring" if name == "ring" else "gather"
    with (
        splitting(mesh_of(context=2), batch=("data",), heads=("tensor",), context=("context",), exchange=exchange),
        pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()),
        target("v5e"),
    ):
        found = cases.quick_jit(partial(cases.with_gradients, lambda x: function(x, "pallas_tpu")))(inputs)
        found = jax.block_until_ready(found)
    assert set(dispatch.chosen().values()) == {"pallas_tpu"}
    for (path, got), want in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(alone), strict=True):
        assert jnp.isfinite(got).all()
        assert_close(got, want, err_msg=jax.tree_util.keystr(path))
