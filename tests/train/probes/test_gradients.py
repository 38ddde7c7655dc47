"""What probes of gradients read in the backward pass, against gradients of perturbations that are put in by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.configs.mesh import MeshConfig
from plait.configs.probe import ProbeConfig
from plait.data.batch import Batch
from plait.kernels import Tokens
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.base_conv import BaseConvConfig
from plait.models.mixers.linear.mamba2 import Mamba2Config
from plait.models.mixers.moh import MoHConfig
from plait.models.mixers.parallel.parallel import ParallelConfig
from plait.models.qk_clip import QKClipConfig
from plait.models.stream import Stream
from plait.tests.models.common import layout, quick_jit
from plait.tests.tolerances import assert_close, assert_statistics_close
from plait.tests.train.common import changed, hybrid, mixture, program_of
from plait.tests.train.test_mesh import _smooth
from plait.train.mesh import batch_sharding
from plait.train.probes.base import PROBES, Probes
from plait.train.step import make_step

LENGTH, VOCAB = 80, 64
PROBED = Probes(ProbeConfig(only="gradient_sinks,head_importance"))
DOCUMENTS = ((48, 32), (33, 20), (LENGTH,), (5, 35))
UNBALANCED = MoHConfig(mixer=SoftmaxConfig(num_heads=4, head_dim=4), balance=0.0)
"""Without the loss that no document has to itself, nor a micro-batch."""
PARTS = (SoftmaxConfig(num_heads=2, head_dim=8), BaseConvConfig(expand=1), Mamba2Config.example())


def of(config, **changes):
    """An experiment of these rows, its norms as in the tests of meshes."""
    mixers = {name: _smooth(mixer) for name, mixer in config.model.mixers.items()}
    return changed(config, {"data.seq_len": LENGTH, "model.mixers": mixers, "model.z_loss": 1e-3} | changes)


MODEL = dataclasses.replace(
    hybrid().model,
    num_layers=3,
    pattern="gated_deltanet,moh+softmax,parallel",
    mixers={
        **hybrid().model.mixers,
        "moh+softmax": UNBALANCED,
        "parallel": ParallelConfig(parts=PARTS),
    },
)
CONFIG = of(dataclasses.replace(hybrid(), model=MODEL))
REPEATED = of(mixture({"model.mixers.moh+softmax": UNBALANCED}), **{"model.num_layers": 4, "data.batch_size": 8})


def rows(*documents):
    """A batch of rows of these documents, the rest padding."""
    at = layout(*documents, length=LENGTH)
    rng = np.random.default_rng(1)
    tokens, targets = (rng.integers(0, VOCAB, at.segment_ids.shape, np.int32) for _ in range(2))
    segment_ids, positions = np.asarray(at.segment_ids), np.asarray(at.positions)
    return Batch(tokens, targets, segment_ids, positions, (segment_ids > 0).astype(np.float32))


def probed(config, devices=1):
    """The statistics of gradients in the first step of a run, and what it began with."""
    setup = program_of(config, devices=devices)
    state = setup.fresh()
    state = dataclasses.replace(state, params={**state.params, "embedding": 50 * state.params["embedding"]})
    batch = rows(*DOCUMENTS * (config.data.batch_size // len(DOCUMENTS)))
    step = quick_jit(make_step(setup.blueprint, setup.tx, setup.mesh, PROBED), out_shardings=(setup.shardings, None))
    places = batch_sharding(setup.mesh, config.data.batch_size, LENGTH, config.optimizer.accumulate)
    return step(state, jax.device_put(batch, places))[1]["statistics"], setup, state, batch


@pytest.fixture(scope="module")
def alone(compile_cache):
    return probed(CONFIG)


def losses(model, batch, shifts):
    """The loss of each token, with something added to the residual stream after each block: the blocks in turn, and a plain softmax."""
    at = Tokens(batch.tokens, batch.segment_ids, batch.positions)
    stream, balance = model._embed(at), 0.0
    for block, shift in zip([*model.stack.first, *model.stack.rest], shifts, strict=True):
        stream, extras = block(stream, at=at)
        stream, balance = Stream(stream.x + shift, stream.carry), balance + sum(extras.losses.values())
    logits = jnp.einsum("btd,dv->btv", model._final(stream), model.head_weight())
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    nll = normaliser - jnp.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
    return nll + 1e-3 * jnp.square(normaliser), balance


def test_gradient_sinks_are_those_of_what_is_added_to_the_stream(alone):
    found, setup, state, batch = alone
    real = batch.segment_ids > 0

    @quick_jit
    def gradients(shifts):
        def loss(shifts):
            each, balance = losses(setup.blueprint.build(state.params, state.buffers), batch, shifts)
            return (each * real).sum() / real.sum() + balance

        return jax.grad(loss)(shifts)

    shape = (*batch.tokens.shape, CONFIG.model.d_model)
    for layer, gradient in zip(found, gradients([jnp.zeros(shape)] * 3), strict=True):
        norms = np.linalg.norm(np.asarray(gradient, np.float64), axis=-1)
        start = real & (batch.positions == 0)
        assert_close(layer["gradient_start"], norms[start].mean() / norms[real & ~start].mean())
        pieces = [
            norms[row][batch.segment_ids[row] == one]
            for row, lengths in enumerate(DOCUMENTS)
            for one, length in enumerate(lengths, 1)
            if length >= 32
        ]
        assert len(pieces) == 5
        assert_close(layer["gradient_largest"], np.mean([piece.max() / piece.sum() for piece in pieces]))
        assert_close(layer["gradient_largest_is_first"], np.mean([piece.argmax() == 0 for piece in pieces]))


def test_head_importance_is_that_of_a_mask_in_each_document(alone):
    """The derivative by a factor of the head's rows of the output projection; the loss of a document depends on its own tokens alone."""
    found, setup, state, batch = alone
    blocks = [["mixer.o.kernel"], ["mixer.inner.o.kernel"], ["mixer.parts.0.o.kernel", "mixer.parts.2.o.kernel"]]
    names = [[f"stack.rest.{layer}.{name}" for name in each] for layer, each in enumerate(blocks)]
    heads = {name: count for each, counts in zip(names, [(2,), (4,), (2, 2)]) for name, count in zip(each, counts, strict=True)}
    total = batch.loss_mask.sum()

    def masked(masks, mask):
        params = dict(state.params)
        for name, one in masks.items():
            kernel = params[name]
            params[name] = (kernel.reshape(len(one), -1, kernel.shape[-1]) * one[:, None, None]).reshape(kernel.shape)
        each, _ = losses(setup.blueprint.build(params, state.buffers), batch, [0.0] * 3)
        return (each * mask).sum() / total

    derivative = quick_jit(jax.grad(masked))
    masks = {name: jnp.ones(count) for name, count in heads.items()}
    importance = {name: np.zeros(count) for name, count in heads.items()}
    for row, lengths in enumerate(DOCUMENTS):
        for one in range(1, len(lengths) + 1):
            mask = np.zeros(batch.tokens.shape, np.float32)
            mask[row] = batch.segment_ids[row] == one
            for name, value in derivative(masks, mask).items():
                importance[name] += np.abs(np.asarray(value, np.float64))
    for layer, each in zip(found, names, strict=True):
        expected = np.concatenate([importance[name] for name in each])
        assert_close(layer["head_importance"], expected / np.linalg.norm(expected))


