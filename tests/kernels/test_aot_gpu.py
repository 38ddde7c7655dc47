"""The GPU kernels through ptxas, ahead of time, for Hopper; needs JAX's CUDA plugin and no GPU."""

import importlib.util
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from plait import kernels
from plait.kernels import Mask, gpu
from plait.kernels.masks import PowerMask, SelectedBlocks
from plait.kernels.target import target
from plait.tests.kernels.gpu_targets import TARGETS

pytestmark = [
    pytest.mark.newest,
    pytest.mark.skipif(jax.__version_info__ < gpu.MIN_JAX, reason=f"compiling needs JAX >= {'.'.join(map(str, gpu.MIN_JAX))}"),
    pytest.mark.skipif(
        not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)), reason="compiling needs JAX's CUDA plugin"
    ),
]


def _on(generation: str) -> NamedSharding:
    """Where arrays of a program for one GPU live."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=generation, topology="1x1x1", target_config=TARGETS[generation]
    )
    return NamedSharding(Mesh(np.array(topology.devices), ("d",), axis_types=(AxisType.Auto,)), PartitionSpec())


def _reports(out: str) -> dict[str, str]:
    """What ptxas says of each kernel, by name."""
    parts = re.split(r"Compiling entry function '(\w+?)_mosaic_gpu_kernel'", out)
    return {parts[i]: parts[i - 1].rsplit("bytes gmem", 1)[-1] + parts[i + 1] for i in range(1, len(parts), 2)}


MAX_SPILL = 64
"""Bytes stored and loaded, of kernels with statistics where blocks or tokens are selected."""

KERNELS = {"attention_forward", "attention_query_gradients", "attention_key_gradients"}


@pytest.mark.parametrize(
    ("generation", "length", "dims", "normalizer", "stats"),
    [
        ("h100", 4096, (64, 64), "softmax", True),
        ("h100", 4096, (128, 128), "softmax", False),
        ("h200", 32768, (128, 128), "softmax", True),
        pytest.param("h200", 32768, (64, 64), "softmax", False, marks=pytest.mark.slow),
        pytest.param("h100", 4096, (192, 128), "softmax", True, marks=pytest.mark.slow),
        pytest.param("h100", 4096, (64, 64), "sigmoid", True, marks=pytest.mark.slow),
        pytest.param("h100", 4096, (128, 128), "sigmoid", True, marks=pytest.mark.slow),
        pytest.param("h100", 4096, (256, 256), "softmax", True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_attention_compiles(
    generation: str, length: int, dims: tuple[int, int], normalizer: str, stats: bool, monkeypatch: pytest.MonkeyPatch, capfd: Any
):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    options = {"normalizer": normalizer, "sigmoid_bias": -8.0 if normalizer == "sigmoid" else None}
    _assert_compiles(generation, length, dims, stats, capfd, **options)


@pytest.mark.parametrize(
    ("dims", "normalizer"),
    [
        ((128, 128), "softmax"),
        pytest.param((64, 64), "softmax", marks=pytest.mark.slow),
        pytest.param((192, 128), "softmax", marks=pytest.mark.slow),
        pytest.param((256, 256), "softmax", marks=pytest.mark.slow),
        pytest.param((64, 64), "sigmoid", marks=pytest.mark.slow),
        pytest.param((128, 128), "sigmoid", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_capped_attention_compiles(dims: tuple[int, int], normalizer: str, monkeypatch: pytest.MonkeyPatch, capfd: Any):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    options = {"normalizer": normalizer, "sigmoid_bias": -8.0 if normalizer == "sigmoid" else None}
    _assert_compiles("h100", 4096, dims, True, capfd, logit_soft_cap=30.0, **options)


@pytest.mark.parametrize(
    ("generation", "length", "num_heads", "choices", "size"),
    [
        ("h100", 4096, (16, 1), 1, 64),
        *(
            pytest.param(generation, length, *of, marks=pytest.mark.slow)
            for generation in ("h100", "h200")
            for length in (32768, 131072)
            for of in (((16, 1), 1, 64), ((8, 8), 8, 512))
        ),
    ],
    ids=str,
)
def test_selected_blocks_compile(
    generation: str,
    length: int,
    num_heads: tuple[int, int],
    choices: int,
    size: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
):
    """The shapes of NSA and of MoBA."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    _assert_compiles(generation, length, (128, 128), True, capfd, num_heads=num_heads, chosen=(choices, size))


