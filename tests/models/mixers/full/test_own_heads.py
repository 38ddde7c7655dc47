"""Attention whose queries, keys and values have heads of their own: DiffQKV, MHE."""

import dataclasses

import numpy as np
import pytest

from plait.models.mixers.full.diff_qkv import DiffQKVConfig
from plait.models.mixers.full.mhe import MHEConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.tests.models.mixers.full.layers import (
    WIDTH,
    build,
    by_document,
    causal_weights,
    heads,
    matrix,
    run,
)
from plait.tests.tolerances import assert_close


@pytest.mark.proves("diff_qkv")
@pytest.mark.parametrize(("num_k_heads", "num_v_heads"), [(2, 4), (4, 2), (1, 8)])
def test_query_head_h_meets_key_h_hk_over_h_and_value_h_hv_over_h(num_k_heads, num_v_heads):
    """Repeated in a row, not tiled."""
    config = DiffQKVConfig(
        num_heads=8, num_k_heads=num_k_heads, num_v_heads=num_v_heads, head_dim=8, positions=None, augmented_q=1.5
    )
    mixer = build(config)

    def formula(x):
        silu = lambda y: y / (1 + np.exp(-y))
        mlp, q = mixer.q_mlp, x @ matrix(mixer.q)
        q = (silu(q @ matrix(mlp.gate)) * (q @ matrix(mlp.up))) @ matrix(mlp.down)
        q, k, v = q.reshape(len(x), 8, 8), heads(x, mixer.k, num_k_heads), heads(x, mixer.v, num_v_heads)
        meets = lambda h, number: h * number // 8
        return np.stack([causal_weights(q[:, h], k[meets(h, num_k_heads)]) @ v[meets(h, num_v_heads)] for h in range(8)])

    assert_close(run(mixer), by_document(mixer, formula))


@pytest.mark.proves("diff_qkv")
def test_narrow_keys_are_widened_by_head():
    config = DiffQKVConfig(num_heads=4, num_k_heads=2, num_v_heads=4, head_dim=8, k_head_dim=4, positions=None, augmented_q=None)
    mixer = build(config)

    def formula(x):
        q, k, v = heads(x, mixer.q, 4), heads(x, mixer.k, 2), heads(x, mixer.v, 4)
        k = k @ matrix(mixer.k_up)
        return np.stack([causal_weights(q[h], k[h // 2]) @ v[h] for h in range(4)])

    assert_close(run(mixer), by_document(mixer, formula))


def test_the_cache_of_own_heads_has_the_published_size():
    """Hk K' + Hv V numbers a token: Sigma 1.5B keeps 37.5% less than GQA of 16 heads, half of the keys' width less again."""
    per_token = lambda config: (config.state_bytes(2048, 100, "bfloat16") / 100 - 4) / 2  # 4 bytes of position
    sigma = DiffQKVConfig(num_heads=32, num_k_heads=4, num_v_heads=16, head_dim=64)
    gqa = SoftmaxConfig(num_heads=32, num_kv_heads=16, head_dim=64)
    assert per_token(sigma) == 4 * 64 + 16 * 64
    assert 1 - per_token(sigma) / per_token(gqa) == 0.375
    assert per_token(dataclasses.replace(sigma, k_head_dim=32)) == 4 * 32 + 16 * 64


@pytest.mark.proves("mhe")
@pytest.mark.parametrize("combine", ["add", "multiply"])
def test_heads_are_one_projection_and_a_vector(combine):
    mixer = build(MHEConfig(num_heads=4, head_dim=8, combine=combine, positions=None))

    def formula(x):
        def of_heads(dense, vectors):
            shared, vectors = x @ matrix(dense), np.asarray(vectors[...], np.float64)
            return [shared + e if combine == "add" else shared * (e + 1) for e in vectors]

        q, k, v = (of_heads(getattr(mixer, n), getattr(mixer, f"{n}_heads")) for n in "qkv")
        return np.stack([causal_weights(q[h], k[h]) @ v[h] for h in range(4)])

    assert_close(run(mixer), by_document(mixer, formula))


@pytest.mark.proves("mhe")
def test_multiplied_heads_are_softmax_attention_with_scaled_matrices():
    mixer, plain = build(MHEConfig(num_heads=4, head_dim=8)), build(SoftmaxConfig(num_heads=4, head_dim=8))
    for name in "qkv":
        shared, vectors = getattr(mixer, name).kernel[...], getattr(mixer, f"{name}_heads")[...]
        getattr(plain, name).kernel[...] = (shared[:, None] * (1 + vectors[None])).reshape(WIDTH, -1)
    plain.o = mixer.o
    assert_close(run(mixer), run(plain))


def test_heads_cost_three_vectors_each():
    """3HK parameters over one head's q, k and v, against 3 D K for every head of plain attention."""
    config = MHEConfig(num_heads=8, head_dim=16)
    back = 8 * 16 * 128
    assert config.num_params(128) - back == 3 * 128 * 16 + 3 * 8 * 16
    assert SoftmaxConfig(num_heads=8, head_dim=16).num_params(128) - back == 3 * 128 * 8 * 16
