"""The GPU kernels of the linear recurrences through ptxas, ahead of time, for Hopper; needs JAX's CUDA plugin and no GPU."""

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
from plait.benchmarks.gpu_bytes import programs, traffic
from plait.kernels import Tokens, gpu
from plait.kernels.target import target
from plait.tests.kernels.gpu_targets import TARGETS

pytestmark = [
    pytest.mark.newest,
    pytest.mark.skipif(jax.__version_info__ < gpu.MIN_JAX, reason=f"compiling needs JAX >= {'.'.join(map(str, gpu.MIN_JAX))}"),
    pytest.mark.skipif(
        not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)), reason="compiling needs JAX's CUDA plugin"
    ),
]

BATCH = 2
"""A copy drops an axis of one, and may have five that are more."""

KERNELS = {
    "scalar_decay": {"scores", "carry", "carry_back", "gradients"},
    "vector_decay": {"scores_by_channel", "carry", "carry_back", "gradients_by_channel", "scores_by_channel_back"},
    "gated_deltanet": {"scores", "carry_delta", "carry_delta_back", "gradients_delta"},
    "kda": {
        *("scores_by_channel", "inverse_by_channel", "carry_delta", "carry_delta_back"),
        *("gradients_by_channel_delta", "scores_by_channel_back", "inverse_by_channel_back"),
    },
}
"""The kernels of a gradient, by the recurrence."""


def _loss(name: str, *args: jax.Array) -> jax.Array:
    op = kernels.decay if name.endswith("_decay") else kernels.delta_rule
    *args_of_op, segment_ids = args
    o, state = op(*args_of_op, at=Tokens(None, segment_ids), implementation="pallas_gpu")
    return jnp.sum(o.astype(jnp.float32)) + jnp.sum(state)


@pytest.mark.parametrize(
    ("generation", "length", "dims", "names"),
    [
        ("h100", 4096, (64, 64), ("scalar_decay", "kda")),
        ("h200", 32768, (128, 128), ("vector_decay", "gated_deltanet")),
        pytest.param("h100", 4096, (128, 128), tuple(KERNELS), marks=pytest.mark.slow),
        pytest.param("h100", 32768, (64, 64), tuple(KERNELS), marks=pytest.mark.slow),
        pytest.param("h200", 32768, (128, 128), tuple(KERNELS), marks=pytest.mark.slow),
        pytest.param("h200", 4096, (128, 256), tuple(KERNELS), marks=pytest.mark.slow),
        pytest.param("h100", 4096, (256, 512), tuple(KERNELS), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_recurrences_compile(
    generation: str, length: int, dims: tuple[int, int], names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capfd: Any
):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=generation, topology="1x1x1", target_config=TARGETS[generation]
    )
    mesh = Mesh(np.array(topology.devices), ("d",), axis_types=(AxisType.Auto,))
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    heads = (3, 3) if dims[0] == 256 else (2, 4)
    for name in names:
        qk, v = array(BATCH, length, heads[0], dims[0]), array(BATCH, length, heads[1], dims[1])
        by_channel = name in ("vector_decay", "kda")
        g = array(BATCH, length, heads[1], *dims[:by_channel], dtype=jnp.float32)
        beta = [] if name.endswith("_decay") else [array(*v.shape[:3])]
        args = [qk, qk, v, g, *beta, array(BATCH, length, dtype=jnp.int32)]
        with target(generation):
            both = jax.value_and_grad(lambda *args, name=name: _loss(name, *args), tuple(range(len(args) - 1)))
            jax.jit(both).lower(*args).compile()
    captured = capfd.readouterr()
    reports = _reports(captured.out + captured.err)
    # A kernel of the same shapes is compiled once a process.
    assert {name for name, _ in reports} <= set().union(*(KERNELS[name] for name in names))
    for name, report in reports:
        assert "serialized" not in report, f"{name}: {report}"
        assert ", 0 bytes spill stores, 0 bytes spill loads" in report, f"{name}: {report}"


def _reports(out: str) -> list[tuple[str, str]]:
    """What ptxas says of each kernel, with its name."""
    parts = re.split(r"Compiling entry function '(\w+?)_mosaic_gpu_kernel'", out)
    return [(parts[i], parts[i - 1].rsplit("bytes gmem", 1)[-1] + parts[i + 1]) for i in range(1, len(parts), 2)]


@pytest.mark.parametrize(
    ("op", "dims", "launches", "kilobytes"),
    [
        ("gated_deltanet", (64, 64), (2, 5), (2.2, 6.5)),
        ("vector_decay", (64, 64), (2, 6), (1.7, 5.9)),
        ("gated_deltanet", (256, 512), (2, 4), (5.8, 29.4)),
    ],
)
def test_recurrences_move_few_bytes(op: str, dims: tuple[int, int], launches: tuple[int, int], kilobytes: tuple[float, float]):
    """Launches and bytes a token and head, forward alone and with the backward pass, do not grow."""
    length, heads = 4096, 2
    for program, most, limit in zip(programs(op, *dims, length=length, heads=heads).values(), launches, kilobytes, strict=True):
        found = traffic(program.as_text())
        assert sum(x.kernel for x in found) == most, found
        assert sum(x.num_bytes for x in found) / length / heads / 1000 < limit, found
