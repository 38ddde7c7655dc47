"""Options of full attention."""

import functools

from plait.models.mixers.full.mla import MLAConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.moh import MoHConfig

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
    "mla-full_queries": mla(),
    "mla-nope": mla(q_rank=32, positions=None),
    "moh+softmax-gqa-routed": MoHConfig(mixer=softmax(num_kv_heads=2), num_shared_heads=0, top_k=3),
}
