"""The hybrid-ratio study's shapes (arXiv 2507.06457): gated DeltaNet with a softmax layer in every four, and the softmax-only baseline.

24 layers, rows of 4,096 tokens, Llama-style blocks. Give your corpus with `--data.source` (a folder of .txt, .jsonl or .parquet files).
"""

from plait.configs.experiment import ExperimentConfig
from plait.configs.optimizer import optimizer
from plait.data.config import DataConfig
from plait.models.channel_mixers.gated_mlp import GatedMLPConfig
from plait.models.config import LMConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.gated_deltanet import GatedDeltaNetConfig

_HYBRID = "gated_deltanet*3,softmax"


def hybrid_340m() -> ExperimentConfig:
    """The study's 340M size (412M with embeddings), three gated DeltaNet layers to one softmax layer, 20B tokens.

    Command: `python launch.py train hybrid_340m --data.source CORPUS --mesh.fsdp 8`. Device: 8 accelerators of 40 GB or more.
    Expected: the study's language-model average for gated DeltaNet at 3:1 and 340M and 1.3B is 0.478; not yet run here.
    """
    return _experiment("hybrid_340m", _HYBRID, d_model=1024, hidden_dim=2816, steps=38_000, batch_size=128, learning_rate=1e-3)


def hybrid_1b() -> ExperimentConfig:
    """The study's 1.3B size (1,516M with embeddings), three gated DeltaNet layers to one softmax layer, 100B tokens.

    Command: `python launch.py train hybrid_1b --data.source CORPUS --mesh.fsdp 64`. Device: 64 accelerators.
    Expected: RULER 0.436 at this ratio in the study; not yet run here.
    """
    return _experiment("hybrid_1b", _HYBRID, d_model=2048, hidden_dim=5632, steps=95_000, batch_size=256, learning_rate=4e-4)


def transformer_340m() -> ExperimentConfig:
    """The study's 340M size (374M with embeddings), softmax attention throughout: the baseline of `hybrid_340m`, run as it is."""
    return _experiment(
        "transformer_340m", "softmax", d_model=1024, hidden_dim=2816, steps=38_000, batch_size=128, learning_rate=1e-3
    )


def transformer_1b() -> ExperimentConfig:
    """The study's 1.3B size (1,364M with embeddings), softmax attention throughout: the baseline of `hybrid_1b`, run as it is."""
    return _experiment(
        "transformer_1b", "softmax", d_model=2048, hidden_dim=5632, steps=95_000, batch_size=256, learning_rate=4e-4
    )


def _experiment(
    name: str, pattern: str, *, d_model: int, hidden_dim: int, steps: int, batch_size: int, learning_rate: float
) -> ExperimentConfig:
    model = LMConfig(
        d_model=d_model,
        num_layers=24,
        pattern=pattern,
        mixers={
            "softmax": SoftmaxConfig(head_dim=64),
            **({"gated_deltanet": GatedDeltaNetConfig()} if pattern == _HYBRID else {}),
        },
        channel_mixer=GatedMLPConfig(hidden_dim=hidden_dim),
        vocab_size=32_000,
        remat="dots",
        compute_dtype="bfloat16",
    )
    return ExperimentConfig(
        name=name,
        steps=steps,
        model=model,
        data=DataConfig(tokenizer="bpe", vocab_size=32_000, seq_len=4096, batch_size=batch_size),
        optimizer=optimizer("adamw", learning_rate=learning_rate, warmup_steps=1000),
        probe_every=100,
        eval_every=1000,
        eval_batches=64,
        checkpoint_every=1000,
        keep_last=3,
    )
