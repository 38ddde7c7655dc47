"""Options of the linear mixers."""

import functools

from plait.models.mixers.linear.gated_deltanet import GatedDeltaNetConfig
from plait.models.mixers.linear.mamba2 import Mamba2Config

gated_deltanet = functools.partial(GatedDeltaNetConfig, num_heads=2, head_dim=8)
CASES = {
    "gated_deltanet-grouped": gated_deltanet(num_v_heads=4),
    "gated_deltanet-negative": gated_deltanet(negative_eigenvalues=True),
    "mamba2-one_group": Mamba2Config(head_dim=16, state_dim=8),
    "mamba2-falcon": Mamba2Config(head_dim=16, state_dim=4, norm=None, multipliers=(0.5, 2.0, 0.75, 1.25, 1.5), use_bias=True),
    "mamba2-norm_first": Mamba2Config(head_dim=16, state_dim=4, num_groups=2, norm="before_gate", conv_bias=False),
}
