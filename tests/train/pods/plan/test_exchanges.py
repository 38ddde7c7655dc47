"""What parts of rows send each other, read from traced layers: by hand, against a compiled program, and which way is named the best."""

import dataclasses
from typing import Any

import jax
import pytest

from plait.configs.mesh import MeshConfig
from plait.configs.vocabulary import with_vocabulary
from plait.kernels.context import Exchange
from plait.models.mixers.base import MixerConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.gated_deltanet import GatedDeltaNetConfig
from plait.models.mixers.linear.gla import GLAConfig
from plait.tests.train.common import changed, tiny
from plait.train.mesh import make_mesh
from plait.train.pods.plan.compiled.hlo import collectives
from plait.train.pods.plan.exchanges import exchanges, layer_collectives, traced
from plait.train.pods.plan.planning import make_plan
from plait.train.pods.plan.report import sections
from plait.train.pods.plan.topology import parse_target
from plait.train.program import Program

D, T, N = 64, 512, 4
PART = 2 * (T // N) * 2 * 16  # bytes in bfloat16 of a part's keys, two heads of 16 channels


def sent(mixer: MixerConfig, exchange: Exchange, *, backward: bool = False) -> dict[str, float]:
    """Bytes of the full arrays by kind, of arrays of tokens and states: segments and positions are left out."""
    found: dict[str, float] = {}
    for one in traced(mixer, D, True, "bfloat16", T, (N, 1), exchange, None):
        if one.kind is not None and one.backward == backward and one.bytes > 4 * T:
            found[one.kind] = found.get(one.kind, 0.0) + one.times * one.bytes
    return found


def test_full_attention_by_hand():
    """Four heads, two key heads: q and o are twice as large as k; turned are halves."""
    mixer = SoftmaxConfig(num_heads=4, num_kv_heads=2, head_dim=16)
    assert sent(mixer, "gather") == {"all-gather": 2 * N * PART, "collective-permute": 2 * PART}
    assert sent(mixer, "gather", backward=True) == {"reduce-scatter": 2 * N * PART, "collective-permute": 2 * PART}
    turned = (2 + 2 + 1 + 1) / 2 * PART
    assert sent(mixer, "ring") == {"collective-permute": (N - 1) * 2 * PART + turned}
    back = sent(mixer, "ring", backward=True)["collective-permute"]
    assert back == (N - 1) * 2 * PART + N * 2 * 2 * PART + turned  # gradients in float32
    assert sent(mixer, "all_to_all") == {"all-to-all": (2 + 2 + 2 + 2) * PART}  # a key head goes to two devices


def test_states_by_hand():
    linear = GLAConfig(num_heads=2)  # of 16 key and 32 value channels
    state = 4 * 2 * 16 * 32
    assert sent(linear, "ring", backward=True) == sent(linear, "ring") == {"collective-permute": (N - 1) * state}
    assert sent(linear, "gather") == {"all-gather": N * (state + 4 * 2 * (16 + 4))}  # with the decay and the segments of its ends
    assert sent(linear, "all_to_all") == sent(linear, "gather")


def test_a_window_is_the_same_by_each_way():
    window = SoftmaxConfig(num_heads=4, head_dim=16, window_size=100)
    found = [sent(window, exchange) for exchange in ("gather", "ring", "all_to_all")]
    assert found[0] == found[1] == found[2] == {"collective-permute": 2 * 2 * 99 * 4 * 16}


def config_of(exchange: Exchange, **mixers: MixerConfig):
    config = tiny({"mesh": MeshConfig(data=1, context=N, context_exchange=exchange), "data.seq_len": 256, "data.batch_size": 2})
    model = dataclasses.replace(config.model, pattern=",".join(mixers), num_layers=len(mixers), mixers=mixers)
    return with_vocabulary(changed(config, {"model": model}))


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_the_compiled_step_sends_no_more(exchange: Exchange):
    """And what it sends less are segments that are the same for all layers, and sums of what others sum too."""
    config = config_of(
        exchange, softmax=SoftmaxConfig(num_heads=2, head_dim=8), gated_deltanet=GatedDeltaNetConfig(num_heads=2, head_dim=8)
    )
    mesh = make_mesh(config.mesh, jax.devices()[:N])
    text = Program.of(config, mesh).lower(None).compile().as_text() or ""
    kinds = {"all-gather", "reduce-scatter", "collective-permute"}
    compiled = sum(one.bytes for one in collectives(text, mesh) if one.kind in kinds)
    traced = sum(one.bytes for one in layer_collectives(config, mesh, parse_target("cpu:4"), exchange) if one.kind in kinds)
    assert 0.85 * traced < compiled <= traced * 1.001


def test_the_best_way_is_named(monkeypatch: pytest.MonkeyPatch):
    """Over one H100 host: heads dealt out send least; those that cannot be go round."""
    target = parse_target("h100x4")
    ranked = {}
    for heads in (2, 4):
        config = config_of("gather", softmax=SoftmaxConfig(num_heads=heads, head_dim=16))
        mesh = make_mesh(config.mesh, jax.devices()[:N])
        ranked[heads] = {one.exchange: one for one in exchanges(config, mesh, target)}
    assert next(iter(ranked[4])) == "all_to_all" and not ranked[4]["all_to_all"].alike
    assert list(ranked[2])[-1] == "all_to_all" and ranked[2]["all_to_all"].alike
    for found in ranked.values():
        assert found["ring"].exposed < found["ring"].seconds, "what goes round is beside attention"
        assert found["ring"].held < found["gather"].held and found["ring"].merging > 0 == found["gather"].merging
        assert found["gather"].exposed == found["gather"].seconds


def test_the_report_says_so(monkeypatch: pytest.MonkeyPatch):
    config = config_of("ring", softmax=SoftmaxConfig(num_heads=2, head_dim=8))
    plan = make_plan(config, parse_target("cpu:4"))
    assert plan.exchanges == []
    found = exchanges(config, make_mesh(config.mesh, jax.devices()[:N]), parse_target("h100x4"))
    told: Any = next(one for one in sections(dataclasses.replace(plan, exchanges=found)) if "parts of rows" in one.title)
    assert told.notes[0].startswith(f"By estimate the best is mesh.context_exchange={found[0].exchange}")
    assert [row[0] for row in told.rows if row[0].endswith("as planned")] == ["ring, as planned"]
