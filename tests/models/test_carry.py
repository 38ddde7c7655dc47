"""What layers leave for later ones, inside a model: a loop over layers written by hand, decoding, packing, recomputation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.kernels import Tokens
from plait.models.channel_mixers.gated_mlp import GatedMLPConfig
from plait.models.config import LMConfig
from plait.models.lm import LM
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.gla import GLAConfig
from plait.tests.models.common import assert_decodes_as_the_call, build, layout, quick_jit
from plait.tests.suites import usually
from plait.tests.tolerances import assert_close

WIDTH, VOCAB, LENGTH = 32, 61, 24
PACKED = layout((9, 11), (LENGTH,), length=LENGTH)
REAL = np.asarray(PACKED.segment_ids > 0)
IDS = jax.random.randint(jax.random.key(0), (2, LENGTH), 0, VOCAB)
SOFTMAX = SoftmaxConfig(num_heads=4, num_kv_heads=2, head_dim=8)
MIXERS = {
    "softmax": dataclasses.replace(SOFTMAX, value_residual=True),
    "softmax/write": dataclasses.replace(SOFTMAX, value_residual=True, shared_kv="write"),
    "softmax/read": dataclasses.replace(SOFTMAX, shared_kv="read"),
}


def lm(pattern: str, num_layers: int, mixers: dict = MIXERS, **options) -> LM:
    """A model whose layers each mix values in a proportion of their own."""
    mixers = {name: mixers[name] for name in pattern.split(",")}
    config = LMConfig(
        d_model=WIDTH,
        num_layers=num_layers,
        pattern=pattern,
        mixers=mixers,
        channel_mixer=GatedMLPConfig(hidden_dim=48),
        vocab_size=VOCAB,
        **options,
    )
    model = build(config, seq_len=LENGTH)
    graph, state = nnx.split(model)
    key = jax.random.key(4)
    found = [
        (path, v.replace(jax.random.uniform(key, v.shape, minval=0.2, maxval=2.0)) if path[-1] == "value_mix" else v)
        for path, v in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(found))


@pytest.fixture(scope="module")
def model() -> LM:
    """Two scanned periods of three layers and one layer more."""
    model = lm("softmax,softmax/write,softmax/read", 7)
    assert (model.stack.period, model.stack.count, len(model.stack.rest)) == (3, 2, 1)
    return model


def blocks(model: LM) -> list:
    """The layers one by one, in order."""
    graph, stacked = nnx.split(model.stack.periods)
    periods = [nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], stacked)) for i in range(model.stack.count)]
    return [block for period in periods for block in period] + list(model.stack.rest)


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention of the packed rows."""
    k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    logits = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
    ids = PACKED.segment_ids
    visible = (ids[:, :, None] == ids[:, None]) & (ids > 0)[:, None] & np.tri(LENGTH, dtype=bool)[None]
    weights = jax.nn.softmax(jnp.where(visible[:, None], logits, -1e30), axis=-1)
    return jnp.einsum("bhts,bshv->bthv", weights, v)


def by_hand(model: LM) -> jax.Array:
    """The logits, layer after layer: values mixed with those of the first layer, keys and values of the last layer that left some."""
    x, first, left = model.embedding[...][IDS], None, None
    for block in blocks(model):
        mixer, h = block.mixer, block.mixer_norm(x)
        (q, k, v, *_), _ = mixer.project(h, at=PACKED, state=None)
        if mixer.config.value_residual and first is None:
            first = v
        elif mixer.config.value_residual:
            own, old = mixer.value_mix[...]
            v = own * v + old * first
        if mixer.config.shared_kv == "read":
            k, v = left
        if mixer.config.shared_kv == "write":
            left = k, v
        x = x + mixer.output(attend(q, k, v))
        x = x + block.channel_mixer(block.channel_norm(x), at=PACKED).y
    return model.logits(model.norm(x))


def call(model: LM, ids: jax.Array = IDS, at: Tokens = PACKED) -> jax.Array:
    graph, state = nnx.split(model)
    return quick_jit(lambda state, at: nnx.merge(graph, state)(at)[0])(state, dataclasses.replace(at, ids=ids))


def test_model_equals_a_loop_over_its_layers(model):
    expected = quick_jit(lambda state: by_hand(nnx.merge(nnx.split(model)[0], state)))(nnx.split(model)[1])
    assert_close(call(model)[REAL], expected[REAL])


def test_readers_have_no_keys_values_or_cache_of_their_own(model):
    reader = blocks(model)[2].mixer
    assert reader.k is None
    assert reader.v is None
    assert reader.init_state(2, LENGTH) is None
    writer = model.config.mixers["softmax/write"].state_bytes(WIDTH, LENGTH, "float32")
    assert writer == 2 * LENGTH * 2 * 8 * 4 + 4 * LENGTH
    assert model.config.mixers["softmax/read"].state_bytes(WIDTH, LENGTH, "float32") == 0


def test_packed_documents_equal_separate_ones(model):
    shifted = IDS.at[0, :11].set(IDS[0, 9:20])
    assert_close(call(model)[0, 9:20], call(model, shifted, layout((11,), (20,), length=LENGTH))[0, :11])


@pytest.mark.parametrize("window", usually([None, 5], 5))
def test_prefill_and_steps_equal_the_call(window):
    """Of left-padded prompts; with a window, layers share the ring of a cache. A layer without a carry stands between."""
    local = {name: dataclasses.replace(config, window_size=window) for name, config in MIXERS.items()}
    model = lm("softmax,softmax/write,gla,softmax/read", 9, {**local, "gla": GLAConfig(num_heads=2)})
    assert_decodes_as_the_call(model, IDS)


def test_recomputation_changes_neither_loss_nor_gradients(model):
    def loss_and_gradients(remat):
        config = dataclasses.replace(model.config, remat=remat)
        graph = nnx.split(nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0), seq_len=LENGTH)))[0]

        def loss(params, rest):
            logits, _ = nnx.merge(graph, params, rest)(dataclasses.replace(PACKED, ids=IDS))
            nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.roll(IDS, -1, axis=1)[..., None], axis=-1)[..., 0]
            return (nll * REAL).sum() / REAL.sum()

        _, params, rest = nnx.split(model, nnx.Param, ...)
        return quick_jit(jax.value_and_grad(loss))(params, rest)

    expected, wanted = loss_and_gradients(None)
    value, gradients = loss_and_gradients("full")
    assert_close(value, expected)
    for (path, got), (_, want) in zip(nnx.to_flat_state(gradients), nnx.to_flat_state(wanted), strict=True):
        assert np.abs(want[...]).max() > 0, path
        assert_close(got[...], want[...], err_msg=str(path))


def test_values_of_the_first_layer_alone_are_mixed_in():
    """The first layer that has the option, wherever the scan puts it: its own mix does nothing."""
    model = lm("gla,softmax", 4, {**MIXERS, "gla": GLAConfig(num_heads=2)})
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    loss = lambda params: jnp.sum(jnp.sin(nnx.merge(graph, params, rest)(dataclasses.replace(PACKED, ids=IDS))[0]))
    gradients = dict(nnx.to_flat_state(quick_jit(jax.grad(loss))(params)))
    (mix,) = (g[...] for path, g in gradients.items() if path[-1] == "value_mix")
    assert not np.asarray(mix[0]).any()
    assert np.abs(mix[1]).min() > 0
