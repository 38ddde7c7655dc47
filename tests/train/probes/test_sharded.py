"""Probes of weights, gates and states on a mesh: the numbers of one device."""

import jax
import numpy as np
import pytest

from plait.configs.mesh import MeshConfig
from plait.configs.probe import ProbeConfig
from plait.tests.models.common import quick_jit
from plait.tests.tolerances import assert_close
from plait.tests.train.common import changed, hybrid, program_of, random_batch
from plait.train.mesh import batch_sharding
from plait.train.probes.base import Probes
from plait.train.step import make_step

PROBES = ProbeConfig(only="representations,spectral,state_rank,gates,head_load,residual,value_drain")


def statistics(**mesh):
    """Those of a step's layers."""
    config = changed(hybrid(), {"mesh": MeshConfig(data=1, **mesh)})
    setup = program_of(config, devices=int(np.prod(list(mesh.values()), initial=1)))
    step = quick_jit(make_step(setup.blueprint, setup.tx, setup.mesh, Probes(PROBES)), out_shardings=(setup.shardings, None))
    length = config.data.seq_len
    batch = jax.device_put(random_batch(4, length), batch_sharding(setup.mesh, 4, length, 1))
    return step(setup.fresh(), batch)[1]["statistics"]


@pytest.fixture(scope="module")
def alone(compile_cache):
    return statistics()


@pytest.mark.parametrize(
    "mesh", [{"fsdp": 2, "tensor": 2}, pytest.param({"context": 2}, marks=pytest.mark.slow)], ids=["weights", "tokens"]
)
def test_statistics_are_those_of_one_device(mesh, alone):
    names = set()
    for got, want in zip(statistics(**mesh), alone, strict=True):
        assert got.keys() == want.keys()
        for name in want:
            names.add(name)
            np.testing.assert_array_equal(np.isnan(got[name]), np.isnan(want[name]), err_msg=name)
            assert_close(np.nan_to_num(got[name]), np.nan_to_num(want[name]), err_msg=name)
    assert {"token_similarity", "token_rank", "spectral_norm", "logit_norm", "entropy_bound", "state_rank", "decay_gate"} <= names