def test_heads_that_are_not_tapped_have_no_importance():
    probe = PROBES["head_importance"]()
    sums = jnp.asarray([[3.0, 2.0], [0.0, 0.0], [4.0, 2.0]])
    assert_statistics_close(probe.conclude(sums)["head_importance"], np.float32([0.6, np.nan, 0.8]))
    for name in ("head_importance", "gradient_sinks"):
        blank = {"head_importance": (3, 2), "gradient_sinks": (7,)}[name]
        for value in PROBES[name]().conclude(jnp.zeros(blank)).values():
            assert np.isnan(value).all()


@pytest.fixture(scope="module")
def repeated(compile_cache):
    return probed(REPEATED)[0]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"optimizer.accumulate": 2, "model.remat": "full"}, id="accumulation and recomputation"),
        pytest.param({"mesh": MeshConfig(data=2, fsdp=2, tensor=2)}, id="eight devices"),
        pytest.param({"model.qk_clip": QKClipConfig(threshold=1e9)}, id="a layer that looks at itself"),
        pytest.param({"mesh": MeshConfig(data=2, pipeline=2), "optimizer.accumulate": 4}, marks=pytest.mark.slow, id="pipeline"),
        pytest.param({"mesh": MeshConfig(data=2, context=4)}, marks=pytest.mark.slow, id="context"),
    ],
)
def test_statistics_do_not_depend_on_how_the_step_is_run(changes, repeated):
    found = probed(changed(REPEATED, changes), devices=8)[0]
    assert len(found) == len(repeated) == 4
    for layer, (got, want) in enumerate(zip(found, repeated, strict=True)):
        assert got.keys() == want.keys() == {one.name for probe in PROBED.probes for one in probe.statistics}
        for name in want:
            assert np.isfinite(want[name]).all()
            assert_statistics_close(got[name], want[name], err_msg=f"layer {layer} {name}")
