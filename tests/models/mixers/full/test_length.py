"""Beyond the training length: the order in which losses rise at 16 times as many tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from plait.kernels import Tokens
from plait.models.channel_mixers.gated_mlp import GatedMLPConfig
from plait.models.config import LMConfig
from plait.models.mixers.base import MixerConfig
from plait.models.mixers.full.lssa import LSSAConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.tests.models.common import build
from plait.tests.train.common import WORDS

LENGTH, BATCH, STEPS, TIMES = 64, 32, 300, 16
HEADS = {"num_heads": 4, "head_dim": 16}


def text(rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
    """Bytes of words drawn at random: what comes next follows from the last few, at any length."""
    return np.asarray([list(" ".join(rng.choice(WORDS, length)).encode()[:length]) for _ in range(rows)], np.int32)


def losses_at_length(mixer: MixerConfig) -> tuple[float, float]:
    """Mean loss of two layers trained at LENGTH: in the second half of so many tokens, and in that of TIMES as many."""
    config = LMConfig(
        d_model=64,
        num_layers=2,
        pattern=mixer.name,
        mixers={mixer.name: mixer},
        channel_mixer=GatedMLPConfig(hidden_dim=128),
        vocab_size=256,
    )
    graph, params, rest = nnx.split(build(config, seq_len=LENGTH), nnx.Param, ...)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))

    def losses(params, ids):
        logits = nnx.merge(graph, params, rest)(Tokens(ids))[0].astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])

    @jax.jit
    def step(params, state, ids):
        updates, state = optimizer.update(jax.grad(lambda p: losses(p, ids).mean())(params), state, params)
        return optax.apply_updates(params, updates), state

    rng, state = np.random.default_rng(0), optimizer.init(params)
    for _ in range(STEPS):
        params, state = step(params, state, text(rng, BATCH, LENGTH))
    held_out, half = text(np.random.default_rng(1), 8, TIMES * LENGTH), LENGTH // 2
    of = lambda ids, start: float(np.asarray(jax.jit(losses)(params, ids))[:, start:].mean())
    return of(held_out[:, : 2 * LENGTH].reshape(-1, LENGTH), half), of(held_out, TIMES * half)


@pytest.mark.slow
def test_reweighting_makes_softplus_attention_extrapolate_better_than_softmax():
    """Nearly constant in the paper, at 16 times 1,024 tokens and 124M parameters; here all rise, reweighted softplus the least."""
    mixers = {"lssar": LSSAConfig(**HEADS, power=15), "lssa": LSSAConfig(**HEADS), "softmax": SoftmaxConfig(**HEADS)}
    found = {name: losses_at_length(mixer) for name, mixer in mixers.items()}
    short = [loss for loss, _ in found.values()]
    assert max(short) < 1.02 * min(short)
    rise = {name: long - short for name, (short, long) in found.items()}
    assert rise["lssar"] < 0.75 * rise["softmax"] < 0.75 * rise["lssa"], found
