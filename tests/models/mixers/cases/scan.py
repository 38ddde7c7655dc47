"""Options of the scans."""

from plait.models.mixers.linear.mamba1 import Mamba1Config

CASES = {"mamba1-normalised": Mamba1Config(state_dim=4, dt_rank=3, norm_eps=1e-6)}
