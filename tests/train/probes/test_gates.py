"""Gates: means and shares by hand, and what every mixer tells of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.kernels import Tokens
from plait.models.build import BuildContext
from plait.models.looks.look import GateValues
from plait.models.mixers.base import MIXERS, HeadMixer
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.deltanet import DeltaNetConfig
from plait.models.mixers.linear.gated_deltanet import GatedDeltaNetConfig
from plait.models.mixers.linear.gla import GLAConfig
from plait.models.mixers.linear.kda import KDAConfig
from plait.models.mixers.moh import MoHConfig
from plait.tests.models.common import layout
from plait.tests.tolerances import assert_close
from plait.tests.train.probes.test_probes import look_at, measure

D_MODEL = 64


def test_gates_by_hand():
    """Two heads; the last token is padding. Ends are 0 and the largest value, 0 alone where there is none."""
    output = np.array([[0.0, 0.5], [0.005, 1.0], [0.995, 0.25], [9, 9]])[None]
    write = np.array([[0.0, 1.0], [1.999, 1.0], [0.03, 1.0], [9, 9]])[None]
    channels = np.array([[[0.001, -8.0]], [[-0.002, 4.0]], [[1.0, 3.0]], [[9, 9]]])[None] * np.ones((1, 1, 2, 1))
    told = lambda values, largest: GateValues(jnp.asarray(values, jnp.float32), largest)
    gates = {"decay": told(output, 1.0), "write": told(write, 2.0), "output": told(channels, None)}
    found = measure("gates", look_at(np.zeros((1, 2, 4, 4)), [[3]], gates=gates))
    assert_close(found["decay_gate"], np.float32([1 / 3, 1.75 / 3]))
    assert_close(found["decay_gate_saturated"], np.float32([1, 1 / 3]))
    assert_close(found["write_gate"], np.float32([2.029 / 3, 1]))
    assert_close(found["write_gate_saturated"], np.float32([2 / 3, 0]))
    assert_close(found["output_gate"], np.full(2, 16.003 / 6, np.float32))
    assert_close(found["output_gate_saturated"], np.full(2, 2 / 6, np.float32))


def test_mixers_without_gates_tell_none():
    assert measure("gates", look_at(np.zeros((1, 2, 4, 4)), [[3]])) == {}
    assert measure("gates", look_at(np.zeros((1, 2, 4, 4)), [[3]], gates={})) == {}


def shown(config):
    """The gates that a mixer of this config tells, as shapes."""
    at = Tokens(*(jax.ShapeDtypeStruct((2, 8), jnp.int32),) * 3)

    def tell(x, at):
        mixer = config.build(D_MODEL, BuildContext(rngs=nnx.Rngs(0), seq_len=8))
        inputs, _ = mixer.project(x, at=at, state=None)
        return {kind: gate.values for kind, gate in mixer.observe(inputs, x, at=at).get("gates", {}).items()}

    return jax.eval_shape(tell, jax.ShapeDtypeStruct((2, 8, D_MODEL), jnp.float32), at)


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (SoftmaxConfig.example(), set()),
        (SoftmaxConfig(num_heads=4, head_dim=16, gate="headwise"), {"output"}),
        (MoHConfig(mixer=SoftmaxConfig(num_heads=4, head_dim=16, gate="elementwise")), {"output"}),
        (GLAConfig.example(), {"decay", "output"}),
        (GatedDeltaNetConfig.example(), {"decay", "write", "output"}),
        (GatedDeltaNetConfig(num_heads=4, head_dim=8, gate=False), {"decay", "write"}),
        *((MIXERS.all()[name].example(), {"decay", "output"}) for name in ("mamba1", "mamba2", "rwkv7", "rg_lru", "hgrn")),
        (DeltaNetConfig(num_heads=4, head_dim=16, gate=True), {"write", "output"}),
        (MIXERS.all()["gated_deltaproduct"].example(), {"decay", "write", "output"}),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_mixer_tells_the_gates_that_its_equations_have(config, kinds):
    found = shown(config)
    assert set(found) == kinds
    for values in found.values():
        assert values.shape[:2] == (2, 8) and values.shape[2] == config.head_count(D_MODEL)


@pytest.mark.parametrize(
    "config", [KDAConfig.example(), SoftmaxConfig(num_heads=4, head_dim=16, gate="elementwise")], ids=["kda", "softmax"]
)
def test_told_gates_are_those_that_act(config):
    """A head's output is finished with the output gate that is told, and decays are the exponentials of the inputs'."""
    mixer = config.build(D_MODEL, BuildContext(rngs=nnx.Rngs(0), seq_len=8))
    assert isinstance(mixer, HeadMixer)
    at, x = layout((5, 3), length=8), jax.random.normal(jax.random.key(0), (1, 8, D_MODEL))
    inputs, _ = mixer.project(x, at=at, state=None)
    gates = mixer.observe(inputs, x, at=at)["gates"]
    o = jax.random.normal(jax.random.key(1), (1, 8, 4, 16))
    plain = mixer.norm(o) if hasattr(mixer, "norm") else o
    assert_close(mixer.finish(o, inputs, x), plain * gates["output"].values)
    assert gates["output"].largest == 1.0
    if "decay" in gates:
        assert_close(gates["decay"].values, np.exp(np.asarray(inputs.g)))
        assert_close(gates["write"].values, inputs.beta)
