"""Attention whose queries, keys or values pass a convolution: KV-shifting, MDHA, RCMHA."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from plait.models.mixers.full.kv_shift import KVShiftConfig
from plait.models.mixers.full.mdha import MDHAConfig
from plait.models.mixers.full.rcmha import RCMHAConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.tests.models.common import layout
from plait.tests.models.mixers.full.layers import (
    LENGTH,
    WIDTH,
    X,
    build,
    by_document,
    causal_weights,
    heads,
    run,
)
from plait.tests.tolerances import assert_close


def shifted(config: KVShiftConfig, k_taps: tuple[float, float], v_taps: tuple[float, float]):
    """A layer whose heads mix the previous key and this one, and values, with these weights."""
    mixer = build(config)
    for shift, taps in ((mixer.k_shift, k_taps), (mixer.v_shift, v_taps)):
        shift.weight[...] = jnp.broadcast_to(jnp.asarray(taps, jnp.float32)[:, None], shift.weight.shape)
    return mixer


KV_SHIFT = KVShiftConfig(num_heads=4, num_kv_heads=2, head_dim=8)


@pytest.mark.proves("kv_shift")
def test_no_shift_is_softmax_attention():
    mixer, plain = shifted(KV_SHIFT, (0, 1), (0, 1)), build(SoftmaxConfig(num_heads=4, num_kv_heads=2, head_dim=8))
    plain.q, plain.k, plain.v, plain.o = mixer.q, mixer.k, mixer.v, mixer.o
    assert_close(run(mixer), run(plain))


@pytest.mark.proves("kv_shift")
@pytest.mark.parametrize("positions", [False, True], ids=["nope", "rotary"])
def test_keys_and_values_are_shifted_before_they_are_turned_and_a_document_begins_with_nothing(positions):
    config = KV_SHIFT if positions else dataclasses.replace(KV_SHIFT, positions=None)
    mixer = build(config)
    taps_k, taps_v = (np.asarray(m.weight[...], np.float64) for m in (mixer.k_shift, mixer.v_shift))
    assert len(set(taps_k.ravel())) == 4

    def turn(y):
        if not positions:
            return y
        angle = np.exp(1j * np.arange(len(y))[:, None] * 10_000.0 ** (-np.arange(4) / 4))
        z = (y[:, :4] + 1j * y[:, 4:]) * angle
        return np.concatenate([z.real, z.imag], axis=-1)

    def formula(x):
        q, k, v = heads(x, mixer.q, 4), heads(x, mixer.k, 2), heads(x, mixer.v, 2)
        before = lambda y: np.concatenate([np.zeros_like(y[:, :1]), y[:, :-1]], axis=1)
        k = taps_k[0][:, None, None] * before(k) + taps_k[1][:, None, None] * k
        v = taps_v[0][:, None, None] * before(v) + taps_v[1][:, None, None] * v
        return np.stack([causal_weights(turn(q[h]), turn(k[h // 2])) @ v[h // 2] for h in range(4)])

    assert_close(run(mixer), by_document(mixer, formula))


@pytest.mark.proves("kv_shift")
def test_three_shifted_tokens_by_hand():
    mixer = shifted(KVShiftConfig(num_heads=1, head_dim=1, positions=None), (1 / 2, 1 / 2), (1 / 4, 1 / 2))
    for row, dense in enumerate((mixer.q, mixer.k, mixer.v)):
        dense.kernel[...] = jnp.zeros((WIDTH, 1)).at[row].set(1.0)
    x, at = np.zeros((1, 3, WIDTH), np.float32), layout((3,), length=3)
    x[0, :, 0], x[0, :, 1], x[0, :, 2] = 1, (0, 2 * np.log(2), 0), (4, 8, 0)  # k' = (0, ln 2, ln 2), v' = (2, 5, 2)
    o, _ = mixer.attend(mixer.project(jnp.asarray(x), at=at, state=None)[0], at=at, state=None)
    assert_close(o[0, :, 0, 0], np.float32([2, (2 + 2 * 5) / 3, (2 + 2 * 5 + 2 * 2) / 5]))


@pytest.mark.proves("kv_shift")
def test_one_layer_is_an_induction_head():
    """With keys of the previous token and values of this one, a token finds what followed it before (theorem 1)."""
    mixer = shifted(KVShiftConfig(num_heads=1, head_dim=WIDTH, positions=None), (1, 0), (0, 1))
    for dense, factor in ((mixer.q, 200.0), (mixer.k, 1.0), (mixer.v, 1.0), (mixer.o, 1.0)):
        dense.kernel[...] = factor * jnp.eye(WIDTH)
    tokens = np.array([3, 7, 1, 9, 3])
    y = mixer(jnp.eye(WIDTH)[tokens][None], at=layout((5,), length=5), carry={}).y
    assert int(jnp.argmax(y[0, -1])) == 7
    assert float(y[0, -1, 7]) == pytest.approx(1, abs=1e-5)


def test_shifts_start_uniform_and_sum_to_one():
    mixer = build(KVShiftConfig(num_heads=4, head_dim=8), moved=False)
    for shift in (mixer.k_shift, mixer.v_shift):
        taps = np.asarray(shift.weight[...])
        assert taps.shape == (2, 4)
        assert_close(taps.sum(0), np.ones(4, np.float32))
        assert ((taps >= 0) & (taps <= 1)).all()
        assert len(set(taps[0].tolist())) == 4


@pytest.mark.parametrize("config", [MDHAConfig(num_heads=4, head_dim=8), RCMHAConfig(num_heads=4, head_dim=8)])
def test_convolutions_start_as_primers(config):
    taps = build(config, moved=False).k_conv.weight[...]
    assert_close(taps, np.broadcast_to(np.float32([[1 / 6], [1 / 6], [1 / 2]]), taps.shape))


def test_relative_scores_depend_on_distances_alone():
    """Also far from the start, where the sines of positions are near none of the first ones."""
    mixer = build(RCMHAConfig(num_heads=2, head_dim=8, position_dim=6))
    near = layout((LENGTH,), (LENGTH,), length=LENGTH)
    far = dataclasses.replace(near, positions=near.positions + 900)
    assert_close(mixer.implied_attention(X, at=far), mixer.implied_attention(X, at=near))
