"""The attention sink in small: a softmax model in which one emerges within minutes."""

from plait.configs.experiment import ExperimentConfig
from plait.configs.optimizer import optimizer
from plait.data.config import DataConfig
from plait.data.tasks.backcopy import BackcopyTask
from plait.models.channel_mixers.gated_mlp import GatedMLPConfig
from plait.models.config import LMConfig
from plait.models.mixers.full.softmax import SoftmaxConfig


def lm_sinks() -> ExperimentConfig:
    """An attention sink emerges: three softmax layers of one head on Bigram-Backcopy, the task on which sinks were studied (2410.13835).

    Command: `python launch.py train lm_sinks`. Device: 2 CPU cores, about 3 minutes.
    Expected: the head of the first layer becomes a sink near step 480, all copies are right (other seeds: docs/reproductions.md).
    """
    return ExperimentConfig(
        name="lm_sinks",
        steps=1000,
        model=LMConfig(
            d_model=64,
            num_layers=3,
            pattern="softmax",
            mixers={"softmax": SoftmaxConfig(num_heads=1, head_dim=64)},
            channel_mixer=GatedMLPConfig(hidden_dim=192),
        ),
        data=DataConfig(task=BackcopyTask(), seq_len=128, batch_size=16),
        optimizer=optimizer("adamw", learning_rate=3e-3, warmup_steps=50, schedule="constant"),
        probe_every=20,
        eval_every=500,
        eval_batches=8,
        checkpoint_every=500,
    )
