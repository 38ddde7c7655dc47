"""Mixtures of experts against a loop over all experts, and their balance by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.kernels import Tokens
from plait.models.build import Buffer, BuildContext
from plait.models.channel_mixers.gated_mlp import ACTIVATIONS
from plait.models.channel_mixers.moe import MoEConfig
from plait.models.config import LMConfig
from plait.tests.models.common import quick_jit
from plait.tests.suites import usually
from plait.tests.tolerances import assert_close

WIDTH, ROWS, LENGTH = 16, 2, 150
SEGMENTS = np.ones((ROWS, LENGTH), np.int32)
SEGMENTS[1, 130:] = 0
AT = Tokens(segment_ids=jnp.asarray(SEGMENTS))
SMALL = MoEConfig(num_experts=5, top_k=2, hidden_dim=8)
CONFIGS = {
    "softmax": SMALL,
    "shared": dataclasses.replace(SMALL, num_shared_experts=2, activation="gelu"),
    "sigmoid": dataclasses.replace(SMALL, scores="sigmoid", routed_scale=2.5, balance_bias=0.1),
    "scores as gates": dataclasses.replace(SMALL, normalize=False),
    "all experts": dataclasses.replace(SMALL, top_k=5),
    "one expert a token": dataclasses.replace(SMALL, top_k=1, normalize=False),
    "gated shared expert of its own width": dataclasses.replace(
        SMALL, num_shared_experts=1, shared_hidden_dim=12, shared_gate=True
    ),
    "biases": dataclasses.replace(SMALL, use_bias=True, router_bias=True, num_shared_experts=1),
    "norms of its own": dataclasses.replace(SMALL, own_norms=True, num_shared_experts=1, shared_hidden_dim=12),
    "scales of experts": dataclasses.replace(SMALL, expert_scales=True),
    "clamped swiglu": dataclasses.replace(SMALL, use_bias=True, swiglu_limit=0.5),
}
GROUPED = MoEConfig(num_experts=12, num_groups=4, top_k_groups=2, top_k=3, hidden_dim=8)
GROUPS = {
    "by their best expert": dataclasses.replace(GROUPED, group_score_top_k=1, normalize=False),
    "by their best two": dataclasses.replace(GROUPED, scores="sigmoid", balance_bias=0.1),
}


def moe(config: MoEConfig = SMALL, dtype: str = "float32"):
    return config.build(WIDTH, BuildContext(rngs=nnx.Rngs(0), seq_len=LENGTH, compute_dtype=jnp.dtype(dtype)))


def inputs(shape=(ROWS, LENGTH, WIDTH)):
    return jax.random.normal(jax.random.key(1), shape)


def mix(mixer, x, at=AT):
    """What the mixer gives, by one compiled function."""
    return quick_jit(lambda x: mixer(x, at=at))(x)


def chosen_by(choice, k: int):
    """The largest k of each token, equal ones in order: a loop, no sort."""
    choice, chosen = np.array(choice, np.float64), np.zeros(choice.shape)
    for index in np.ndindex(choice.shape[:-1]):
        for _ in range(k):
            best = int(np.argmax(choice[index]))
            chosen[index][best], choice[index][best] = 1.0, -np.inf
    return chosen


def normed(norm, x):
    """By the formula; as it is without a norm."""
    if norm is None:
        return x
    return x / jnp.sqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * norm.scale[...][None, None]


def routed(mixer, x):
    """The router's logits."""
    return mixer.router(x if mixer.router_norm is None else normed(mixer.router_norm, x) / WIDTH**0.5)


