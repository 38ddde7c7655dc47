"""The language model."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from plait.models.axes import BATCH, EMBED, LENGTH, VOCAB, constrain
from plait.models.build import BuildContext
from plait.models.config import LMConfig
from plait.models.linear import Dense, dense_layers
from plait.models.mixers.base import State
from plait.models.mixers.stats import ProbeConfig, Stats
from plait.models.norms import RMSNorm
from plait.models.stack import Stack

_EMBED_STD = 0.02


class LM(nnx.Module):
    """Embedding, stack, final norm, head. `tokens`, `segment_ids`, `positions` are int32 `[B, T]`; segment 0 is padding."""

    def __init__(self, config: LMConfig, *, rngs: nnx.Rngs, seq_len: int):
        """Args: `config` with its vocabulary settled (`LMConfig.with_vocab`); `seq_len` of training, in tokens."""
        if config.vocab_size is None:
            raise ValueError(
                "model.vocab_size=None must be settled before the model is built; use LMConfig.with_vocab(tokenizer size)"
            )
        self.config, self.seq_len = config, seq_len

        def context(layer_index: int) -> BuildContext:
            return BuildContext(
                layer_index=layer_index,
                num_layers=config.num_layers,
                rngs=rngs,
                seq_len=seq_len,
                param_dtype=jnp.dtype(config.param_dtype),
                compute_dtype=jnp.dtype(config.compute_dtype),
                sigma_reparam=config.sigma_reparam,
            )

        ctx = context(config.num_layers)
        embed_init = jax.nn.initializers.normal(_EMBED_STD)
        self.embedding = ctx.param(embed_init, (config.vocab_size, config.d_model), (VOCAB, EMBED), decay=True)
        self.stack = Stack(config, context)
        self.norm = RMSNorm(ctx, config.d_model, eps=config.norm_eps) if config.norm == "pre" else None
        self.head = (
            None if config.tie_embeddings else Dense(ctx, config.d_model, config.vocab_size, (EMBED, VOCAB), init=embed_init)
        )

    def __call__(
        self, tokens: jax.Array, *, segment_ids: jax.Array, positions: jax.Array, probe: ProbeConfig | None = None
    ) -> tuple[jax.Array, list[Stats | None]]:
        """Logits `[B, T, vocab]` float32 and the statistics of each layer."""
        hidden, stats = self.hidden(tokens, segment_ids=segment_ids, positions=positions, probe=probe)
        return self.logits(hidden), stats

    def hidden(
        self, tokens: jax.Array, *, segment_ids: jax.Array, positions: jax.Array, probe: ProbeConfig | None = None
    ) -> tuple[jax.Array, list[Stats | None]]:
        """What the head reads, `[B, T, D]`, and the statistics of each layer."""
        x, stats = self.stack(self._embed(tokens), segment_ids=segment_ids, positions=positions, probe=probe)
        return self._final(x), stats

    def logits(self, hidden: jax.Array) -> jax.Array:
        """`[..., D] -> [..., vocab]` float32, soft-capped where configured."""
        weight = self.head_weight()
        logits = jnp.matmul(hidden, weight.astype(hidden.dtype), preferred_element_type=jnp.float32)
        cap = self.config.logit_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def head_weight(self) -> jax.Array:
        """`[D, vocab]` in the parameter dtype."""
        return self.embedding[...].T if self.head is None else self.head.weight()

    def init_state(self, batch_size: int, max_len: int) -> State:
        """Empty decode state for sequences of at most `max_len` tokens."""
        return self.stack.init_state(batch_size, max_len)

    def prefill(
        self, tokens: jax.Array, state: State, *, segment_ids: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, State]:
        """Reads left-padded prompts (segment 0, then 1) from an empty state: logits `[B, vocab]` after them, and the state."""
        x, state = self.stack.prefill(self._embed(tokens), state, segment_ids=segment_ids, positions=positions)
        return self.logits(self._final(x[:, -1])), state

    def step(self, tokens: jax.Array, state: State, *, positions: jax.Array) -> tuple[jax.Array, State]:
        """Reads one token per sequence, `tokens` and `positions` `[B]`: logits `[B, vocab]` and the state."""
        x, state = self.stack.step(self._embed(tokens), state, positions=positions)
        return self.logits(self._final(x)), state

    def _embed(self, tokens: jax.Array) -> jax.Array:
        x = self.embedding[...].astype(jnp.dtype(self.config.compute_dtype))[tokens]
        return constrain(x, (*(BATCH, LENGTH)[: x.ndim - 1], None))

    def _final(self, x: jax.Array) -> jax.Array:
        return x if self.norm is None else self.norm(x)


def fold(model: LM) -> LM:
    """`model` with sigmaReparam baked into plain weights: the same function. A plain model is returned as it is."""
    if model.config.sigma_reparam is None:
        return model
    values = nnx.to_pure_dict(nnx.state(model))
    for path, layer in dense_layers(model):
        values_of_layer = functools.reduce(lambda tree, key: tree[key], path, values)
        values_of_layer["kernel"] = layer.weight()
        for name in ("gain", "v", "u"):
            del values_of_layer[name]
    config = dataclasses.replace(model.config, sigma_reparam=None)
    graph, state = nnx.split(nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0), seq_len=model.seq_len)))
    nnx.replace_by_pure_dict(state, values)
    return nnx.merge(graph, state)
