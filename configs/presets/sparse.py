"""Hybrids with trained sparse attention at the size of `hybrid_340m`, rows of 8,192 tokens. Give your corpus with `--data.source`."""

import dataclasses

from plait.configs.experiment import ExperimentConfig
from plait.configs.presets.hybrid import hybrid_340m, transformer_340m
from plait.models.mixers.base import MixerConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.gated_deltanet import GatedDeltaNetConfig
from plait.models.mixers.sparse.moba import MoBAConfig
from plait.models.mixers.sparse.nsa import NSAConfig


def nsa_340m() -> ExperimentConfig:
    """The 340M hybrid with NSA in place of softmax: three gated DeltaNet layers to one of NSA, whose 16 heads choose together.

    Command: `python launch.py train nsa_340m --data.source CORPUS --mesh.fsdp 8`. Device: 8 accelerators of 40 GB or more.
    Expected: at 8,192 tokens a query sees 1,024 chosen keys, 512 of the window and the compressed ones; not yet run here.
    """
    mixers = {"gated_deltanet": GatedDeltaNetConfig(), "nsa": NSAConfig(num_kv_heads=1)}
    return _experiment("nsa_340m", hybrid_340m(), "gated_deltanet*3,nsa", mixers)


def moba_340m() -> ExperimentConfig:
    """The 340M transformer with MoBA in all layers but the last three, which stay full (2502.13189, section 3.2): blocks of 512, top 3.

    Command: `python launch.py train moba_340m --data.source CORPUS --mesh.fsdp 8`. Device: 8 accelerators of 40 GB or more.
    Expected: at 8,192 tokens the paper's loss is within 1e-3 of full attention's, at 0.5B and more; not yet run here.
    """
    mixers = {"moba": MoBAConfig(), "softmax": SoftmaxConfig(head_dim=64)}
    return _experiment("moba_340m", transformer_340m(), "softmax@21,22,23; moba", mixers)


def _experiment(name: str, base: ExperimentConfig, pattern: str, mixers: dict[str, MixerConfig]) -> ExperimentConfig:
    """`base` with other mixers, and rows twice as long."""
    return dataclasses.replace(
        base,
        name=name,
        model=dataclasses.replace(base.model, pattern=pattern, mixers=mixers),
        data=dataclasses.replace(base.data, seq_len=8192, batch_size=base.data.batch_size // 2),
    )