def _assert_compiles(
    generation: str,
    length: int,
    dims: tuple[int, int],
    stats: bool,
    capfd: Any,
    *,
    num_heads: tuple[int, int] = (8, 2),
    chosen: tuple[int, int] | None = None,
    **options: Any,
) -> None:
    """The three kernels compile, and ptxas reports no spill. `chosen`: heads that select blocks, of so many tokens, sixteen each; then
    a few registers may spill."""
    where = _on(generation)
    shape = lambda *dims, dtype: jax.ShapeDtypeStruct((1, length, *dims), dtype, sharding=where)
    q, k, v = (shape(n, dim, dtype=jnp.bfloat16) for n, dim in zip((*num_heads, num_heads[1]), (dims[0], *dims)))
    heads, size = chosen or (1, 64)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, indices: jax.Array) -> jax.Array:
        selected = SelectedBlocks(indices=indices, block_size=size, num_blocks=length // size) if chosen else None
        at, more = kernels.Tokens(None, segment_ids), {"selected": selected, "return_stats": stats, **options}
        out = kernels.attention(q, k, v, mask=Mask(), at=at, implementation="pallas_gpu", **more)
        o, *rows = out if stats else (out,)
        return jnp.sum(o.astype(jnp.float32)) + sum(jnp.sum(x.entropy) for x in rows)

    of_tokens = shape(dtype=jnp.int32), shape(heads, 16, dtype=jnp.int32)
    with target(generation):
        jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v, *of_tokens).compile()
    _assert_assembled(generation, KERNELS, MAX_SPILL if chosen else 0, capfd)


def _assert_assembled(generation: str, names: set[str], spills: int, capfd: Any) -> None:
    """ptxas reports of these kernels, none of which spills more bytes, or for H200 of none: H100's, which are the same, are not assembled
    again."""
    captured = capfd.readouterr()
    reports = _reports(captured.out + captured.err)
    assert set(reports) == names or (generation == "h200" and not reports)
    for name, report in reports.items():
        assert "serialized" not in report, f"{name}: {report}"
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", report)))
        assert spilled <= spills, f"{name}: {report}"


@pytest.mark.parametrize(
    ("generation", "length", "num_heads", "dims", "own_values"),
    [
        ("h100", 4096, (128, 1), (576, 512), False),
        *(
            pytest.param(generation, length, (heads, 1), (576, 512), False, marks=pytest.mark.slow)
            for generation in ("h100", "h200")
            for length in (4096, 32768, 131072)
            for heads in (16, 128)
            if (generation, length, heads) != ("h100", 4096, 128)
        ),
        pytest.param("h100", 4096, (16, 2), (128, 128), True, marks=pytest.mark.slow),
        pytest.param("h100", 4096, (16, 2), (80, 64), True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_chosen_tokens_compile(
    generation: str,
    length: int,
    num_heads: tuple[int, int],
    dims: tuple[int, int],
    own_values: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
):
    """The shapes of DSA, whole and in parts of its heads, and of DMA; 2,048 tokens."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    where = _on(generation)
    shape = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((1, length, *dims), dtype, sharding=where)
    heads, groups = num_heads
    arrays = {"q": shape(heads, dims[0]), "k": shape(groups, dims[0])} | ({"v": shape(groups, dims[1])} if own_values else {})

    def loss(arrays: dict[str, jax.Array], segment_ids: jax.Array, indices: jax.Array) -> jax.Array:
        o, rows = kernels.attention(
            **arrays,
            value_dim=None if own_values else dims[1],
            mask=Mask(),
            at=kernels.Tokens(None, segment_ids),
            selected=SelectedBlocks(indices=indices, block_size=1, num_blocks=length),
            return_stats=True,
            implementation="pallas_gpu",
        )
        return jnp.sum(o.astype(jnp.float32)) + jnp.sum(rows.entropy)

    with target(generation):
        jax.jit(jax.grad(loss)).lower(arrays, shape(dtype=jnp.int32), shape(groups, 2048, dtype=jnp.int32)).compile()
    _assert_assembled(generation, {"chosen_tokens_forward", "chosen_tokens_gradients"}, MAX_SPILL, capfd)


@pytest.mark.parametrize(
    "mask", [Mask(causal=False, window_size=30, right_window_size=5), Mask(window_size=4, dilation=7)], ids=str
)
def test_attention_with_other_masks_compiles(mask: Mask):
    _compile_forward(mask, None)


@pytest.mark.parametrize("block_size", [64, 5])
def test_attention_with_power_mask_and_selected_blocks_compiles(block_size: int):
    _compile_forward(PowerMask(block_size=block_size, window_size=5, num_sink_tokens=3), 32)


def _compile_forward(mask: Mask, size: int | None) -> None:
    x = jax.ShapeDtypeStruct((1, 512, 2, 64), jnp.bfloat16, sharding=_on("h100"))
    indices = jnp.zeros((1, 512, 1, 3), jnp.int32)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        selected = None if size is None else SelectedBlocks(indices=indices, block_size=size, num_blocks=512 // size)
        return kernels.attention(q, k, v, mask=mask, selected=selected, implementation="pallas_gpu")

    with target("h100"):
        jax.jit(attend).lower(x, x, x).compile()
