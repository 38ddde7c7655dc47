"""What a decoded token costs: by hand, and what papers count."""

import dataclasses

import pytest

from plait.models.channel_mixers.mlp import MLPConfig
from plait.models.config import LMConfig
from plait.models.mixers.full.mla import MLAConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.kda import KDAConfig
from plait.train.pods.plan.decoding import decoding

MILLION = 1 << 20


def model(pattern: str, **mixers) -> LMConfig:
    return LMConfig(d_model=256, num_layers=4, pattern=pattern, mixers=mixers, vocab_size=512, compute_dtype="bfloat16")


def test_softmax_reads_a_key_and_a_value_for_every_token_before_it():
    (one,) = decoding(model("softmax", softmax=SoftmaxConfig(num_heads=4, head_dim=64)), (1000,))
    cache, places = 4 * 1000 * 4 * 64 * 2 * 2, 4 * 1000 * 4
    assert one.state == one.growing == cache + places
    mixing = 4 * 4 * (4 * 64) * 1001  # layers x (2 for scores, 2 for values) x channels x keys, itself included
    products = 2 * (4 * 4 * 256 * 256 + 256 * 512) + 4 * model("softmax").channel_mixer.flops(256)
    assert one.flops == pytest.approx(mixing + products)


def test_an_mlp_that_reads_the_token_before_keeps_it():
    plain = dataclasses.replace(model("softmax", softmax=SoftmaxConfig(num_heads=4, head_dim=64)), channel_mixer=MLPConfig())
    shifted = dataclasses.replace(plain, channel_mixer=MLPConfig(token_shift=True))
    (one,), (other,) = (decoding(config, (1000,)) for config in (plain, shifted))
    assert other.state - one.state == 4 * 256 * 2
    assert other.growing == one.growing


def test_one_latent_layer_in_four_keeps_a_quarter_of_the_cache():
    """Kimi Linear (2510.26692): the KV cache is down by up to 75%."""
    mla = MLAConfig(num_heads=4, kv_rank=64, nope_head_dim=32, rope_head_dim=16, v_head_dim=32, positions=None)
    hybrid = model("kda*3,mla", kda=KDAConfig(num_heads=4, head_dim=32), mla=mla)
    (whole,), (quarter,) = (decoding(one, (MILLION,)) for one in (model("mla", mla=mla), hybrid))
    assert quarter.growing == whole.growing / 4
    assert quarter.state - quarter.growing < 1e-3 * quarter.growing
    assert quarter.flops < 0.3 * whole.flops


def test_a_window_and_a_state_cost_the_same_after_any_number_of_tokens():
    windowed = model("softmax,kda", softmax=SoftmaxConfig(num_heads=4, head_dim=64, window_size=128), kda=KDAConfig.example())
    near, far = decoding(windowed, (4096, MILLION))
    assert near.growing == far.growing == 0
    assert dataclasses.replace(far, context=4096, flops=near.flops) == near
    assert far.flops == pytest.approx(near.flops, rel=1e-6)
