"""Differential attention: its weights, its groups, and three tokens by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.models.config import LMConfig
from plait.models.mixers.full.diff import DiffConfig
from plait.models.mixers.full.diff_v2 import DiffV2Config
from plait.models.mixers.full.shared_diff import SharedDiffConfig
from plait.tests.models import common
from plait.tests.models.common import layout
from plait.tests.models.mixers.full.layers import LENGTH, WIDTH, build, by_document, causal_weights, heads, matrix, run
from plait.tests.tolerances import assert_close


def test_differential_weights_start_at_the_value_of_their_layer():
    config = DiffConfig(num_heads=2, head_dim=8)
    starts = []
    for layer in range(3):
        mixer = build(config, layer, moved=False)
        mixer.vectors[...] = jnp.zeros_like(mixer.vectors[...])
        starts.append(float(mixer.weight()))
    assert_close(np.array(starts), np.array([0.2, 0.355509067591, 0.470713018344]), dtype="float32")  # 0.8 - 0.6 exp(-0.3 layer)


def test_stacked_layers_have_the_weights_of_their_depth():
    model = LMConfig(
        d_model=WIDTH, num_layers=3, pattern="diff", mixers={"diff": DiffConfig(num_heads=2, head_dim=8)}, vocab_size=8
    )
    block = common.build(model, seq_len=LENGTH).stack.periods[0]
    assert_close(block.mixer.start[...], np.float32(0.8 - 0.6 * np.exp(-0.3 * np.arange(3))))


def test_heads_are_scaled_by_the_start_of_the_weight_not_by_the_weight():
    mixer = build(DiffConfig(num_heads=2, head_dim=8), layer=2)
    o = jax.random.normal(jax.random.key(1), (1, 3, 2, 16))
    assert abs(float(mixer.weight()) - float(mixer.start[...])) > 0.1
    assert_close(mixer.finish(o, None, None), (1 - (0.8 - 0.6 * np.exp(-0.6))) * mixer.norm(o))


def test_both_maps_of_a_head_use_the_keys_of_its_group():
    """Queries of a head stand side by side: a layout by halves would give its maps two groups of keys."""
    mixer = build(DiffV2Config(num_heads=4, num_kv_heads=2, head_dim=8, positions=None))

    def formula(x):
        q, k, v = heads(x, mixer.q, 8), heads(x, mixer.k, 2), heads(x, mixer.v, 2)
        weight = 1 / (1 + np.exp(-x @ matrix(mixer.weight)))
        maps = [causal_weights(q[i], k[i // 4]) for i in range(8)]
        return np.stack([(maps[2 * h] - weight[:, [h]] * maps[2 * h + 1]) @ v[h // 2] for h in range(4)])

    assert_close(run(mixer), by_document(mixer, formula))


@pytest.mark.proves("shared_diff")
def test_shared_bases_are_the_summed_matrices_of_plain_differential_attention():
    shared = build(SharedDiffConfig(num_heads=4, num_kv_heads=2, head_dim=8, rank=3), layer=1)
    plain = build(DiffConfig(num_heads=4, num_kv_heads=2, head_dim=8), layer=1)
    for name, number in (("q", 4), ("k", 2)):
        changes = [base[0].kernel[...] @ base[1].kernel[...] for base in getattr(shared, f"{name}_changes")]
        summed = [(getattr(shared, name).kernel[...] + change).reshape(WIDTH, number, 8) for change in changes]
        getattr(plain, name).kernel[...] = jnp.stack(summed, axis=2).reshape(WIDTH, -1)
    plain.v, plain.o, plain.vectors, plain.norm = shared.v, shared.o, shared.vectors, shared.norm
    assert_close(run(shared), run(plain))


@pytest.mark.proves("shared_diff")
def test_three_tokens_of_shared_differential_attention_by_hand():
    mixer = build(SharedDiffConfig(num_heads=1, head_dim=1, rank=1, positions=None))
    unit = lambda row, out: jnp.zeros((WIDTH, out)).at[row].set(1.0)
    mixer.q.kernel[...], mixer.k.kernel[...] = unit(0, 1), unit(1, 1)
    mixer.v.kernel[...] = jnp.zeros((WIDTH, 2)).at[2, 0].set(1.0).at[3, 1].set(1.0)
    for changes, row in ((mixer.q_changes, 4), (mixer.k_changes, 5)):
        for (down, up), factor in zip(changes, (0.0, 1.0), strict=True):  # the second map sees one more channel
            down.kernel[...], up.kernel[...] = unit(row, 1), jnp.full((1, 1), factor)
    mixer.vectors[...] = jnp.zeros_like(mixer.vectors[...])  # the weight is 0.2
    ln = np.log
    x = np.zeros((1, 3, WIDTH), np.float32)
    x[0, :, 0], x[0, :, 1] = 1, (0, ln(2), ln(4))  # odds of the first map 1 : 2 : 4
    x[0, :, 5] = (0, -ln(2), -ln(4))  # and of the second 1 : 1 : 1
    x[0, :, 2], x[0, :, 3] = (7, 14, 21), (1, 0, 0)
    o = mixer.attend(
        mixer.project(jnp.asarray(x), at=layout((3,), length=3), state=None)[0], at=layout((3,), length=3), state=None
    )[0]
    means = [(7, 7), ((7 + 2 * 14) / 3, 10.5), ((7 + 2 * 14 + 4 * 21) / 7, 14)]
    firsts = [(1, 1), (1 / 3, 1 / 2), (1 / 7, 1 / 3)]
    expected = [[a - 0.2 * b, c - 0.2 * d] for (a, b), (c, d) in zip(means, firsts, strict=True)]
    assert_close(o[0, :, 0], np.float32(expected))
