"""The attention sink in small: a softmax model in which one emerges within minutes."""

from plait.configs.experiment import ExperimentConfig
from plait.configs.optimizer import optimizer
from plait.configs.probe import ProbeConfig
from plait.data.config import DataConfig
from plait.data.tasks.backcopy import BackcopyTask
from plait.models.channel_mixers.gated_mlp import GatedMLPConfig
from plait.models.config import LMConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.positions.sinusoidal import SinusoidalConfig


def lm_sinks() -> ExperimentConfig:
    """An attention sink emerges with each of three seeds: one softmax head beside an MLP on Bigram-Backcopy (2410.13835).

    The MLP reads what the head reads (`parallel_block`), so that it cannot undo what the head copies, and positions are added to what queries
    and keys are projected from, so that a head with nothing to copy does not rest on the query itself as easily.

    Command: `python launch.py train lm_sinks`. Device: 2 CPU cores, about a minute.
    Expected: the head becomes a sink near step 100, and copies rightly (seeds and other kinds of attention: docs/reproductions.md).
    """
    return ExperimentConfig(
        name="lm_sinks",
        steps=600,
        model=LMConfig(
            d_model=64,
            num_layers=1,
            pattern="softmax",
            mixers={"softmax": SoftmaxConfig(num_heads=1, head_dim=64, positions=SinusoidalConfig())},
            channel_mixer=GatedMLPConfig(hidden_dim=192),
            parallel_block=True,
        ),
        data=DataConfig(task=BackcopyTask(), seq_len=64, batch_size=16),
        optimizer=optimizer("adamw", learning_rate=3e-3, warmup_steps=50, schedule="constant"),
        probe_every=20,
        probe=ProbeConfig(only="default,sink_k_eps", sequences=16),
        eval_every=300,
        eval_batches=8,
        checkpoint_every=300,
    )
