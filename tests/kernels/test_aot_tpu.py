"""The TPU kernels through the real compiler, ahead of time, for several generations; needs libtpu and no TPU."""

import os
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from plait.kernels import Mask
from plait.kernels.attention import pallas_tpu
from plait.kernels.target import target

pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu: pip install 'jax[tpu]'")

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
SCOPED_VMEM = 16 << 20


@pytest.fixture(autouse=True)
def quiet_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No metadata server, and several processes at once."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    assert os.environ["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_attention_compiles(generation: str, head_dim: int):
    stats = head_dim == 128
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation]).devices[0]
    where = SingleDeviceSharding(device)
    heads = lambda n: jax.ShapeDtypeStruct((1, 4096, n, head_dim), jnp.bfloat16, sharding=where)  # noqa: E731

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
        o, rows = pallas_tpu.attention(
            q, k, v, mask=Mask(), segment_ids=segment_ids, positions=None, kv_segment_ids=None, kv_positions=None,
            scale=head_dim**-0.5, sinks=None, normalizer="softmax", sigmoid_bias=None, return_stats=stats,
        )  # fmt: skip
        return jnp.sum(o.astype(jnp.float32)) + (jnp.sum(rows.entropy) if stats else 0)

    segment_ids = jax.ShapeDtypeStruct((1, 4096), jnp.int32, sharding=where)
    with target(generation):
        text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(heads(8), heads(2), heads(2), segment_ids).compile().as_text()
    kernels = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    assert {re.search(r"attention_[a-z]+", line)[0] for line in kernels} == {
        f"attention_{x}" for x in ("forward", "query", "key")
    }
    for line in kernels:
        vmem = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1".*?"size":"(\d+)"', line)
        assert int(vmem[1]) <= SCOPED_VMEM
