"""Loads of experts and heads, and the event of their collapse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.models.build import BuildContext
from plait.models.channel_mixers.moe import MoEConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.moh import MoHConfig
from plait.tests.models.common import layout
from plait.tests.tolerances import assert_close
from plait.tests.train.probes.test_probes import look_at, measure
from plait.train.probes.base import PROBES
from plait.train.probes.collect import probe_metrics
from plait.train.probes.expert_load import COLLAPSE

BLANK = np.zeros((1, 2, 3, 3))


def of_experts(*shares):
    shares = jnp.asarray(shares, jnp.float32)
    look = dataclasses.replace(look_at(BLANK, [[3]]), channels={"expert_load": shares / shares.mean(), "expert_share": shares})
    return measure("expert_load", look)


def test_expert_load_by_hand():
    """Two of four experts a token: even is half; three quarters is half of the way."""
    found = of_experts(0.75, 0.5, 0.75, 0.0)
    assert_close(found["expert_load_most"], np.float32(1.5))
    assert_close(found["expert_load_least"], np.float32(0))
    assert_close(found["expert_concentration"], np.float32(0.5))
    assert_close(of_experts(1, 0, 1, 0)["expert_concentration"], np.float32(1))
    assert_close(of_experts(0.25, 0.25, 0.25, 0.25)["expert_concentration"], np.float32(0))
    assert np.isnan(of_experts(1, 1)["expert_concentration"]), "there is nothing to choose"


def test_head_load_is_that_of_routed_heads():
    """A routed head that every token uses is no shared one."""
    look = look_at(np.zeros((1, 4, 3, 3)), [[3]], load=jnp.float32([1, 1, 0.25, 0.25]), routed_load=jnp.float32([1, 0.25, 0.25]))
    found = measure("head_load", look)
    assert_close(found["head_load_most"], np.float32(1))
    assert_close(found["head_concentration"], np.float32(1))
    arrays = {name: np.asarray(value)[None] for name, value in found.items()}
    assert probe_metrics(arrays, [PROBES["head_load"]()]) == {"moh/max_load": 1.0, "moh/concentration": 1.0}
    assert "head_load_most" not in measure("head_load", look_at(BLANK, [[3]]))


def test_shares_are_of_the_tokens_that_are_no_padding():
    """Of the mixers themselves, against their own choices."""
    ctx = lambda: BuildContext(rngs=nnx.Rngs(0), seq_len=8)
    at, x = layout((5, 2), (3,), length=8), jax.random.normal(jax.random.key(0), (2, 8, 16))
    experts = MoEConfig(num_experts=4, top_k=2, hidden_dim=8).build(16, ctx())
    scores = np.asarray(x @ experts.router.weight())[np.asarray(at.segment_ids) > 0]
    chosen = np.argsort(-scores, -1)[:, :2]
    expected = [(chosen == expert).any(-1).mean() for expert in range(4)]
    assert_close(experts(x, at=at).observed["expert_share"], np.float32(expected))
    heads = MoHConfig(mixer=SoftmaxConfig(num_heads=4, head_dim=4), num_shared_heads=1, top_k=1).build(16, ctx())
    inputs, _ = heads.project(x, at=at, state=None)
    told = heads.observe(inputs, x, at=at)
    used = np.argmax(np.asarray(x @ heads.routed_router.weight()), -1)[np.asarray(at.segment_ids) > 0]
    assert_close(told["routed_load"], np.float32([(used == head).mean() for head in range(3)]))
    assert_close(told["load"], np.concatenate([[1.0], told["routed_load"]]))


@pytest.mark.parametrize(("probe", "statistic"), [("expert_load", "expert_concentration"), ("head_load", "head_concentration")])
def test_collapse_of_a_layers_load_is_an_event_with_its_step(probe, statistic):
    (watcher,) = PROBES[probe]().watchers(())
    history = [
        (0, [0.1, np.nan]),
        (50, [0.5, np.nan]),
        (100, [COLLAPSE + 0.05, np.nan]),
        (150, [1.0, np.nan]),
        (200, [0.1, np.nan]),
    ]
    events = [event for step, values in history for event in watcher.update(step, {statistic: np.float32(values)})]
    assert [(event.step, event.kind, event.layer, event.head) for event in events] == [(100, "load_collapse", 0, None)]
    assert "layer 0" in events[0].message
