"""Options of the sparse mixers."""

import functools

from plait.models.mixers.sparse.dilated import DilatedConfig
from plait.models.mixers.sparse.landmark import LandmarkConfig
from plait.models.mixers.sparse.nsa import NSAConfig
from plait.models.mixers.sparse.power import PowerConfig
from plait.models.mixers.sparse.scca import SCCAConfig
from plait.models.mixers.sparse.shifted import ShiftedConfig

HEADS = {"num_heads": 4, "head_dim": 16}
scca = functools.partial(SCCAConfig, **HEADS, chunk_size=10)
simple = {"compression": "mean", "keys": "shared", "span": 8, "stride": 8, "num_first": 0, "num_local": 1}
CASES = {
    "power-window-sinks": PowerConfig(**HEADS, block_size=4, window_size=6, num_sink_tokens=2),
    "nsa-simple": NSAConfig(**HEADS, num_kv_heads=2, **simple, block_size=8, top_k=3, window_size=6),
    "landmark-best": LandmarkConfig(**HEADS, block_size=6, top_k=2),
    "dilated-gqa-uneven": DilatedConfig(**HEADS, num_kv_heads=2, segment_lengths=(24, 40), dilations=(1, 3)),
    "scca-dilated": scca(dilation=3),
    "scca-flow-gqa": scca(shifts="flow", num_kv_heads=2),
    "shifted-sinks": ShiftedConfig(**HEADS, group_size=10, num_shifted_heads=1, num_sink_tokens=2),
}
