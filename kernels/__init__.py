"""The ops that mixers are made of, each with several implementations behind one public function."""

from plait.kernels.attention import AttentionStats, LowRankBias, attention, attention_rows
from plait.kernels.attention.masses import column_mass, first_masses
from plait.kernels.attention.routed import routed_attention
from plait.kernels.cross_entropy import cross_entropy
from plait.kernels.decay import decay, decay_rows
from plait.kernels.delta_rule import delta_rule, delta_rule_rows
from plait.kernels.dispatch import chosen, registered
from plait.kernels.local_linear import local_linear, local_linear_rows
from plait.kernels.masks import BlockTable, Mask, PowerMask
from plait.kernels.short_conv import short_conv
from plait.kernels.tokens import Tokens
from plait.kernels.topk_blocks import topk_blocks

__all__ = [
    "AttentionStats",
    "BlockTable",
    "LowRankBias",
    "Mask",
    "PowerMask",
    "Tokens",
    "attention",
    "attention_rows",
    "chosen",
    "column_mass",
    "cross_entropy",
    "decay",
    "decay_rows",
    "delta_rule",
    "delta_rule_rows",
    "first_masses",
    "local_linear",
    "local_linear_rows",
    "registered",
    "routed_attention",
    "short_conv",
    "topk_blocks",
]
