"""The TPU kernels of the linear recurrences through the real compiler, ahead of time; needs libtpu and no TPU."""

import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from plait.kernels import Tokens
from plait.kernels.target import target
from plait.tests.kernels import cases

pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu: pip install 'jax[tpu]'")

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
SCOPED_VMEM = 16 << 20
FEW = [
    ("v5e", "scalar_decay", 64, 4096, "bfloat16"),
    ("v5p", "vector_decay", 128, 32768, "bfloat16"),
    ("v6e", "kda", 128, 4096, "bfloat16"),
]
ALL = [
    (generation, name, width, length, "bfloat16")
    for generation in TOPOLOGIES
    for name in cases.WITH_KERNELS
    for width in (64, 128)
    for length in (4096, 32768)
]
WIDE = [
    ("v5e", name, width, 4096, dtype)
    for name in cases.WITH_KERNELS
    for width, dtype in ((256, "bfloat16"), (64, "float32"), (128, "float32"), (256, "float32"))
]


@pytest.fixture(autouse=True)
def quiet_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No metadata server, and several processes at once."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    assert os.environ["JAX_PLATFORMS"] == "cpu"


def vmem_of_kernels(generation: str, name: str, width: int, length: int, dtype: str, group: int = 2) -> dict[str, int]:
    """Compiles values and gradients, with segments and value groups; the scoped VMEM in bytes of each kernel."""
    recurrence = cases.RECURRENCES[name]
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation]).devices[0]
    shape = lambda *s, dtype=dtype: jax.ShapeDtypeStruct(s, dtype, sharding=SingleDeviceSharding(device))
    inputs = {"q": shape(1, length, 2, width), "k": shape(1, length, 2, width), "v": shape(1, length, 2 * group, width)}
    if recurrence.g is not None:
        inputs["g"] = shape(1, length, 2 * group, *((width,) if recurrence.g == "vector" else ()), dtype=jnp.float32)
    if recurrence.beta:
        inputs["beta"] = shape(1, length, 2 * group)

    def loss(inputs: dict[str, jax.Array], segment_ids: jax.Array) -> Any:
        o, state = recurrence.call(inputs, at=Tokens(None, segment_ids), implementation="pallas_tpu")
        return jnp.sum(o.astype(jnp.float32)) + jnp.sum(state)

    with target(generation):
        text = jax.jit(jax.grad(loss)).lower(inputs, shape(1, length, dtype=jnp.int32)).compile().as_text()
    used = {}
    for line in text.splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            vmem = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1".*?"size":"(\d+)"', line)
            used[re.search(r"(forward|backward)", line)[0]] = int(vmem[1])
    return used


def _assert_compiles(case: tuple[str, str, int, int, str]) -> None:
    used = vmem_of_kernels(*case)
    assert set(used) == {"forward", "backward"}
    assert max(used.values()) <= SCOPED_VMEM


@pytest.mark.parametrize("case", FEW, ids=str)
def test_recurrence_compiles(case: tuple[str, str, int, int, str]):
    _assert_compiles(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in ALL + WIDE if case not in FEW], ids=str)
def test_recurrence_compiles_everywhere(case: tuple[str, str, int, int, str]):
    _assert_compiles(case)
