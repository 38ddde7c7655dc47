"""Groups of heads that follow the norms of their keys."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.models.config import LMConfig
from plait.models.mixers.full.kdgqa import KDGQA, KDGQAConfig, allocate
from plait.tests.models import common
from plait.tests.models.common import quick_jit
from plait.tests.models.mixers.full.layers import (
    AT,
    LENGTH,
    REAL,
    WIDTH,
    X,
    build,
)
from plait.tests.tolerances import assert_close
from plait.tests.train.common import program_of, random_batch, tiny
from plait.train.step import make_step

KDGQA_CONFIG = KDGQAConfig(num_heads=8, num_kv_heads=4, head_dim=8)


def by_loops(share: np.ndarray, num_heads: int) -> list[int]:
    """The allocation, one query at a time."""
    sizes = np.round(share / share.sum() * num_heads).astype(int)
    while sizes.sum() > num_heads:
        sizes[np.argmax(sizes)] -= 1
    while sizes.sum() < num_heads:
        sizes[np.argmin(sizes)] += 1
    return sizes.tolist()


def test_queries_are_allotted_in_proportion_and_all_of_them():
    shares = np.random.default_rng(0).gamma(0.5, size=(200, 5)).astype(np.float32)
    sizes = np.asarray(quick_jit(lambda s: allocate(s, 12))(shares))
    assert (sizes.sum(-1) == 12).all() and (sizes >= 0).all()
    assert sizes.tolist() == [by_loops(share, 12) for share in shares]


def test_the_smallest_group_gets_no_query_and_equal_ones_get_as_many():
    mixer = build(KDGQA_CONFIG)
    mixer.settle({"key_norms": jnp.asarray([4.0, 1.0, 2.0, 3.0])})
    assert mixer.sizes[...].tolist() == [4, 0, 1, 3]
    assert mixer.kv_of_q().tolist() == [0, 0, 0, 0, 2, 3, 3, 3]
    mixer.settle({"key_norms": jnp.full(4, 3.0)})  # no largest and smallest: nothing is divided by 0
    assert mixer.sizes[...].tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(("statistic", "second"), [("difference", [6, 2, 0, 0]), ("average", [4, 2, 1, 1])])
def test_dynamic_groups_follow_their_statistic_every_few_steps(statistic, second):
    mixer = build(dataclasses.replace(KDGQA_CONFIG, statistic=statistic, every=2))
    norms = [jnp.asarray(n, jnp.float32) for n in ([1, 1, 1, 1], [9, 0, 0, 0], [4, 2, 1, 1], [0, 9, 0, 0])]
    seen = []
    for n in norms:
        mixer.settle({"key_norms": n})
        seen.append(mixer.sizes[...].tolist())
    assert seen[0] == seen[1] == [2, 2, 2, 2]
    assert seen[2] == seen[3] == second


def test_groups_stand_still_outside_training_and_no_output_depends_on_the_batch():
    mixer = build(KDGQA_CONFIG)
    mixer.settle({"key_norms": jnp.asarray([4.0, 1.0, 2.0, 3.0])})
    both = mixer(X, at=AT, carry={}).y
    changed = mixer(X.at[1].multiply(30.0), at=AT, carry={}).y
    np.testing.assert_array_equal(both[0], changed[0])
    assert mixer.sizes[...].tolist() == [4, 0, 1, 3]


def test_key_norms_leave_padding_out():
    mixer = build(KDGQA_CONFIG)
    norms = lambda x: mixer(x, at=AT, carry={}).counts["key_norms"]
    np.testing.assert_array_equal(norms(X), norms(jnp.where(REAL[..., None], X, 50.0)))


def test_stacked_layers_move_their_groups_by_their_own_keys():
    config = LMConfig(d_model=WIDTH, num_layers=3, pattern="kdgqa", mixers={"kdgqa": KDGQA_CONFIG}, vocab_size=8)
    model = common.build(config, seq_len=LENGTH)
    at = dataclasses.replace(AT, ids=jax.random.randint(jax.random.key(0), (2, LENGTH), 0, 8))
    _, extras = model(at)
    model.stack.settle([one.counts for one in extras])
    stacked: KDGQA = model.stack.periods[0].mixer
    assert stacked.steps[...].tolist() == [1, 1, 1]
    for layer, one in enumerate(extras):
        alone = build(KDGQA_CONFIG)
        alone.settle(one.counts["mixer"])
        assert stacked.sizes[...][layer].tolist() == alone.sizes[...].tolist()


@pytest.mark.slow
def test_groups_move_once_a_step_whatever_its_micro_batches_and_not_in_a_skipped_one():
    def after(accumulate: int) -> dict[str, np.ndarray]:
        mixer = dataclasses.replace(KDGQA_CONFIG, num_heads=4, num_kv_heads=2, head_dim=4)
        model = {"model.pattern": "kdgqa", "model.mixers": {"kdgqa": mixer}}
        setup = program_of(tiny({**model, "data.batch_size": 8, "optimizer.accumulate": accumulate}))
        step, state = quick_jit(make_step(setup.blueprint, setup.tx, setup.mesh, None)), setup.fresh()
        for bounds in (None, jnp.zeros(2)):  # a loss above 0 is out of bounds
            state, _ = step(state, random_batch(8), bounds)
        return {path.rpartition(".")[2]: np.asarray(buffer) for path, buffer in state.buffers.items()}

    whole, parts = after(1), after(2)
    assert whole["steps"].tolist() == [1, 1]
    assert whole["sizes"].tolist() == parts["sizes"].tolist() == np.where(np.argsort(whole["before"]), 4, 0).tolist()
    assert_close(parts["before"], whole["before"])
