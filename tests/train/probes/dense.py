"""What the tests of probes of attention rows share: a small softmax model, and its attention in float64 without the model's code."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from plait.configs.probe import ProbeConfig
from plait.models.lm import LM
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.tests.models.common import layout, quick_jit
from plait.tests.train.common import hybrid
from plait.train.probes.base import Probes

HEADS, KV_HEADS, DIM = 4, 2, 8


class Keeps:
    """An observer of everything that keeps what a layer has, and what probes measure of it."""

    whole = False

    def __init__(self, config: ProbeConfig):
        self.probes = Probes(config)
        self.pick_sequences, self.pick_rows = self.probes.pick_sequences, self.probes.pick_rows

    def measure(self, looks):
        (look,) = looks
        kept = {"q": look.inputs.q, "k": look.inputs.k, "v": look.inputs.v, "rows": look.rows}
        return {**kept, "statistics": self.probes.measure(looks)}


def measured(probes, *documents, length, mixer=None, seed=0, **options):
    """Statistics of `probes`, and what the one layer made of its tokens, as float64 arrays; and where those stand."""
    mixer = mixer or SoftmaxConfig(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM)
    config = dataclasses.replace(hybrid().model, num_layers=1, pattern="softmax", mixers={"softmax": mixer}).with_vocab(16)
    at = layout(*documents, length=length)
    ids = jnp.asarray(np.random.default_rng(seed).integers(0, 16, at.segment_ids.shape), jnp.int32)
    observer = Keeps(ProbeConfig(only=probes, sequences=len(documents), **options))

    @quick_jit
    def run():
        model = LM(config, rngs=nnx.Rngs(seed), seq_len=length)
        _, (extras,) = model.hidden(dataclasses.replace(at, ids=ids), observer=observer)
        return extras.statistics

    kept = dict(run())
    found = {name: np.asarray(value) for name, value in kept.pop("statistics").items()}
    rows = np.asarray(kept.pop("rows"))
    return found, {name: np.asarray(value, np.float64) for name, value in kept.items()}, rows, jax.tree.map(np.asarray, at)


def attention(kept, at):
    """Causal softmax weights `[B, H, T, T]` within documents, and the logits."""
    k = np.repeat(kept["k"], HEADS // KV_HEADS, axis=2)
    logits = np.einsum("bthk,bshk->bhts", kept["q"], k) / np.sqrt(DIM)
    seen = visible(at)[:, None]
    weights = np.where(seen, np.exp(logits - logits.max(-1, keepdims=True)), 0)
    return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300), logits


def visible(at):
    """bool `[B, T, T]`."""
    segments = np.asarray(at.segment_ids)
    same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
    return same & np.tri(segments.shape[1], dtype=bool)
