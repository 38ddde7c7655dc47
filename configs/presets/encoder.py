"""Encoders: models that see all of a document, trained to name hidden tokens."""

from plait.configs.experiment import ExperimentConfig
from plait.configs.optimizer import optimizer
from plait.data.config import DataConfig
from plait.data.tasks.mlm import MaskedLanguageTask
from plait.models.channel_mixers.gated_mlp import GatedMLPConfig
from plait.models.config import LMConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.positions.alibi import ALiBiConfig


def mosaicbert_base() -> ExperimentConfig:
    """MosaicBERT's recipe at BERT-base size (2312.17482): 12 bidirectional layers of width 768 with ALiBi and a gated GELU MLP, rows of 128.

    30% of the tokens are hidden in training and 15% in validation, 70,000 steps of 4,096 rows. Norms are RMS norms after each half of a
    block, where the recipe has layer norms.

    Command: `python launch.py train mosaicbert_base --data.source CORPUS --mesh.fsdp 8`. Device: 8 accelerators of 80 GB.
    Expected: the recipe reaches an average GLUE score of 79.6 in 1.13 hours on 8 A100; not yet run here.
    """
    return ExperimentConfig(
        name="mosaicbert_base",
        steps=70_000,
        model=LMConfig(
            d_model=768,
            num_layers=12,
            pattern="softmax",
            mixers={"softmax": SoftmaxConfig(num_heads=12, head_dim=64, positions=ALiBiConfig(), qkv_bias=True, o_bias=True)},
            channel_mixer=GatedMLPConfig(hidden_dim=3072, activation="gelu"),
            causal=False,
            vocab_size=30_528,
            tie_embeddings=True,
            norm="post",
            compute_dtype="bfloat16",
        ),
        data=DataConfig(
            task=MaskedLanguageTask(), tokenizer="bpe", vocab_size=30_522, seq_len=128, batch_size=4096, document_start=False
        ),
        optimizer=optimizer(
            "adamw",
            learning_rate=5e-4,
            b2=0.98,
            eps=1e-6,
            weight_decay=0.02,  # the recipe's 1e-5 is not multiplied by the rate
            warmup_steps=4200,
            schedule="wsd",
            decay_fraction=0.94,
            final_ratio=0.02,
        ),
        probe_every=500,
        eval_every=2000,
        checkpoint_every=2000,
    )
