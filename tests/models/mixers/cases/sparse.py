"""Options of the sparse mixers."""

from plait.models.mixers.sparse.power import PowerConfig

CASES = {"power-window-sinks": PowerConfig(num_heads=4, head_dim=16, block_size=4, window_size=6, num_sink_tokens=2)}
