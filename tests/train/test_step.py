"""One training step: golden numbers, accumulation, clipping, decay, averages, the guard, sigmaReparam, probes."""

import dataclasses
import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from plait.configs.probe import ProbeConfig
from plait.models.layers.linear import power_step
from plait.tests.models.common import quick_jit
from plait.tests.tolerances import assert_close
from plait.tests.train.common import changed, different_arrays, hybrid, program_of, random_batch, routed, tiny
from plait.train.probes.base import Probes
from plait.train.step import make_step

GOLDEN = Path(__file__).with_name("golden_step.json")
UPDATE = (
    "A change that should not alter training must leave these numbers. Where it should (initialisation, loss, optimizer), "
    f"say so in the change, put the new numbers in {GOLDEN.name}, and show a run."
)


class Trainee:
    """The compiled step of a config, and states it went through."""

    def __init__(self, config, probe=None, jit=quick_jit):
        self.setup = program_of(config)
        self.fresh = self.setup.fresh()
        self.step = jit(make_step(self.setup.blueprint, self.setup.tx, self.setup.mesh, probe))

    def run(self, *batches, state=None):
        """The state after these batches and the last metrics."""
        state = self.fresh if state is None else state
        for batch in batches:
            state, metrics = self.step(state, batch)
        return state, metrics


@pytest.fixture(scope="module")
def plain(compile_cache) -> Trainee:
    return Trainee(tiny())


@pytest.fixture(scope="module")
def batch():
    return random_batch()


def global_norm(tree) -> float:
    return float(np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(tree))))


def update_norm(before, after) -> float:
    return global_norm(jax.tree.map(jnp.subtract, after.params, before.params))


@pytest.mark.parametrize("name", ["softmax", "hybrid"])
def test_golden_step(name, compile_cache):
    trainee = Trainee({"softmax": tiny, "hybrid": hybrid}[name]({"steps": 60}), jit=jax.jit)
    state, metrics = trainee.run(random_batch())
    found = {
        "loss": float(metrics["loss/train"]),
        "grad_norm": float(metrics["grad/norm"]),
        "update_norm": update_norm(trainee.fresh, state),
    }
    expected = json.loads(GOLDEN.read_text()).get(name, {})
    assert found.keys() == expected.keys(), f"found {json.dumps({name: found})}. {UPDATE}"
    wrong = {k: (v, expected[k]) for k, v in found.items() if abs(v - expected[k]) > 1e-4 * abs(expected[k])}
    assert not wrong, f"(found, expected): {wrong}. {UPDATE}"


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_changes_nothing(parts, plain, batch):
    whole, expected = plain.run(batch)
    state, metrics = Trainee(tiny({"optimizer.accumulate": parts})).run(batch)
    for name in ("loss/train", "grad/norm"):
        assert_close(metrics[name], expected[name], err_msg=name)
    # After one step Adam's update is near the gradient's sign, so moments are compared: they are linear in what was accumulated.
    for (path, got), (_, want) in zip(
        jax.tree_util.tree_leaves_with_path(state.optimizer), jax.tree_util.tree_leaves_with_path(whole.optimizer), strict=True
    ):
        assert_close(got, want, err_msg=jax.tree_util.keystr(path))


def test_accumulation_weighs_tokens_not_rows(batch):
    """A micro-batch with hardly any real token counts by its tokens."""
    mask = batch.loss_mask.copy()
    mask[1::2, 1:] = 0  # the second micro-batch of two keeps one token a row
    uneven = batch._replace(loss_mask=mask)
    one, two = Trainee(tiny()).run(uneven)[1], Trainee(tiny({"optimizer.accumulate": 2})).run(uneven)[1]
    assert_close(two["loss/train"], one["loss/train"])
    assert_close(two["grad/norm"], one["grad/norm"])


def test_auxiliary_losses_are_in_the_metrics_and_survive_accumulation(batch):
    config = routed({"model.z_loss": 1e-3})
    _, metrics = Trainee(config).run(batch)
    assert float(metrics["loss/z"]) > 0 and float(metrics["loss/balance/moh"]) > 0
    assert "loss/z" not in Trainee(tiny()).run(batch)[1]
    _, parts = Trainee(changed(config, {"optimizer.accumulate": 2})).run(batch)
    assert_close(parts["loss/z"], metrics["loss/z"])


def test_clipping_bounds_the_gradient_and_reports_the_norm_before(plain, batch):
    limit = 1e-3
    state, metrics = Trainee(tiny({"optimizer.clip_norm": limit})).run(batch)
    _free, expected = plain.run(batch)
    assert_close(metrics["grad/norm"], expected["grad/norm"])
    moments = optax.tree_utils.tree_get(state.optimizer, "mu")
    norm = global_norm(jax.tree.map(lambda m: m / (1 - 0.9), moments))
    assert float(expected["grad/norm"]) > limit
    assert_close(norm, np.float32(limit))


def test_weight_decay_touches_matrices_only(plain, batch):
    decayed, _ = Trainee(tiny({"optimizer.weight_decay": 0.5})).run(batch)
    free, metrics = Trainee(tiny({"optimizer.weight_decay": 0.0})).run(batch)
    rate = float(metrics["optimizer/learning_rate"])
    decays = {name: parameter.decays for name, parameter in plain.setup.blueprint.parameters().items()}
    kinds = {name: plain.fresh.params[name].ndim - name.startswith("stack.periods") for name in decays}
    assert {name: ndim >= 2 for name, ndim in kinds.items()} == decays
    for name, start in plain.fresh.params.items():
        expected = np.asarray(free.params[name]) - (rate * 0.5 * np.asarray(start) if decays[name] else 0)
        assert_close(decayed.params[name], expected, err_msg=name)