def loop(mixer, x, chosen):
    """`sum_e g_e F_e(x)` over every expert, with gates 0 where it is not chosen."""
    config = mixer.config
    logits = routed(mixer, x)
    scores = jax.nn.softmax(logits, -1) if config.scores == "softmax" else jax.nn.sigmoid(logits)
    gates = scores * chosen
    gates = gates / gates.sum(-1, keepdims=True) if config.normalize else gates
    gates = gates if mixer.expert_scale is None else gates * mixer.expert_scale[...][None, None]
    gates = config.routed_scale * gates * (SEGMENTS > 0)[..., None]
    product = lambda layer, e, x: x @ layer.weight()[e] + (0 if layer.bias is None else layer.bias[...][e][None, None])
    read = normed(mixer.routed_norm, x)
    expert = lambda e: product(mixer.down, e, gated(config, product(mixer.gate, e, read), product(mixer.up, e, read)))
    y = sum(gates[..., e : e + 1] * expert(e) for e in range(config.num_experts))
    y = normed(mixer.routed_out_norm, y)
    if mixer.shared is None:
        return y
    shared = normed(mixer.shared_out_norm, mixer.shared(normed(mixer.shared_norm, x), at=AT).y)
    return y + (shared if mixer.shared_gate is None else shared / (1 + jnp.exp(-mixer.shared_gate(x))))


def gated(config, gate, up):
    limit = config.swiglu_limit
    if limit is None:
        return ACTIVATIONS[config.activation](gate) * up
    gate, up = jnp.where(gate > limit, limit, gate), jnp.where(up > limit, limit, jnp.where(up < -limit, -limit, up))
    return gate / (1 + jnp.exp(-1.702 * gate)) * (up + 1)


def moved_off(mixer):
    """With every parameter off what it starts at, biases above all."""
    graph, params, rest = nnx.split(mixer, nnx.Param, ...)
    leaves, tree = jax.tree.flatten(params)

    @quick_jit
    def move(leaves):
        keys = jax.random.split(jax.random.key(5), len(leaves))
        return [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]

    moved = move(leaves)
    return nnx.merge(graph, jax.tree.unflatten(tree, moved), rest)


def with_gradients(graph, rest, function, params, x):
    y, pull = jax.vjp(lambda params, x: function(nnx.merge(graph, nnx.merge_state(params, rest)), x), params, x)
    return y, *pull(jnp.cos(y))


@pytest.mark.parametrize(
    "config", usually(CONFIGS.values(), CONFIGS["softmax"], CONFIGS["biases"], CONFIGS["shared"]), ids=CONFIGS
)
def test_output_and_every_gradient_equal_a_loop_over_all_experts(config):
    mixer = moved_off(moe(config))
    if mixer.bias is not None:
        mixer.bias[...] = jnp.array([0.3, -0.2, 0.0, 0.1, -0.3])  # they choose, and are no part of a gate
    x = inputs()
    logits = quick_jit(lambda x: routed(mixer, x))(x)
    scores = jax.nn.softmax(logits) if config.scores == "softmax" else jax.nn.sigmoid(logits)
    chosen = chosen_by(scores if mixer.bias is None else scores + mixer.bias[...][None, None], config.top_k)
    graph, state = nnx.split(mixer)
    params, rest = nnx.split_state(state, nnx.Param, ...)
    run = lambda function: quick_jit(functools.partial(with_gradients, graph, rest, function))(params, x)
    found, expected = run(lambda mixer, x: mixer(x, at=AT).y), run(lambda mixer, x: loop(mixer, x, chosen))
    for (path, got), want in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert_close(got, want, err_msg=jax.tree_util.keystr(path))
    counts = chosen[SEGMENTS > 0].sum(0)
    np.testing.assert_allclose(mix(mixer, x).observed["expert_load"], counts / counts.mean(), rtol=1e-6)


