"""Probes that take all layers: rollout, WAAD and FAI."""

import jax
import numpy as np
import pytest

from plait.configs.probe import ProbeConfig
from plait.tests.tolerances import assert_close
from plait.tests.train.common import program_of, random_batch, tiny
from plait.tests.train.probes.test_probes import look_at
from plait.train.probes.base import Probes, statistics
from plait.train.step import make_step

T = 64
RNG = np.random.default_rng(0)


def measured(only, layers, documents, **options):
    """The statistics of layers with these weights."""
    observer = Probes(ProbeConfig(only=only, **options))
    return observer.across([observer.measure((look_at(weights, documents),)) for weights in layers])


def drawn(batch, heads, length=T):
    """Causal weights `[B, H, T, T]` of random rows."""
    a = np.exp(2 * RNG.normal(size=(batch, heads, length, length))) * np.tri(length)
    return a / a.sum(-1, keepdims=True)


def test_what_rests_on_the_first_token_is_rolled_out_by_halves():
    first = np.zeros((1, 2, T, T))
    first[..., 0] = 1
    found = measured("rollout", [first] * 3, [[T]])
    assert_close(np.array([layer["rollout_first"] for layer in found]), np.float32([1 / 2, 3 / 4, 7 / 8]))
    two = lambda p: np.exp(-p * np.log(p) - (1 - p) * np.log(1 - p))
    assert_close(np.array([layer["rollout_tokens"] for layer in found]), two(np.array([1 / 2, 3 / 4, 7 / 8])))


def test_rollout_of_several_layers():
    """Against products in float64; a sequence that begins with a shorter piece is left out, and so is what comes after 64 tokens."""
    layers = [np.pad(drawn(3, heads), ((0, 0), (0, 0), (0, 6), (0, 6))) for heads in (2, 3, 1)]
    found = measured("rollout", layers, [[70], [63, 7], [64, 6]])
    rolled = np.eye(T)[None]
    for layer, weights in zip(found, layers, strict=True):
        mixed = weights[[0, 2], :, :T, :T].mean(1) + np.eye(T)
        rolled = mixed / mixed.sum(-1, keepdims=True) @ rolled
        row = rolled[:, -1]
        assert_close(layer["rollout_first"], np.float32(row[:, 0].mean()))
        assert_close(layer["rollout_tokens"], np.float32(np.exp(-(row * np.log(row)).sum(-1)).mean()))


def test_waad_and_fai_of_several_layers():
    """Against maps averaged over the sets of heads, in float64: 3 of 10 heads are local, 3 global, from any layer."""
    layers = [drawn(3, heads) for heads in (4, 1, 5)]
    layers[0][:, 1] = np.eye(T)
    layers[2][:, 3] = np.eye(T)[np.maximum(np.arange(T) - 1, 0)]
    *empty, last = measured("waad_fai", layers, [[64], [40, 20], [64]], waad_window=7, fai_from=5, fai_to=20)
    assert empty == [{}, {}], "one value of the model"
    heads = np.concatenate(layers, axis=1)[[0, 2]]
    lag = np.subtract.outer(np.arange(T), np.arange(T)) * np.tri(T)
    order = np.argsort((heads * lag).sum(-1).mean((0, 2)))
    local, wide = heads[:, order[:3]].mean(1), heads[:, order[-3:]].mean(1)
    assert set(order[:2]) == {1, 8}
    waad = (local * np.minimum(lag, 7)).sum(-1)
    fai = [[wide[b, s + 5 : min(T, s + 21), s].mean() for s in range(T - 5)] for b in range(2)]
    assert_close(last["waad"], np.float32(waad.mean()))
    assert_close(last["waad_peak"], np.float32(waad.max(-1).mean()))
    assert_close(last["fai_peak"], np.float32(np.max(fai, -1).mean()))
    far = measured("waad_fai", layers, [[64], [40, 20], [64]], fai_from=64, fai_to=80)[-1]
    assert "fai_peak" not in far and np.isfinite(far["waad"])


@pytest.mark.parametrize("only", ["rollout", "waad_fai"])
def test_without_a_sequence_of_64_tokens_there_is_none(only):
    (layer,) = measured(only, [drawn(1, 2)], [[40, 24]])
    assert layer and all(np.isnan(value) for value in layer.values())
    assert measured(only, [drawn(1, 2, 63)], [[63]]) == [{}]


def test_a_step_gives_them_and_not_what_they_are_made_of():
    """Of every layer, with the loss mask that the lookback ratio needs; traced alone."""
    config = tiny({"data.seq_len": T, "probe.only": "rollout,waad_fai,lookback,entropy"})
    setup = program_of(config, 32)
    step = make_step(setup.blueprint, setup.tx, setup.mesh, Probes(config.probe))
    layers = jax.eval_shape(step, setup.like, random_batch(config.data.batch_size, T, 32))[1]["statistics"]
    assert {name for layer in layers for name in layer} <= statistics().keys()
    assert all({"rollout_first", "lookback_ratio", "entropy"} <= layer.keys() for layer in layers)
    assert ["waad" in layer for layer in layers] == [False] * (len(layers) - 1) + [True]


def test_horizons_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match=r"fai_from=60 must be at most fai_to=50, .*; use fai_from=50 or less"):
        ProbeConfig(fai_from=60)
