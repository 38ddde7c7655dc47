"""Options of the memories that learn while they read."""

from plait.models.mixers.linear.titans_mag import TitansMAGConfig

CASES = {
    "titans_mag-linear": TitansMAGConfig(
        num_heads=2, head_dim=8, memory_depth=1, chunk_size=1, window_size=8, num_persistent=0, rope_theta=None
    )
}
