"""Small language models: the quick start and the one the tests train."""

from plait.configs.experiment import ExperimentConfig
from plait.configs.optimizer import optimizer
from plait.configs.probe import ProbeConfig
from plait.data.config import DataConfig
from plait.models.channel_mixers.gated_mlp import GatedMLPConfig
from plait.models.config import LMConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.gated_deltanet import GatedDeltaNetConfig
from plait.models.mixers.moh import MoHConfig


def lm_quick() -> ExperimentConfig:
    """The quick start: a hybrid of gated DeltaNet and Mixture-of-Head softmax layers on presidential speeches.

    Command: `python launch.py train lm_quick`. Device: 2 CPU cores, 4 to 8 minutes by their speed.
    Expected: about 1.55 bits per byte on held-out speeches (gzip reaches 2.66, xz 1.83).
    """
    return ExperimentConfig(
        name="lm_quick",
        steps=500,
        model=LMConfig(
            d_model=192,
            num_layers=4,
            pattern="gated_deltanet*3,moh+softmax",
            mixers={
                "gated_deltanet": GatedDeltaNetConfig(num_heads=3, head_dim=32, expand_v=2.0),
                "moh+softmax": MoHConfig(
                    mixer=SoftmaxConfig(num_heads=6, head_dim=32, qk_norm=True), num_shared_heads=2, top_k=2
                ),
            },
            channel_mixer=GatedMLPConfig(hidden_dim=512),
            tie_embeddings=True,
        ),
        data=DataConfig(source="sotu", tokenizer="bpe", vocab_size=4096, seq_len=256, batch_size=8),
        optimizer=optimizer("adamw", learning_rate=2e-3, warmup_steps=60, schedule="wsd", decay_fraction=0.4, final_ratio=0.02),
        probe_every=20,
        probe=ProbeConfig(sequences=2),
        eval_every=100,
        eval_batches=8,
        checkpoint_every=100,
    )


def lm_tiny() -> ExperimentConfig:
    """A model of seconds, for tests and first looks: bytes, rows of 64, one linear and one softmax layer.

    Command: `python launch.py train lm_tiny`. Device: 1 CPU core, under a minute. Expected: loss below 3 after 60 steps.
    """
    return ExperimentConfig(
        name="lm_tiny",
        steps=60,
        model=LMConfig(
            d_model=32,
            num_layers=2,
            pattern="gated_deltanet,softmax",
            mixers={
                "gated_deltanet": GatedDeltaNetConfig(num_heads=2, head_dim=8, expand_v=2.0),
                "softmax": SoftmaxConfig(num_heads=2, head_dim=16),
            },
            channel_mixer=GatedMLPConfig(hidden_dim=64),
        ),
        data=DataConfig(source="sotu", tokenizer="byte", seq_len=64, batch_size=8),
        optimizer=optimizer("adamw", learning_rate=1e-2, warmup_steps=10),
        probe_every=20,
        eval_every=30,
        eval_batches=2,
        checkpoint_every=20,
    )
