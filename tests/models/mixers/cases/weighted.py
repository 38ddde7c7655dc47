"""Options of attention whose weights are not softmax's."""

from plait.models.mixers.full.lssa import LSSAConfig
from plait.models.mixers.full.mta import MTAConfig

CASES = {
    "mta-mixed-gate": MTAConfig(
        num_heads=4, head_dim=16, query_taps=None, key_taps=None, mixed_heads=4, depth_scale=False, gate=True
    ),
    "lssa-reweighted-gqa": LSSAConfig(num_heads=4, num_kv_heads=2, head_dim=16, power=15),
}
