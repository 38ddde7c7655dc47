"""Which keys a query of attention may see: rules on positions, the same by head, and blocks that a layer selected."""

from plait.kernels.masks.chunk_mask import ChunkMask
from plait.kernels.masks.global_mask import GlobalMask
from plait.kernels.masks.head_masks import HeadGroup, HeadMasks
from plait.kernels.masks.mask import Mask, Span, block_number
from plait.kernels.masks.power_mask import PowerMask
from plait.kernels.masks.selected_blocks import SelectedBlocks

__all__ = ["ChunkMask", "GlobalMask", "HeadGroup", "HeadMasks", "Mask", "PowerMask", "SelectedBlocks", "Span", "block_number"]
