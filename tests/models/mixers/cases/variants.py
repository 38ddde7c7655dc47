"""Options of attention with other queries, keys, values and combinations."""

from plait.models.mixers.full.diff_qkv import DiffQKVConfig
from plait.models.mixers.full.mhe import MHEConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.moh import MoHConfig

CASES = {
    "mhe-add": MHEConfig(num_heads=4, head_dim=16, combine="add"),
    "diff_qkv-narrow_keys": DiffQKVConfig(num_heads=8, num_k_heads=4, num_v_heads=2, head_dim=8, k_head_dim=4, augmented_q=None),
    "moh+softmax-all_but_one": MoHConfig(mixer=SoftmaxConfig.example(), experts="all_but_one"),
}
