"""Options of the sparse mixers."""

from plait.models.mixers.sparse.nsa import NSAConfig
from plait.models.mixers.sparse.power import PowerConfig

CASES = {
    "power-window-sinks": PowerConfig(num_heads=4, head_dim=16, block_size=4, window_size=6, num_sink_tokens=2),
    "nsa-simple": NSAConfig(
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        compression="mean",
        keys="shared",
        span=8,
        stride=8,
        block_size=8,
        top_k=3,
        num_first=0,
        num_local=1,
        window_size=6,
    ),
}