@pytest.mark.parametrize("config", GROUPS.values(), ids=GROUPS)
def test_experts_are_of_the_best_groups(config):
    mixer = moved_off(moe(config))
    if mixer.bias is not None:
        mixer.bias[...] = jnp.linspace(-0.4, 0.4, 12)
    x = inputs()
    logits = np.asarray(mixer.router(x), np.float64)
    choice = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) if config.scores == "softmax" else 1 / (1 + np.exp(-logits))
    choice = choice if mixer.bias is None else choice + np.asarray(mixer.bias[...])
    grouped = choice.reshape(*choice.shape[:-1], 4, 3)
    best = np.argsort(-np.sort(grouped, -1)[..., -config.group_score_top_k :].sum(-1), axis=-1)[..., :2]
    for index in np.ndindex(choice.shape[:-1]):
        for group in set(range(4)) - set(best[index]):
            choice[index][3 * group : 3 * group + 3] = -np.inf
    chosen = chosen_by(choice, 3)
    assert_close(mix(mixer, x).y, quick_jit(lambda x: loop(mixer, x, chosen))(x))


@pytest.mark.parametrize("favourite", [0, 4])
def test_no_token_is_dropped_however_uneven_the_load(favourite):
    """Every token goes to one expert; each token's output is that expert's."""
    mixer = moe(dataclasses.replace(SMALL, top_k=1, normalize=False))
    mixer.router.kernel[...] = jnp.zeros_like(mixer.router.kernel[...]).at[:, favourite].set(100.0)
    x = jnp.abs(inputs()) + 0.1
    mixed = mix(mixer, x)

    @quick_jit
    def expected(x):
        gate, up, down = (layer.weight()[favourite] for layer in (mixer.gate, mixer.up, mixer.down))
        return jax.nn.softmax(x @ mixer.router.weight())[..., favourite, None] * ((jax.nn.silu(x @ gate) * (x @ up)) @ down)

    assert_close(np.asarray(mixed.y)[SEGMENTS > 0], np.asarray(expected(x))[SEGMENTS > 0])
    np.testing.assert_array_equal(mixed.observed["expert_load"], 5.0 * np.eye(5)[favourite])


def test_padding_is_not_routed():
    mixed = mix(moe(dataclasses.replace(SMALL, balance_bias=0.1)), inputs())
    assert not np.asarray(mixed.y)[SEGMENTS == 0].any()
    assert mixed.counts["expert"].sum() == SMALL.top_k * (SEGMENTS > 0).sum()


def test_losses_equal_values_worked_by_hand():
    """Three real tokens with logits (a, 0), top-1: two choose expert 0, one expert 1."""
    config = MoEConfig(num_experts=2, top_k=1, normalize=False, hidden_dim=8, balance_loss=0.5, z_loss=0.25)
    mixer = moe(config)
    mixer.router.kernel[...] = jnp.zeros((WIDTH, 2)).at[0, 0].set(1.0)
    x = jnp.zeros((1, 4, WIDTH)).at[0, :, 0].set(jnp.array([1.0, 2.0, -1.0, 9.0]))
    mixed = mix(mixer, x, Tokens(segment_ids=jnp.array([[1, 1, 1, 0]])))
    p0 = np.mean([1 / (1 + np.exp(-a)) for a in (1.0, 2.0, -1.0)])
    assert mixed.losses["balance/moe"] == pytest.approx(0.5 * 2 * (2 / 3 * p0 + 1 / 3 * (1 - p0)), rel=1e-6)
    z = np.mean([np.log(np.exp(a) + 1) ** 2 for a in (1.0, 2.0, -1.0)])
    assert mixed.losses["z/router"] == pytest.approx(0.25 * z, rel=1e-6)
    np.testing.assert_allclose(mixed.observed["expert_load"], [4 / 3, 2 / 3], rtol=1e-6)


def test_balanced_loss_is_its_coefficient():
    mixer = moe(MoEConfig(num_experts=4, top_k=4, hidden_dim=8, balance_loss=0.01))
    mixer.router.kernel[...] = jnp.zeros((WIDTH, 4))
    assert mix(mixer, inputs()).losses["balance/moe"] == pytest.approx(0.01, rel=1e-6)