def test_average_follows_the_parameters(batch):
    trainee = Trainee(tiny({"optimizer.ema": 0.75}))
    one, _ = trainee.run(batch)
    two, _ = trainee.run(batch, state=one)
    for name, start in trainee.fresh.params.items():
        after_one = 0.75 * np.asarray(start) + 0.25 * np.asarray(one.params[name])
        assert_close(one.ema[name], after_one, err_msg=name)
        assert_close(two.ema[name], 0.75 * after_one + 0.25 * np.asarray(two.params[name]), err_msg=name)


def test_step_whose_update_is_not_finite_changes_nothing_but_counts(batch):
    """The gradient is finite, and the optimizer makes something of it that is not."""
    trainee = Trainee(tiny())
    grow = optax.stateless(lambda updates, _: jax.tree.map(lambda u: u * jnp.float32(jnp.inf), updates))
    step = quick_jit(make_step(trainee.setup.blueprint, optax.chain(trainee.setup.tx, grow), trainee.setup.mesh, None))
    state = dataclasses.replace(trainee.fresh, optimizer=(trainee.fresh.optimizer, optax.EmptyState()))
    after, metrics = step(state, batch)
    assert int(after.bad_steps) == int(metrics["optimizer/skipped_steps"]) == 1
    assert different_arrays(after.params, state.params) == []


@pytest.mark.parametrize("where", ["parameter", "gradient only", "one token of one row"])
def test_step_that_is_not_finite_changes_nothing_but_counts(where, plain, batch):
    state, _ = plain.run(batch)
    if where == "parameter":
        poisoned = {name: p.at[(0,) * p.ndim].set(jnp.nan) if name == "norm.scale" else p for name, p in state.params.items()}
    elif where == "gradient only":  # a finite loss (the row is hardly predicted), a gradient beyond float32
        poisoned = {name: p * 1e25 if name == "head.kernel" else p for name, p in state.params.items()}
    else:
        unseen = int(batch.tokens[0, 0])
        poisoned = {name: p.at[unseen].set(jnp.inf) if name == "embedding" else p for name, p in state.params.items()}
    state = dataclasses.replace(state, params=poisoned)
    after, metrics = plain.run(batch, state=state)
    assert int(after.step) == int(state.step) + 1 and int(after.bad_steps) == int(after.skipped) == 1
    assert int(metrics["bad_steps"]) == int(metrics["optimizer/skipped_steps"]) == 1
    same = dataclasses.replace(after, step=state.step, bad_steps=state.bad_steps, skipped=state.skipped)
    assert different_arrays(same, state) == []
    healed = dataclasses.replace(after, params=plain.fresh.params)
    again, metrics = plain.run(batch, state=healed)
    assert int(again.bad_steps) == 0 and int(again.skipped) == 1, "the count in a row starts anew, the total stays"
    assert different_arrays(again.params, healed.params)


@pytest.mark.parametrize(
    ("make", "sets", "steps"),
    [(routed, ["all"], 2), pytest.param(hybrid, ["default", "all"], 50, marks=pytest.mark.slow)],
    ids=["routed", "hybrid"],
)
def test_probing_does_not_change_training(make, sets, steps, compile_cache):
    """Bit for bit, by the emitters that users get: what probes compute hangs beside the step, stopped from flowing back."""
    older = "use_fusion_emitters=false" in os.environ["XLA_FLAGS"]
    as_users = functools.partial(jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": True} if older else None)
    batches = [random_batch(seed=step % 5) for step in range(steps)]
    state, metrics = Trainee(make(), jit=as_users).run(*batches)
    for only in sets:
        probed = Trainee(make(), Probes(ProbeConfig(rows=8, sequences=2, only=only)), jit=as_users)
        seen, more = probed.run(*batches)
        assert more.keys() - metrics.keys() == {"statistics"}
        heads = [len(mixer.head_kinds(make().model.d_model)) for mixer in make().model.layer_mixers]
        assert [layer["entropy"].shape for layer in more["statistics"]] == [(count,) for count in heads]
        assert different_arrays(seen, state) == [], only
    assert {"token_rank", "spectral_norm", "gradient_start"} <= more["statistics"][0].keys()


def test_singular_vectors_move_once_a_step_whatever_the_accumulation(batch):
    """And before the step's loss, so that sigma(W) is that of the weights in use."""
    config = tiny({"model.sigma_reparam": "one", "optimizer.accumulate": 2})
    trainee = Trainee(config)
    state, _ = trainee.run(batch)
    kernels = [name for name in trainee.fresh.params if name.removesuffix("kernel") + "u" in trainee.fresh.buffers]
    assert len(kernels) == len(trainee.fresh.buffers) // 2 > 0
    for name in kernels:
        stem = name.removesuffix("kernel")
        v, u = power_step(trainee.fresh.params[name], trainee.fresh.buffers[stem + "u"])
        assert_close(state.buffers[stem + "v"], v, err_msg=name)
        assert_close(state.buffers[stem + "u"], u, err_msg=name)
