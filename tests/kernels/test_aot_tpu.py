"""The TPU attention kernels through the real compiler, ahead of time, for several generations; needs libtpu and no TPU."""

import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from plait.kernels import Mask, PowerMask, SelectedBlocks, Tokens, attention, column_mass, index_divergence, routed_attention
from plait.kernels.chips import CHIPS
from plait.kernels.target import target

pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu: pip install 'plait[aot]'")

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
SCOPED_VMEM = {"v5e": 16 << 20, "v5p": 16 << 20, "v6e": 32 << 20, "tpu7x": 32 << 20}
"""Default limits, in bytes."""


@pytest.fixture(autouse=True)
def quiet_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No metadata server, and several processes at once."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    assert os.environ["JAX_PLATFORMS"] == "cpu"


def compiled_kernels(generation: str, loss: Any, *shapes: tuple[tuple[int, ...], Any]) -> dict[str, int]:
    """The Pallas calls in the gradient of `loss`, or in what it computes if that is no scalar, compiled for a generation: VMEM by name."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation]).devices[0]
    args = [jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device)) for shape, dtype in shapes]
    floating = tuple(i for i, (_, dtype) in enumerate(shapes) if jnp.issubdtype(dtype, jnp.floating))
    with target(generation):
        function = jax.grad(loss, floating) if jax.eval_shape(loss, *args).ndim == 0 else loss
        text = jax.jit(function).lower(*args).compile().as_text()
    found = {}
    for line in text.splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            name = re.search(r"((?:attention|chosen_tokens|mean|index)_[a-z_]*[a-z])", line)
            vmem = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1".*?"size":"(\d+)"', line)
            assert name is not None
            found[name[1]] = int(vmem[1]) if vmem else 0
    return found


def _inputs(length: int, head_dim: int, num_heads: int = 4, num_kv_heads: int = 2) -> list[tuple[tuple[int, ...], Any]]:
    heads = lambda n: ((1, length, n, head_dim), jnp.bfloat16)
    return [heads(num_heads), heads(num_kv_heads), heads(num_kv_heads), ((1, length), jnp.int32)]


def _check(found: dict[str, int], generation: str = "v5e") -> None:
    assert set(found) == {"attention_forward", "attention_gradients"}
    assert max(found.values()) <= SCOPED_VMEM[generation]


@pytest.mark.parametrize(
    ("generation", "length", "head_dim"),
    [
        ("v5e", 4096, 64),
        ("v5e", 32768, 128),
        *(pytest.param(generation, 32768, 128, marks=pytest.mark.slow) for generation in TOPOLOGIES if generation != "v5e"),
    ],
)
def test_attention_compiles(generation: str, length: int, head_dim: int):
    stats = head_dim == 128

    def loss(q, k, v, segment_ids):
        out = attention(q, k, v, mask=Mask(), at=Tokens(None, segment_ids), return_stats=stats, implementation="pallas_tpu")
        o, rows = out if stats else (out, None)
        return jnp.sum(o.astype(jnp.float32)) + (0 if rows is None else jnp.sum(rows.entropy) + jnp.sum(rows.first_mass))

    _check(compiled_kernels(generation, loss, *_inputs(length, head_dim)), generation)


@pytest.mark.parametrize(
    ("mask", "head_dim", "options"),
    [
        (Mask(window_size=512, num_sink_tokens=4), 256, {}),
        (Mask(causal=False), 96, {"normalizer": "sigmoid", "sigmoid_bias": -8.0}),
        (PowerMask(block_size=1024, window_size=512), 128, {"return_stats": True}),
        (Mask(window_size=64, dilation=4), 192, {}),
        (Mask(), 128, {"logit_soft_cap": 30.0, "return_stats": True}),
        pytest.param(Mask(), 256, {"logit_soft_cap": 30.0, "return_stats": True}, marks=pytest.mark.slow),
        pytest.param(Mask(), 256, {"normalizer": "sigmoid", "sigmoid_bias": -8.0, "return_stats": True}, marks=pytest.mark.slow),
    ],
    ids=["window", "sigmoid", "power", "dilated", "soft-cap", "soft-cap-wide", "sigmoid-statistics-wide"],
)
def test_masks_compile(mask: Mask, head_dim: int, options: dict[str, Any]):
    def loss(q, k, v, segment_ids):
        o: Any = attention(q, k, v, mask=mask, at=Tokens(None, segment_ids), implementation="pallas_tpu", **options)
        return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(o))

    _check(compiled_kernels("v5e", loss, *_inputs(4096, head_dim)))


@pytest.mark.slow
@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_windows_compile_in_grown_tiles(generation: str):
    def loss(q, k, v, segment_ids):
        o = attention(q, k, v, mask=Mask(window_size=1152), at=Tokens(None, segment_ids), implementation="pallas_tpu")
        return jnp.sum(o.astype(jnp.float32))

    _check(compiled_kernels(generation, loss, *_inputs(32768, 128)), generation)


@pytest.mark.parametrize(
    ("generation", "length", "heads", "choices", "size", "dim", "dtype"),
    [
        ("v5e", 4096, (4, 2), 2, 64, 128, jnp.bfloat16),
        ("v5e", 4096, (16, 1), 1, 64, 64, jnp.bfloat16),
        ("v5e", 4096, (2, 2), 2, 1024, 128, jnp.float32),
        *(
            pytest.param(generation, length, *of, 128, jnp.bfloat16, marks=pytest.mark.slow)
            for generation in TOPOLOGIES
            for length in (32768, 131072)
            for of in (((16, 1), 1, 64), ((8, 8), 8, 512))
        ),
        *(
            pytest.param(generation, 8192, (16, 4), 4, 64, 256, dtype, marks=pytest.mark.slow)
            for generation in TOPOLOGIES
            for dtype in (jnp.bfloat16, jnp.float32)
        ),
        *(pytest.param(generation, 32768, (2, 2), 2, 512, 80, jnp.bfloat16, marks=pytest.mark.slow) for generation in TOPOLOGIES),
    ],
)
def test_selected_blocks_compile(
    generation: str, length: int, heads: tuple[int, int], choices: int, size: int, dim: int, dtype: Any
):
    def loss(q, k, v, segment_ids, indices):
        selected = SelectedBlocks(indices=indices, block_size=size, num_blocks=length // size)
        at = Tokens(None, segment_ids)
        o, stats = attention(q, k, v, mask=Mask(), at=at, selected=selected, return_stats=True, implementation="pallas_tpu")
        return jnp.sum(o.astype(jnp.float32)) + jnp.sum(stats.entropy)

    (q, _), (k, _), _, ids = _inputs(length, dim, *heads)
    shapes = [(q, dtype), (k, dtype), (k, dtype), ids, ((1, length, choices, 16), jnp.int32)]
    found = compiled_kernels(generation, loss, *shapes)
    assert set(found) == {"attention_forward", "attention_gradients"}
    assert found["attention_forward"] <= SCOPED_VMEM[generation]
    assert found["attention_gradients"] <= CHIPS[generation].vector_memory  # where sums of keys may stay


@pytest.mark.parametrize(
    ("generation", "length", "heads", "dims"),
    [
        ("v5e", 4096, 16, (576, 512)),
        *(
            pytest.param(generation, *of, marks=pytest.mark.slow)
            for generation in TOPOLOGIES
            for of in ((4096, 128, (576, 512)), (32768, 16, (576, 512)), (4096, 16, (128, 128)))
        ),
        *(pytest.param(large, 131072, 16, (576, 512), marks=pytest.mark.slow) for large in ("v5p", "tpu7x")),
    ],
)
def test_chosen_tokens_compile(generation: str, length: int, heads: int, dims: tuple[int, int]):
    def loss(q, k, segment_ids, indices):
        selected = SelectedBlocks(indices=indices, block_size=1, num_blocks=length)
        options = {"mask": Mask(), "at": Tokens(None, segment_ids), "selected": selected, "implementation": "pallas_tpu"}
        o, stats = attention(q, k, value_dim=dims[1], return_stats=True, **options)
        return jnp.sum(o.astype(jnp.float32)) + jnp.sum(stats.entropy)

    q, k = ((1, length, n, dims[0]) for n in (heads, 1))
    shapes = [(q, jnp.bfloat16), (k, jnp.bfloat16), ((1, length), jnp.int32), ((1, length, 1, 2048), jnp.int32)]
    assert set(compiled_kernels(generation, loss, *shapes)) == {"chosen_tokens_forward", "chosen_tokens_gradients"}


@pytest.mark.parametrize(
    ("generation", "length", "chosen", "alone"),
    [
        ("v5e", 4096, 128, False),
        *(
            pytest.param(name, length, 2048, alone, marks=pytest.mark.slow)
            for name in TOPOLOGIES
            for length in (4096, 32768)
            for alone in (False, True)
        ),
        *(
            pytest.param(large, 131072, 2048, alone, marks=pytest.mark.slow)
            for large in ("v5p", "tpu7x")
            for alone in (False, True)
        ),
    ],
)
def test_divergence_over_chosen_tokens_compiles(generation: str, length: int, chosen: int, alone: bool):
    """`alone` it makes the normalisers that else attention tells."""

    def loss(index_q, index_k, weights, q, k, segment_ids, indices, lse=None):
        selected = SelectedBlocks(indices=indices, block_size=1, num_blocks=length)
        q, k = jax.lax.stop_gradient((q, k))
        options = {"mask": Mask(), "at": Tokens(None, segment_ids), "selected": selected, "implementation": "pallas_tpu"}
        return index_divergence(index_q, index_k, weights, q, k, lse=lse, **options).sum()

    heads = 128 if length <= 4096 else 32
    wide = [(1, length, 64, 128), (1, length, 128), (1, length, 64), (1, length, heads, 576), (1, length, 1, 576)]
    shapes = [*((shape, jnp.bfloat16) for shape in wide), ((1, length), jnp.int32), ((1, length, 1, chosen), jnp.int32)]
    normalizers = [] if alone else [((1, length, heads), jnp.float32)]
    found = compiled_kernels(generation, loss, *shapes, *normalizers)
    of_loss = {"mean_weights", "index_scores", "index_scores_gradients"}
    assert set(found) == of_loss | ({"chosen_tokens_forward"} if alone else set())


def test_routed_attention_compiles():
    def loss(q, k, v, segment_ids, active):
        o = routed_attention(q, k, v, active, mask=Mask(), at=Tokens(None, segment_ids), implementation="pallas_tpu")
        return jnp.sum(o.astype(jnp.float32))

    _check(compiled_kernels("v5e", loss, *_inputs(4096, 128), ((1, 4096, 4), jnp.bool_)))


def test_column_mass_compiles():
    def masses(q, k, lse, segment_ids):
        return column_mass(q, k, lse, mask=Mask(), at=Tokens(None, segment_ids), implementation="pallas_tpu")

    q, k, _, ids = _inputs(4096, 128)
    found = compiled_kernels("v5e", masses, q, k, ((1, 4096, 4), jnp.float32), ids)
    assert set(found) == {"attention_column_mass"}
    assert found["attention_column_mass"] <= SCOPED_VMEM["v5e"]