@pytest.mark.parametrize("stacked", [False, True])
def test_biases_move_by_the_sign_of_the_load_error(stacked):
    mixer = moe(MoEConfig(num_experts=4, hidden_dim=8, balance_bias=0.001))
    counts = jnp.array([9.0, 1.0, 5.0, 5.0])  # of mean 5
    moved = jnp.array([-0.001, 0.001, 0.0, 0.0])
    if stacked:  # layers in front
        mixer.bias = Buffer(jnp.zeros((2, 4)))
        counts, moved = jnp.stack([counts, counts[::-1]]), jnp.stack([moved, moved[::-1]])
    for n in (1, 2):
        mixer.settle({"expert": counts})
        np.testing.assert_allclose(mixer.bias[...], n * moved, rtol=1e-6)


def test_options_that_are_off_leave_nothing():
    mixer = moe(dataclasses.replace(SMALL, balance_loss=None, z_loss=None))
    mixed = mix(mixer, inputs())
    assert mixed.losses == {} and mixed.counts == {} and mixer.bias is None and mixer.shared is None


def test_router_is_float32_in_bfloat16_models():
    mixer = moe(dtype="bfloat16")
    x = inputs().astype(jnp.bfloat16)
    logits = np.asarray(x, np.float64) @ np.asarray(mixer.router.weight(), np.float64)
    z = np.log(np.exp(logits).sum(-1))
    assert mix(mixer, x, Tokens()).losses["z/router"] == pytest.approx(SMALL.z_loss * np.mean(z**2), rel=1e-5)


def test_default_width_gives_a_token_what_the_gated_mlp_has():
    config = MoEConfig(num_experts=16, top_k=3, num_shared_experts=1)
    assert config.width(768) == 2048 // 4
    assert config.flops(768) == 2 * 768 * (16 + 3 * 2048)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 9}, "top_k=9 must be at most num_experts=8; use fewer or add experts"),
        ({"top_k": 1}, "normalize=True with top_k=1 leaves a gate of 1 and the router without a gradient; use normalize=False"),
        ({"top_k": 0}, "top_k=0 must be a whole number from 1"),
        ({"num_experts": 0}, "num_experts=0 must be a whole number from 1"),
        ({"hidden_dim": 0}, "hidden_dim=0 must be a whole number from 1"),
        ({"num_shared_experts": -1}, "num_shared_experts=-1 must be a whole number from 0"),
        ({"routed_scale": 0.0}, "routed_scale=0.0 must be a finite number above 0"),
        ({"balance_loss": -1.0}, "balance_loss=-1.0 must be a finite number above 0 (1e-30 or more)"),
        ({"balance_bias": float("inf")}, "balance_bias=inf must be a finite number above 0 (1e-30 or more)"),
        ({"z_loss": 0.0}, "z_loss=0.0 must be a finite number above 0 (1e-30 or more)"),
        ({"shared_gate": True}, "shared_gate=True has no shared expert to gate; use num_shared_experts=1, or shared_gate=False"),
        (
            {"swiglu_limit": 7.0, "activation": "gelu"},
            "activation='gelu' does not fit swiglu_limit; use 'silu', or swiglu_limit=None",
        ),
        ({"num_groups": 3}, "num_groups=3 must divide num_experts=8"),
        ({"top_k_groups": 2}, "top_k_groups=2 must be at most num_groups=1"),
        ({"num_groups": 8}, "group_score_top_k=2 must be at most the 1 experts of a group"),
        ({"num_groups": 4, "top_k": 3}, "top_k=3 must be at most the 2 experts of top_k_groups groups"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError) as error:
        MoEConfig(**options)
    assert str(error.value).startswith(f"moe.{message}")


def test_flops_of_a_model_count_the_experts_that_a_token_meets():
    model = LMConfig(d_model=64, num_layers=2, pattern="softmax", channel_mixer=SMALL, vocab_size=128)
    dense = dataclasses.replace(model, channel_mixer=dataclasses.replace(SMALL, num_experts=2))
    assert model.flops(32) - dense.flops(32) == 2 * 2 * 64 * 3  # the router's scores of three more experts, in two layers
