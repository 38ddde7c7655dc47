"""The ops that mixers are made of, each with several implementations behind one public function."""

from plait.kernels.attention import AttentionStats, attention, attention_rows
from plait.kernels.attention.masses import column_mass, first_masses
from plait.kernels.attention.routed import routed_attention
from plait.kernels.cross_entropy import cross_entropy
from plait.kernels.delta_rule import delta_rule, delta_rule_rows
from plait.kernels.dispatch import chosen, registered
from plait.kernels.masks import BlockTable, Mask, PowerMask
from plait.kernels.scalar_decay import scalar_decay, scalar_decay_rows
from plait.kernels.short_conv import short_conv
from plait.kernels.topk_blocks import topk_blocks
from plait.kernels.vector_decay import vector_decay, vector_decay_rows

__all__ = [
    "AttentionStats",
    "BlockTable",
    "Mask",
    "PowerMask",
    "attention",
    "attention_rows",
    "chosen",
    "column_mass",
    "cross_entropy",
    "delta_rule",
    "delta_rule_rows",
    "first_masses",
    "registered",
    "routed_attention",
    "scalar_decay",
    "scalar_decay_rows",
    "short_conv",
    "topk_blocks",
    "vector_decay",
    "vector_decay_rows",
]
