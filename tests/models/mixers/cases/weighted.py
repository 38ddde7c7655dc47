"""Options of attention whose weights are not softmax's."""

from plait.models.mixers.full.lssa import LSSAConfig

CASES = {
    "lssa-reweighted-gqa": LSSAConfig(num_heads=4, num_kv_heads=2, head_dim=16, power=15),
}
