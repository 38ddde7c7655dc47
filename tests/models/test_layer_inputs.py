"""Inputs of each layer's own and layers' scalars, inside a model whose layers share keys and values: by hand, packed, decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.kernels import Tokens
from plait.models.channel_mixers.gated_mlp import GatedMLPConfig
from plait.models.channel_mixers.moe import MoEConfig
from plait.models.config import LMConfig
from plait.models.layers.layer_inputs import LayerInputsConfig
from plait.models.lm import LM, num_params
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.positions.rotary_proportional import ProportionalRotaryConfig
from plait.models.stream import Stream
from plait.tests.models.common import assert_decodes_as_the_call, build, layout, quick_jit
from plait.tests.tolerances import assert_close

WIDTH, VOCAB, LENGTH, DIM = 16, 61, 24, 6
IDS = jax.random.randint(jax.random.key(0), (2, LENGTH), 0, VOCAB)
LOCAL = SoftmaxConfig(num_heads=4, num_kv_heads=2, head_dim=4, window_size=5, scale=1.0, qk_norm=True, value_norm=True)
WHOLE = dataclasses.replace(
    LOCAL, num_kv_heads=1, head_dim=8, window_size=None, tie_kv=True, positions=ProportionalRotaryConfig(fraction=0.5)
)
READ = {"shared_kv": "read", "value_norm": False, "tie_kv": False}
CONFIG = LMConfig(
    d_model=WIDTH,
    num_layers=8,
    pattern="softmax/local,softmax/whole,softmax/local_read,softmax/read",
    mixers={
        "softmax/local": dataclasses.replace(LOCAL, shared_kv="write"),
        "softmax/whole": dataclasses.replace(WHOLE, shared_kv="write"),
        "softmax/local_read": dataclasses.replace(LOCAL, **READ),
        "softmax/read": dataclasses.replace(WHOLE, **READ),
    },
    channel_mixer=GatedMLPConfig(hidden_dim=24),
    channel_mixers={
        "softmax/local": MoEConfig(num_experts=4, top_k=2, hidden_dim=8, num_shared_experts=1, own_norms=True, expert_scales=True)
    },
    norm="both",
    vocab_size=VOCAB,
    layer_scalars=True,
    layer_inputs=LayerInputsConfig(dim=DIM),
)


@pytest.fixture(scope="module")
def model() -> LM:
    """Two scanned periods, every parameter moved off what it starts at."""
    graph, params, rest = nnx.split(build(CONFIG, seq_len=LENGTH), nnx.Param, ...)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    moved = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    model = nnx.merge(graph, jax.tree.unflatten(tree, moved), rest)
    assert (model.stack.period, model.stack.count) == (4, 2)
    return model


def call(model: LM, ids: jax.Array, at: Tokens) -> jax.Array:
    graph, state = nnx.split(model)
    return quick_jit(lambda state, at: nnx.merge(graph, state)(at)[0])(state, dataclasses.replace(at, ids=ids))


def normed(x, scale):
    return x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-6) * np.asarray(scale)


def test_every_layer_adds_its_own_input_and_multiplies_the_stream(model):
    """In numpy, of the stream that a block without them gives."""
    table, projection = (
        np.asarray(p, np.float64) for p in (model.layer_inputs.embedding[...], model.layer_inputs.projection.kernel[...])
    )
    h, ids = np.asarray(model.embedding[...][IDS], np.float64), np.asarray(IDS)
    tokens = DIM**0.5 * table[ids].reshape(2, LENGTH, 8, DIM)
    projected = (h @ projection / WIDTH**0.5).reshape(2, LENGTH, 8, DIM)
    inputs = (normed(projected, model.layer_inputs.norm.scale[...]) + tokens) / 2**0.5
    at = layout((LENGTH,), (LENGTH,), length=LENGTH)
    assert_close(model.layer_inputs(model.embedding[...][IDS], dataclasses.replace(at, ids=IDS)), inputs)
    graph, stacked = nnx.split(model.stack.periods)
    for index in (0, 5):
        one = jax.tree.map(lambda a, row=index // 4: a[row], stacked)
        block = list(nnx.merge(graph, one))[index % 4]
        gate, scalar, x = block.layer_gate, block.scalar, jax.random.normal(jax.random.key(9), (2, LENGTH, WIDTH))
        run = lambda block, x: block(Stream(x, {"layer_inputs": jnp.asarray(inputs, jnp.float32)}), at=at)[0].x
        found = quick_jit(run)(block, x)
        block.layer_gate = block.scalar = None
        plain = np.asarray(quick_jit(run)(block, x), np.float64)
        inner = np.asarray(jax.nn.gelu(plain @ np.asarray(gate.gate.kernel[...]))) * inputs[:, :, index]
        added = plain + normed(inner @ np.asarray(gate.out.kernel[...]), gate.norm.scale[...])
        assert_close(found, added * float(scalar[0]))


def test_packed_documents_equal_separate_ones(model):
    packed, apart = layout((9, 11), (LENGTH,), length=LENGTH), layout((11,), (20,), length=LENGTH)
    shifted = IDS.at[0, :11].set(IDS[0, 9:20])
    assert_close(call(model, IDS, packed)[0, 9:20], call(model, shifted, apart)[0, :11])


def test_prefill_and_steps_equal_the_call(model):
    """Longer than the window: readers find what layers of their own window keep."""
    assert_decodes_as_the_call(model, IDS)


def test_parameters_are_counted_with_the_tables_of_all_layers(model):
    assert num_params(CONFIG) == sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: dataclasses.replace(CONFIG, norm="pre", norms={"softmax/local": "output"}),
            r"norm='output' leaves no place for the norms that moe has of its own in layers of softmax/local; use 'pre' or 'both'",
        ),
        (
            lambda: dataclasses.replace(LOCAL, shared_kv="read"),
            "value_norm=True has no keys and values of its own where shared_kv",
        ),
        (lambda: dataclasses.replace(WHOLE, value_norm=False, shared_kv="read"), "tie_kv=True has no keys and values of its own"),
        (
            lambda: dataclasses.replace(
                CONFIG,
                pattern="softmax/local,softmax/read",
                mixers={"softmax/local": CONFIG.mixers["softmax/local"], "softmax/read": CONFIG.mixers["softmax/read"]},
            ),
            r"mixers\.softmax/read reads the carry 'kv', which no layer before it writes",
        ),
    ],
    ids=["no-place-for-norms", "norm-of-read-values", "tie-of-read-values", "another-window"],
)
def test_options_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
