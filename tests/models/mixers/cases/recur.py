"""Options of the mixers on the `decay` and `delta_rule` ops."""

from plait.models.mixers.linear.gated_deltanet import GatedDeltaNetConfig
from plait.models.mixers.linear.gated_deltaproduct import GatedDeltaProductConfig
from plait.models.mixers.linear.hgrn2 import HGRN2Config
from plait.models.mixers.linear.kda import KDAConfig
from plait.models.mixers.linear.lightnet import LightNetConfig
from plait.models.mixers.linear.lightning import LightningConfig

CASES = {
    "hgrn2-convolved": HGRN2Config(head_dim=16, lower_bounds="model", conv_size=3),
    "hgrn2-unbounded": HGRN2Config(head_dim=16, lower_bounds=None),
    "lightning-transnormer": LightningConfig(
        head_dim=16, slopes="paper", silu_values=False, norm="simple", gate="linear", gate_rank=8, lrpe=True
    ),
    "lightnet-positions": LightNetConfig(head_dim=16, gate_rank=8, lrpe=True, tpe=True),
    "kda-full_rank": KDAConfig(num_heads=2, head_dim=16, full_rank=True, gate_bias=False),
    "kda-bounded": KDAConfig(num_heads=2, head_dim=16, rank=8, lower_bound=-5.0, gate="silu"),
    "gated_deltanet-bare": GatedDeltaNetConfig(num_heads=2, head_dim=8, conv_size=None, gate=False),
    "gated_deltaproduct-three": GatedDeltaProductConfig(num_heads=2, num_v_heads=4, head_dim=8, num_householder=3, decay=False),
}
