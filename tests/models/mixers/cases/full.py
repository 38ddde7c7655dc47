"""Options of full attention."""

import functools

from plait.models.mixers.full.mla import MLAConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.moh import MoHConfig
from plait.models.positions.alibi import ALiBiConfig
from plait.models.positions.learned import LearnedConfig
from plait.models.positions.relative import RelativeConfig
from plait.models.positions.rotary_yarn import YarnRotaryConfig

softmax = functools.partial(SoftmaxConfig, num_heads=4, head_dim=16)
mla = functools.partial(MLAConfig, num_heads=4, kv_rank=24, nope_head_dim=16, rope_head_dim=8, v_head_dim=12)
CASES = {
    "softmax-gqa": softmax(num_kv_heads=2),
    "softmax-nope": softmax(positions=None),
    "softmax-qk_norm": softmax(qk_norm=True),
    "softmax-window": softmax(window_size=8),
    "softmax-window-sinks": softmax(window_size=8, num_sink_tokens=2),
    "softmax-sink_logits": softmax(num_kv_heads=1, sink_logits=True),
    "softmax-gate": softmax(gate="elementwise"),
    "softmax-headwise_gate": softmax(gate="headwise"),
    "softmax-sigmoid": softmax(normalizer="sigmoid"),
    "softmax-value_residual": softmax(value_residual=True),
    "softmax-alibi-window": softmax(positions=ALiBiConfig(), window_size=8, num_sink_tokens=2),
    "softmax-relative-v_bias": softmax(positions=RelativeConfig(num_buckets=8, max_distance=20), num_kv_heads=2, sink_bias="v"),
    "softmax-learned-kv_bias": softmax(
        positions=LearnedConfig(max_len=72), num_kv_heads=2, sink_bias="kv", window_size=8, value_scale=True
    ),
    "softmax-checkpoint": softmax(
        positions=YarnRotaryConfig(fraction=0.5, interleaved=True, original_len=32),
        qkv_bias=True,
        o_bias=True,
        qk_norm=True,
        qk_norm_over="width",
        log_n_scale=16,
        scale=0.3,
    ),
    "mla-full_queries": mla(),
    "mla-groups": mla(num_latents=2, positions=YarnRotaryConfig(original_len=32)),
    "mla-nope": mla(q_rank=32, positions=None),
    "mla-plain_latents": mla(num_latents=2, latent_norm=False),
    "mla-gated": mla(gate="headwise"),
    "moh+softmax-gqa-routed": MoHConfig(mixer=softmax(num_kv_heads=2), num_shared_heads=0, top_k=3),
    "moh+softmax-query_norm": MoHConfig(mixer=softmax(num_kv_heads=2), num_shared_heads=1, top_k=1, router="query_norm"),
}
