"""Dropout of features and heads: what is left out, that it follows from seed, step and place alone, and that scoring leaves out nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.configs.mesh import MeshConfig
from plait.kernels import Tokens
from plait.models.build import BuildContext
from plait.models.dropout import Dropout, DropoutConfig
from plait.models.looks.look import Everyone
from plait.models.looks.taps import Tapped
from plait.tests.models.common import build, quick_jit
from plait.tests.tolerances import assert_close
from plait.tests.train.common import mixture, program_of, random_batch, tiny
from plait.tests.train.test_mesh import SIZES, assert_same_training, two_steps
from plait.train.step import make_step

RATE, HEADS = {"model.dropout": DropoutConfig(rate=0.3)}, {"model.dropout": DropoutConfig(heads=1)}
BOTH = {"model.dropout": DropoutConfig(rate=0.3, heads=1)}
DEEP = {"model.num_layers": 4}
NOISE = jax.random.bits(jax.random.key(1), (8, 16), jnp.uint32)


def dropout(layer=0, **options):
    return Dropout(DropoutConfig(**options), BuildContext(rngs=nnx.Rngs(0), seq_len=16, layer_index=layer))


def at(noise):
    return Tokens(None, None, None, noise=noise)


def test_features_are_left_out_at_the_rate_and_the_others_make_up_for_them():
    y = np.asarray(dropout(rate=0.25)(jnp.ones((8, 16, 64)), at(NOISE)))
    np.testing.assert_array_equal(np.unique(y), np.float32([0, 1]) / np.float32(0.75))
    assert abs((y == 0).mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / y.size)  # four standard deviations
    by_channel, by_token = (y == 0).mean((0, 1)), (y == 0).mean(-1)
    assert by_channel.max() < 0.5 and by_token.min() > 0 and by_token.max() < 0.6  # neither a channel nor a token as a whole


def test_layers_halves_and_tokens_draw_by_themselves():
    ones = jnp.ones((8, 16, 64))
    drawn = [np.asarray(dropout(layer, rate=0.5)(ones, at(NOISE), half)) for layer in (0, 1) for half in (0, 1)]
    drawn.append(np.roll(drawn[0], 1, axis=1))
    for one in range(len(drawn)):
        for other in range(one):
            assert 0.4 < (drawn[one] == drawn[other]).mean() < 0.6


def test_each_row_keeps_all_but_so_many_heads_and_others_than_the_next_row():
    kept = np.asarray(dropout(heads=2).kept_heads(6, at(jax.random.bits(jax.random.key(0), (200, 4), jnp.uint32))))
    assert kept.shape == (200, 6) and (kept.sum(1) == 4).all()
    assert (np.abs(kept.mean(0) - 4 / 6) < 4 * np.sqrt(2 / 9 / 200)).all()
    assert dropout(heads=2).kept_heads(2, at(NOISE)) is None  # a layer that would have none left


def test_left_out_heads_are_those_whose_outputs_are_zero():
    config = dataclasses.replace(mixture(HEADS).model, vocab_size=64)
    model, rows = build(config, seq_len=16), random_batch(1)
    tokens = Tokens(rows.tokens, rows.segment_ids, rows.positions)
    blocks = [*model.stack.first, *model.stack.rest]
    kept = [block.dropout.kept_heads(block.mixer.num_heads, at(NOISE[:1]))[0] for block in blocks]
    taps = [{"heads": {}, "residual": {}, "kept": one} for one in kept]
    expected = model.hidden(tokens, observer=Tapped(Everyone(), taps))[0]
    assert_close(model.hidden(dataclasses.replace(tokens, noise=NOISE[:1]))[0], expected)
    assert np.abs(np.asarray(expected - model.hidden(tokens)[0])).max() > 1e-3


@pytest.mark.parametrize("options", [RATE, HEADS], ids=["features", "heads"])
def test_scoring_leaves_out_nothing(options):
    config = dataclasses.replace(tiny().model, vocab_size=64)
    rows = random_batch(2)
    tokens = Tokens(rows.tokens, rows.segment_ids, rows.positions)
    with_it = dataclasses.replace(config, dropout=options["model.dropout"])
    np.testing.assert_array_equal(build(with_it, seq_len=16)(tokens)[0], build(config, seq_len=16)(tokens)[0])


@pytest.fixture(scope="module")
def trained(compile_cache):
    setup = program_of(tiny(BOTH))
    return setup, quick_jit(make_step(setup.blueprint, setup.tx, setup.mesh, None))


def test_what_is_left_out_follows_from_seed_and_step(trained):
    setup, step = trained
    state, batch = setup.fresh(), random_batch()
    loss = lambda state, seed: float(step(state, batch, seed=np.uint32(seed))[1]["loss/train"])
    assert loss(state, 0) == loss(state, 0)
    later = dataclasses.replace(state, step=state.step + 1)
    assert len({loss(state, 0), loss(state, 1), loss(later, 0), float(step(state, batch)[1]["loss/train"])}) == 4


MESHES = [
    pytest.param({"context": 2}, id="context 2"),
    pytest.param({"fsdp": 2, "tensor": 2}, marks=pytest.mark.slow, id="fsdp 2 x tensor 2"),
    pytest.param({"pipeline": 2}, marks=pytest.mark.slow, id="pipeline 2"),
]


@pytest.fixture(scope="module")
def alone(compile_cache):
    return two_steps(mixture({**SIZES, **DEEP, **BOTH, "optimizer.accumulate": 2}))


def test_it_is_there(alone):
    plain = two_steps(mixture({**SIZES, **DEEP, "optimizer.accumulate": 2}))
    assert abs(float(alone[2][0]["loss/train"]) - float(plain[2][0]["loss/train"])) > 1e-3


@pytest.mark.parametrize("mesh", MESHES)
def test_meshes_leave_out_the_same(mesh, alone):
    found = two_steps(mixture({**SIZES, **DEEP, **BOTH, "optimizer.accumulate": 2, "mesh": MeshConfig(**{"data": 1, **mesh})}))
    assert_same_training(found, alone)


def test_accumulation_leaves_out_the_same(alone):
    found = two_steps(mixture({**SIZES, **DEEP, **BOTH}))
    assert_close(found[2][0]["loss/train"], alone[2][0]["loss/train"])


def test_heads_that_no_layer_can_spare_are_refused():
    with pytest.raises(
        ValueError, match=r"dropout\.heads=4 must be fewer than the heads .* mixers\.softmax has 2, mixers\.moh\+softmax has 4"
    ):
        mixture({"model.dropout": DropoutConfig(heads=4)})
    with pytest.raises(ValueError, match=r"rate=1\.0"):
        DropoutConfig(rate=1.0)
