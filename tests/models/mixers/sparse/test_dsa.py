"""DeepSeek sparse attention: the published layer, the paper's losses, and what learns by which."""

import collections
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

from plait.configs.mesh import MeshConfig
from plait.kernels import Mask, dispatch, index_divergence
from plait.kernels.attention.tpu.tokens import chosen_tokens
from plait.kernels.index_divergence import chunked, pallas_tpu
from plait.kernels.target import target
from plait.models.build import Alone
from plait.models.mixers.moh import MoHConfig
from plait.models.mixers.sparse import dsa
from plait.models.mixers.sparse.dsa import LOSS, DSAConfig
from plait.models.mixers.sparse.indexer import Index, chosen
from plait.models.positions.rotary import RotaryConfig
from plait.tests.models.common import layout, quick_jit
from plait.tests.models.golden.generate_sparse import DSA, HEADS, KEPT
from plait.tests.models.mixers.full import test_weights_oracles as layers
from plait.tests.models.mixers.full.test_weights_oracles import golden_arrays
from plait.tests.models.mixers.sparse.test_selecting import build
from plait.tests.models.test_oracles import filled
from plait.tests.tolerances import assert_close, in_float64
from plait.train import mesh as meshes

SIZES = {
    "num_heads": HEADS,
    "kv_rank": DSA["kv_lora_rank"],
    "q_rank": DSA["q_lora_rank"],
    "nope_head_dim": DSA["qk_nope_head_dim"],
    "rope_head_dim": DSA["qk_rope_head_dim"],
    "v_head_dim": DSA["v_head_dim"],
    "index_heads": DSA["index_n_heads"],
    "index_head_dim": DSA["index_head_dim"],
    "top_k": KEPT,
    "positions": RotaryConfig(interleaved=True),
}
INDEXER = {"q.kernel": "wq_b.weight", "k.kernel": "wk.weight", "w": "weights_proj.weight"}
INDEXER |= {"k_norm.scale": "k_norm.weight", "k_norm.bias": "k_norm.bias"}


def published(**options):
    """The golden arrays, and the layer with their weights."""
    arrays = golden_arrays("dsa")
    w = lambda name: arrays[f"weights/{name}"]
    matrix = lambda name: w(f"{name}.weight").T
    nope, value, rank = DSA["qk_nope_head_dim"], DSA["v_head_dim"], DSA["kv_lora_rank"]
    up = matrix("kv_b_proj").reshape(rank, HEADS, nope + value)
    down = matrix("kv_a_proj_with_mqa")
    weights = {"q_down.kernel": matrix("q_a_proj"), "q_norm.scale": w("q_a_layernorm.weight"), "q.kernel": matrix("q_b_proj")}
    weights |= {"kv_down.kernel": down[:, :rank], "k_rope.kernel": down[:, rank:], "kv_norm.scale": w("kv_a_layernorm.weight")}
    weights |= {"k_up.kernel": up[..., :nope].reshape(rank, -1), "v_up.kernel": up[..., nope:].reshape(rank, -1)}
    weights |= {"o.kernel": matrix("o_proj")}
    weights |= {f"indexer.{ours}": w(f"indexer.{theirs}").T for ours, theirs in INDEXER.items()}
    return arrays, filled(build(DSAConfig(**SIZES, **options), layers.WIDTH), weights)


@pytest.mark.proves("dsa")
def test_the_layer_is_deepseeks():
    arrays, layer = published()
    layers.assert_golden(layer, lambda layer, x: layer(x, at=layers.AT, carry={}).y, arrays)


@pytest.mark.proves("dsa")
@pytest.mark.parametrize("stage", ["warm_up", "sparse"])
def test_the_loss_is_the_papers_and_the_indexers_alone(stage):
    """Over all tokens and over the chosen ones; nothing but the indexer has a gradient by it, and the input has none."""
    arrays, layer = published(stage=stage, index_loss=2.0)
    graph, state = nnx.split(layer)
    loss = lambda state, x: nnx.merge(graph, state)(x, at=layers.AT, carry={}).losses[LOSS]
    found, (gradients, of_input) = quick_jit(jax.value_and_grad(loss, (0, 1)))(state, arrays["x"])
    assert_close(found / 2, arrays[f"loss/{stage}"])
    flat = {".".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(gradients)}
    for ours, theirs in INDEXER.items():
        assert_close(flat.pop(f"indexer.{ours}") / 2, arrays[f"gradient/{stage}/{theirs}"].T, err_msg=ours)
    assert not any(gradient.any() for gradient in flat.values()) and not np.asarray(of_input).any()


def test_in_the_warm_up_indexers_alone_are_trained():
    alone = lambda stage: {
        str(path[0]) for path, v in nnx.to_flat_state(nnx.state(published(stage=stage)[1])) if isinstance(v, Alone)
    }
    assert alone("sparse") == set() and alone("warm_up") == {"indexer"}


def test_a_warm_up_goes_on_as_the_sparse_stage_and_with_no_other_attention():
    config = DSAConfig.example()
    weights = lambda **changes: dataclasses.replace(config, **changes).from_weights(48)
    assert weights(stage="warm_up", index_loss=0.5) == weights() != weights(top_k=9)


