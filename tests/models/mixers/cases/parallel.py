"""Mixers side by side."""

from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.gla import GLAConfig
from plait.models.mixers.linear.mamba2 import Mamba2Config
from plait.models.mixers.moh import MoHConfig
from plait.models.mixers.parallel.parallel import ParallelConfig

gla = GLAConfig.example()
softmax = SoftmaxConfig.example()
windowed = SoftmaxConfig(num_heads=4, head_dim=16, num_kv_heads=2, window_size=8)
CASES = {
    "parallel-three": ParallelConfig(parts=(windowed, gla, MoHConfig(mixer=gla))),
    "parallel-hymba": ParallelConfig(parts=(windowed, MoHConfig(mixer=gla)), norm="heads", shared_output=True),
    "parallel-falcon_h1": ParallelConfig(
        parts=(softmax, Mamba2Config.example()), join="sum", norm=None, in_multipliers=(0.5, 1.5), out_multipliers=(0.75, 0.25)
    ),
    "parallel-split": ParallelConfig(parts=(SoftmaxConfig(num_heads=1, head_dim=16), gla), join="sum", norm="heads"),
}
