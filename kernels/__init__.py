"""The ops that mixers are made of, each with several implementations behind one public function."""

from plait.kernels.attention import AttentionStats, Bias, DistanceBias, LowRankBias, attention, attention_rows, served_by_kernel
from plait.kernels.attention.masses import column_mass, first_masses
from plait.kernels.attention.routed import routed_attention
from plait.kernels.cross_entropy import cross_entropy
from plait.kernels.decay import decay, decay_rows
from plait.kernels.delta_rule import delta_rule, delta_rule_rows
from plait.kernels.dispatch import chosen, registered
from plait.kernels.dplr import dplr, dplr_rows
from plait.kernels.index_divergence import divergence_served_by_kernel, index_divergence
from plait.kernels.linear_scan import linear_scan
from plait.kernels.masks import ChunkMask, GlobalMask, HeadMasks, Mask, PowerMask, SelectedBlocks
from plait.kernels.memory_context import memory_context
from plait.kernels.online_memory import online_memory
from plait.kernels.selective_scan import selective_scan
from plait.kernels.short_conv import short_conv
from plait.kernels.tokens import Tokens
from plait.kernels.topk_blocks import topk_blocks
from plait.kernels.topk_blocks.whole_blocks import WholeBlocks, whole_blocks
from plait.kernels.weighted_attention import weighted_attention, weighted_rows

__all__ = [
    "AttentionStats",
    "Bias",
    "ChunkMask",
    "DistanceBias",
    "GlobalMask",
    "HeadMasks",
    "LowRankBias",
    "Mask",
    "PowerMask",
    "SelectedBlocks",
    "Tokens",
    "WholeBlocks",
    "attention",
    "attention_rows",
    "chosen",
    "column_mass",
    "cross_entropy",
    "decay",
    "decay_rows",
    "delta_rule",
    "delta_rule_rows",
    "divergence_served_by_kernel",
    "dplr",
    "dplr_rows",
    "first_masses",
    "index_divergence",
    "linear_scan",
    "memory_context",
    "online_memory",
    "registered",
    "routed_attention",
    "selective_scan",
    "served_by_kernel",
    "short_conv",
    "topk_blocks",
    "weighted_attention",
    "weighted_rows",
    "whole_blocks",
]
