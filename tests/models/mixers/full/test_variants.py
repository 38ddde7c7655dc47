"""What holds for several variants of softmax attention: other positions in decoding, and options that do not fit."""

import dataclasses

import jax.numpy as jnp
import pytest

from plait.models.mixers.full.diff import DiffConfig
from plait.models.mixers.full.diff_qkv import DiffQKVConfig
from plait.models.mixers.full.dual_attention import DualAttentionConfig
from plait.models.mixers.full.mhe import MHEConfig
from plait.models.mixers.full.rcmha import RCMHAConfig
from plait.models.positions.alibi import ALiBiConfig
from plait.models.positions.learned import LearnedConfig
from plait.tests.models.common import layout, quick_jit
from plait.tests.models.mixers.full.layers import (
    LENGTH,
    WIDTH,
    X,
    build,
)
from plait.tests.tolerances import assert_close


@pytest.mark.parametrize(
    "config",
    [
        DiffConfig(num_heads=2, head_dim=8, positions=ALiBiConfig()),
        DualAttentionConfig(num_heads=4, num_symbols=6, symbol_heads=2, positions=ALiBiConfig()),
        MHEConfig(num_heads=4, head_dim=8, positions=LearnedConfig(max_len=16)),
    ],
    ids=lambda config: f"{config.name}-{config.positions.name}",
)
def test_other_positions_decode_as_they_train(config):
    mixer = build(config)
    whole = layout((LENGTH,), (LENGTH,), length=LENGTH)
    y, state, steps = mixer(X, at=whole, carry={}).y, mixer.init_state(2, LENGTH), []
    step = quick_jit(lambda x, state, at: mixer.step(x, state, at=at, carry={})[::2])
    for t in range(LENGTH):
        one, state = step(X[:, t : t + 1], state, dataclasses.replace(whole, segment_ids=None, positions=jnp.full((2, 1), t)))
        steps.append(one)
    assert_close(jnp.concatenate(steps, axis=1), y)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: DiffConfig(num_heads=4, num_kv_heads=3).fit(WIDTH),
            r"num_kv_heads=3 must divide num_heads=4; use one of 1, 2, 4",
        ),
        (lambda: DiffConfig(head_dim=12).fit(32), r"head_dim=12 must divide d_model / 2 = 16 when num_heads is None"),
        (lambda: DiffConfig(head_dim=5), r"positions\.fraction=1\.0 turns 5 channels of 5"),
        (lambda: DiffQKVConfig(num_heads=8, num_k_heads=3).fit(WIDTH), r"num_k_heads=3 must divide num_heads=8"),
        (lambda: DiffQKVConfig(k_head_dim=64), r"k_head_dim=64 must be below head_dim=64.*use None"),
        (lambda: RCMHAConfig(position_dim=5), r"position_dim=5 must be even.*use 6"),
        (
            lambda: DualAttentionConfig(num_heads=4, num_relational_heads=4).fit(WIDTH),
            r"num_relational_heads=4 must leave .* use 3",
        ),
        (lambda: DualAttentionConfig(num_heads=4, num_relations=5).fit(WIDTH), r"num_relations=5 must divide .*=16"),
        (lambda: DualAttentionConfig(num_heads=4, symbol_heads=3).fit(WIDTH), r"symbol_heads=3 must divide d_model=32"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
