"""Options of linear attention by features, and of Parallax."""

from plait.models.mixers.full.parallax import ParallaxConfig
from plait.models.mixers.linear.inline_attention import InLineConfig
from plait.models.mixers.linear.linear import LinearConfig

CASES = {
    "linear-hadamard": LinearConfig(num_heads=4, feature_map="hadamard", normalizer="rms_norm"),
    "inline_attention-no_residual": InLineConfig(num_heads=4, local_size=None),
    "parallax-grouped": ParallaxConfig(num_heads=4, num_kv_heads=2, head_dim=16, qk_norm=True),
}
