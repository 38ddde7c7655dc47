"""Mixers side by side."""

from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.gla import GLAConfig
from plait.models.mixers.moh import MoHConfig
from plait.models.mixers.parallel.parallel import ParallelConfig

gla = GLAConfig.example()
windowed = SoftmaxConfig(num_heads=4, head_dim=16, num_kv_heads=2, window_size=8)
CASES = {"parallel-three": ParallelConfig(parts=(windowed, gla, MoHConfig(mixer=gla)))}
