"""Losses on attention: values and gradients by the definitions in float64, and that training on them moves what they are of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.kernels import Tokens
from plait.models.attention_losses import AttentionLossConfig, attention_losses
from plait.models.build import BuildContext
from plait.models.looks.look import Everyone
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.gla import GLAConfig
from plait.models.mixers.linear.mamba2 import Mamba2Config
from plait.models.mixers.parallel.parallel import ParallelConfig
from plait.tests.models.common import quick_jit
from plait.tests.tolerances import assert_close
from plait.tests.train.common import changed, program_of, random_batch, tiny
from plait.train.loop import train

WIDTH, HEADS, LENGTH = 8, 3, 12
NAMES = ("entropy_floor", "entropy", "sharpness", "head_diversity", "head_balance")
BATCH = random_batch(3, LENGTH)
AT = Tokens(jnp.asarray(BATCH.tokens), jnp.asarray(BATCH.segment_ids), jnp.asarray(BATCH.positions))
X = 2 * jax.random.normal(jax.random.key(1), (3, LENGTH, WIDTH))


def asked(coefficient=1.0, floor=0.9):
    return AttentionLossConfig(floor=floor, **dict.fromkeys(NAMES, coefficient))


def mixer_of(config=None):
    config = config or SoftmaxConfig(num_heads=HEADS, head_dim=4, positions=None)
    create = lambda: config.build(WIDTH, BuildContext(rngs=nnx.Rngs(0), seq_len=LENGTH))
    return nnx.merge(nnx.split(nnx.eval_shape(create))[0], quick_jit(lambda: nnx.split(create())[1])())


def losses(mixer, config, x):
    return attention_losses(mixer(x, at=AT, carry={}, observer=Everyone()).looks, config)


def losses_of(mixer, config, x=X):
    return quick_jit(lambda x: losses(mixer, config, x))(x)


def by_definition(kernels, floor=0.9):
    """The losses in float64, from dense attention; query by query where a definition says so."""
    q, k, v = (np.asarray(X, np.float64) @ kernel for kernel in kernels)
    q, k, v = (y.reshape(3, LENGTH, HEADS, 4) for y in (q, k, v))
    shortfalls, entropies, cosines, leaves = [], [], [], [[] for _ in range(HEADS)]
    for b in range(3):
        for i in range(LENGTH):
            if BATCH.segment_ids[b, i] == 0:
                continue
            keys = [j for j in range(i + 1) if BATCH.segment_ids[b, j] == BATCH.segment_ids[b, i]]
            outputs = []
            for h in range(HEADS):
                z = k[b, keys, h] @ q[b, i, h] / 2
                p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
                outputs.append(p @ v[b, keys, h])
                if len(keys) > 1:
                    entropy = -(p * np.log(p)).sum()
                    entropies.append(entropy)
                    shortfalls.append(max(0, floor - entropy / np.log(len(keys))))
                    leaves[h].append(1 - p[0])
            unit = np.array([o / np.linalg.norm(o) for o in outputs])
            cosines.append((unit @ unit.T).mean())
    active = np.mean(leaves, axis=1)
    found = (np.mean(shortfalls), -np.mean(entropies), np.mean(entropies), np.mean(cosines), active.var() / active.mean() ** 2)
    return dict(zip(NAMES, found, strict=True))


@pytest.fixture(scope="module")
def kernels():
    mixer = mixer_of()
    return [np.asarray(dense.kernel[...], np.float64) for dense in (mixer.q, mixer.k, mixer.v)]


def test_values_are_those_of_the_definitions_and_have_their_coefficients(kernels):
    expected, found = by_definition(kernels), losses_of(mixer_of(), asked(0.5))
    assert set(found) == {f"attention/{name}" for name in NAMES}
    for name, value in expected.items():
        assert abs(value) > 1e-3, f"{name} is at work"
        assert_close(found[f"attention/{name}"], 0.5 * value, err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name, kernels):
    rng = np.random.default_rng(0)
    along = [rng.normal(size=kernel.shape) for kernel in kernels]
    step = 1e-5
    values = [by_definition([k + sign * step * a for k, a in zip(kernels, along)])[name] for sign in (1, -1)]

    graph, state = nnx.split(mixer_of())

    def loss(share):
        mixer = nnx.merge(graph, jax.tree.map(lambda a: a, state))
        for dense, kernel, a in zip((mixer.q, mixer.k, mixer.v), kernels, along):
            dense.kernel[...] = jnp.asarray(kernel, jnp.float32) + share * jnp.asarray(a, jnp.float32)
        return losses(mixer, asked(), X)[f"attention/{name}"]

    assert_close(quick_jit(jax.grad(loss))(0.0), (values[0] - values[1]) / (2 * step))


def test_where_nothing_is_asked_for_there_is_nothing():
    assert losses_of(mixer_of(), AttentionLossConfig()) == {}


def test_a_layer_has_what_its_parts_have():
    both = mixer_of(ParallelConfig(parts=(SoftmaxConfig(num_heads=2, head_dim=4), Mamba2Config(head_dim=4, state_dim=4))))
    found = losses_of(both, asked())
    alone = losses_of(both.parts[0], asked())
    assert set(found) == {f"attention/{name}" for name in NAMES}
    assert_close(found["attention/entropy"], alone["attention/entropy"])
    assert set(losses_of(mixer_of(GLAConfig(num_heads=2)), asked())) == {"attention/head_diversity"}


def test_padding_changes_nothing(kernels):
    moved, mixer = X.at[-1, -3:].set(7.0), mixer_of()
    run = quick_jit(lambda x: losses(mixer, asked(), x))
    before, after = run(X), run(moved)
    for name, value in before.items():
        assert value == after[name], name


def trained_on(name, coefficient, steps=25):
    """The first and the last value of a loss, coefficient left out, of a model that is trained on one batch."""
    changes = {f"model.attention_loss.{name}": coefficient, "model.num_layers": 1, "optimizer.warmup_steps": 0, "steps": steps}
    if name == "entropy_floor":
        changes["model.attention_loss.floor"] = 1.0
    program = program_of(changed(tiny(), changes))
    step, state = program.lower().compile(), program.fresh()
    batch, found = program.layout.place(random_batch()), []
    for _ in range(steps):
        state, metrics = step(state, batch)
        found.append(float(metrics[f"loss/attention/{name}"]) / coefficient)
    return found[0], found[-1]


@pytest.mark.parametrize("name", NAMES)
def test_training_on_a_loss_moves_what_it_is_of(name):
    (start, plain), (again, pressed) = trained_on(name, 1e-6), trained_on(name, 30.0)
    assert start == pytest.approx(again, rel=1e-4)
    assert pressed < start and pressed < plain - 0.2 * abs(plain - start), (start, plain, pressed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.pattern": "gla", "model.mixers": {"gla": GLAConfig(num_heads=2)}},
            r"model\.attention_loss\.entropy=0\.1 is of what no",
        ),
        ({"model.attention_loss.floor": 0.3}, r"attention_loss\.floor=0\.3 is of entropy_floor, which is None"),
        ({"model.attention_loss.entropy": -1.0}, r"attention_loss\.entropy=-1\.0 must be a finite number above 0"),
    ],
)
def test_a_loss_that_no_layer_has_is_refused_before_anything_is_compiled(changes, message, tmp_path, corpus, monkeypatch):
    def compiled(*_):
        raise AssertionError("compiled")

    monkeypatch.setattr(jax.stages.Lowered, "compile", compiled)
    with pytest.raises(ValueError, match=message):
        train(changed(tiny({"data.source": str(corpus), "out": str(tmp_path)}), {"model.attention_loss.entropy": 0.1, **changes}))
