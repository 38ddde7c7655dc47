"""Options of the scans."""

from plait.models.mixers.linear.mamba1 import Mamba1Config
from plait.models.mixers.linear.mega import MegaConfig
from plait.models.mixers.linear.mega_chunk import MegaChunkConfig

CASES = {
    "mamba1-normalised": Mamba1Config(state_dim=4, dt_rank=3, norm_eps=1e-6),
    "mamba1-jamba": Mamba1Config(state_dim=4, norm_eps=1e-6, norm_scale=True, use_bias=True, conv_bias=False),
    "mega-laplace": MegaConfig(state_dim=2, weights="laplace"),
    "mega_chunk-laplace-simple": MegaChunkConfig(state_dim=2, chunk_size=10, weights="laplace", bias="simple"),
}
