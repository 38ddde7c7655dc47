"""Cross entropy through the real compilers, ahead of time, for TPUs and GPUs; needs libtpu or the CUDA plugin, and neither chip."""

import os
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from plait.kernels import cross_entropy
from plait.kernels.cross_entropy import pallas_tpu
from plait.kernels.target import target

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
SCOPED_VMEM = 16 << 20


@pytest.fixture(autouse=True)
def quiet_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No metadata server, and several processes at once."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    assert os.environ["JAX_PLATFORMS"] == "cpu"


def _vmem(text: str) -> list[int]:
    """Scoped VMEM of each kernel in a compiled program, in bytes."""
    kernels = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    pattern = r'"used_scoped_memory_configs":\[\{"memory_space":"1".*?"size":"(\d+)"'
    return [int(re.search(pattern, line)[1]) for line in kernels]


@pytest.mark.parametrize(
    ("generation", "width", "vocabulary", "dtype"),
    [
        ("v5e", 1024, 50_257, "bfloat16"),
        ("v5e", 2048, 50_304, "bfloat16"),
        ("v5e", 8192, 128_256, "bfloat16"),
        ("v5e", 4096, 32_000, "float32"),
        ("v5p", 2048, 50_257, "bfloat16"),
        ("v6e", 16_384, 32_000, "bfloat16"),
    ],
)
def test_tpu_kernel_compiles(generation: str, width: int, vocabulary: int, dtype: str):
    shape = _shapes(generation)
    operands = shape(40_001, width, dtype=dtype), shape(width, vocabulary, dtype=dtype), shape(40_001, dtype=jnp.int32)
    tiles = pallas_tpu.choose_tiles(generation, width, dtype)
    compiled = jax.jit(lambda *x: pallas_tpu.forward(*x, 30.0, tiles)).lower(*operands).compile()
    (vmem,) = _vmem(compiled.as_text())
    assert vmem <= SCOPED_VMEM


def test_tpu_gradients_compile_and_hold_no_logits():
    shape = _shapes("v5e")
    operands = shape(4, 2001, 1024), shape(1024, 50_257), shape(4, 2001, dtype=jnp.int32)

    def loss(hidden: jax.Array, weight: jax.Array, targets: jax.Array) -> jax.Array:
        nll, lse = cross_entropy(hidden, weight, targets, logit_soft_cap=30.0, implementation="pallas_tpu")
        return jnp.mean(nll) + 1e-4 * jnp.mean(jnp.square(lse))

    with target("v5e"):
        text = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*operands).compile().as_text()
    assert len(_vmem(text)) == 1
    assert "[8004,50257]" not in text


def _shapes(generation: str):
    pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu: pip install 'jax[tpu]'")
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation]).devices[0]
    where = SingleDeviceSharding(device)
    return lambda *shape, dtype="bfloat16": jax.ShapeDtypeStruct(shape, dtype, sharding=where)