def test_latents_are_attended_to_where_a_kernel_brings_them_together(monkeypatch):
    """Outputs, loss and gradients are those of the heads' own keys, which the chunked form takes."""
    for module in (chosen_tokens, pallas_tpu):
        monkeypatch.setattr(module, "CHUNK", 16)
    monkeypatch.setattr(pallas_tpu, "LANES", 16)
    monkeypatch.setattr(dsa, "WORTH", 1)
    sizes = {"num_heads": 8, "kv_rank": 24, "q_rank": 32, "nope_head_dim": 16, "rope_head_dim": 8, "v_head_dim": 12}
    config = DSAConfig(**sizes, top_k=7, index_heads=8, index_head_dim=12)
    layer, at = build(config, 32), layout((20, 12), (32,), length=34)
    graph, state = nnx.split(layer)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(*at.segment_ids.shape, 32)), jnp.float32)

    def run(state, x):
        mixed = nnx.merge(graph, state)(x, at=at, carry={})
        return jnp.sin(mixed.y).sum() + mixed.losses[LOSS]

    expected = quick_jit(jax.value_and_grad(run, (0, 1)))(state, x)
    with target("v5e"), pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        text = str(jax.make_jaxpr(run)(state, x))
        found = quick_jit(jax.value_and_grad(partial(run), (0, 1)))(state, x)
    for kernel in ("topk_tokens", "chosen_tokens_forward", "mean_weights", "index_scores"):
        assert text.count(f"name={kernel}\n") == 1, "the loss takes the attention's normalisers"
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(a, b) if np.asarray(b).any() else np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("stage", ["warm_up", "sparse"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_attention_is_made_once_and_tells_the_loss_its_normalisers(stage, wrapped, monkeypatch):
    """In a mixture of heads too; without, the loss is the same."""
    config = dataclasses.replace(DSAConfig.example(), stage=stage)
    mixer = build(MoHConfig(mixer=config) if wrapped else config, 64)
    x, at = jax.random.normal(jax.random.key(0), (2, 16, 64)), layout((9, 5), (16,), length=16)
    calls = collections.Counter()
    for name in ("attention", "index_divergence"):
        op = dispatch._ops[name].implementations["chunked"].run

        def run(call, name=name, op=op):
            calls[name, getattr(call, "lse", None) is not None] += 1
            return op(call)

        monkeypatch.setitem(dispatch._ops[name].implementations, "chunked", dispatch.Implementation(run))
    loss = lambda: mixer(x, at=at, carry={}).losses[LOSS]
    told = loss()
    assert calls == {("attention", False): 1, ("index_divergence", True): 1}
    monkeypatch.setattr(dsa.DSA, "prepare", lambda self, inputs, *, at: inputs)
    assert_close(told, loss())
    assert calls["index_divergence", False] == 1


def divergence_inputs(length: int, dtype=jnp.float32) -> list[jax.Array]:
    random = np.random.default_rng(5)
    shapes = ((2, length, 3, 6), (2, length, 6), (2, length, 3), (2, length, 4, 8), (2, length, 2, 8))
    return [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]


def test_the_divergence_some_queries_at_a_time_is_the_same_and_its_gradient_is_finite_differences(monkeypatch):
    """Of a packed row with padding, whose short documents see less than they may choose; in float64."""
    monkeypatch.setattr(chunked, "BLOCK_SIZE", 8)
    length, kept = 30, 5
    inputs, at = divergence_inputs(length), layout((16, 3, 7), (length,), length=length)

    def rows(implementation):
        def run(index_q, index_k, weights, q, k):
            index = (index_q, index_k, weights)
            some = chosen(Index(*index), at, None, kept)
            return index_divergence(*index, q, k, mask=Mask(), selected=some, at=at, implementation=implementation)

        return run

    whole, parts = (
        quick_jit(jax.value_and_grad(lambda *a, name=name: jnp.sin(rows(name)(*a)).sum(), tuple(range(5))))
        for name in ("reference", "chunked")
    )
    for a, b in zip(jax.tree.leaves(whole(*inputs)), jax.tree.leaves(parts(*inputs)), strict=True):
        assert_close(a, b) if np.asarray(b).any() else np.testing.assert_array_equal(a, b)
    assert not np.asarray(rows("reference")(*inputs))[np.asarray(at.segment_ids) == 0].any()

    def slopes(inputs):
        way = [jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape) for a in inputs[:3]]
        value = lambda by: jnp.sin(rows("chunked")(*(a + by * b for a, b in zip(inputs, way, strict=False)), *inputs[3:])).sum()
        step = 1e-6
        return jax.grad(value)(0.0), (value(step) - value(-step)) / (2 * step)

    exact, found = in_float64(quick_jit(slopes), inputs)
    assert abs(found / exact - 1) < 1e-6


def test_the_loss_on_a_cut_sequence_and_in_a_mixture_of_heads_is_that_of_one_device():
    """Heads cut too, all of which choose together; the gradient of the indexer likewise."""
    mixer = build(MoHConfig(mixer=dataclasses.replace(DSAConfig.example(), index_heads=4)), 64)
    graph, state = nnx.split(mixer)
    x, at = jax.random.normal(jax.random.key(0), (2, 16, 64)), layout((9, 5), (16,), length=16)

    def run(state, x, at):
        mixed = nnx.merge(graph, state)(x, at=at, carry={})
        return mixed.losses[LOSS] + jnp.square(mixed.y).mean(), mixed.losses[LOSS]

    one = quick_jit(jax.value_and_grad(run, has_aux=True))(state, x, at)
    mesh = meshes.make_mesh(MeshConfig(data=2, context=2, tensor=2))
    rows = meshes.batch_sharding(mesh, 2, 16, 1)

    def spread(*args):
        with meshes.on_mesh(mesh):
            return jax.value_and_grad(run, has_aux=True)(*args)

    several = quick_jit(spread)(state, *jax.device_put((x, at), rows))
    for a, b in zip(jax.tree.leaves(several), jax.tree.leaves(one), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"index_head_dim": 4}, "index_head_dim=4 must hold the rope_head_dim=8 channels with positions; use at least 8"),
        ({"stage": "warm_up", "index_loss": None}, "index_loss=None leaves nothing to train in stage='warm_up'"),
        ({"top_k": 0}, "top_k=0 must be a whole number from 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DSAConfig.example(), **options)
