"""The language model."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from plait.configs.components import at as under
from plait.configs.components import unchecked
from plait.kernels import Tokens
from plait.models.axes import BATCH, EMBED, LENGTH, VOCAB, constrain
from plait.models.block import Extras
from plait.models.build import BuildContext, Keys, Moved
from plait.models.config import LMConfig
from plait.models.dropout import Dropout
from plait.models.layers.layer_inputs import LAYER_INPUTS, LayerInputs
from plait.models.layers.linear import Dense, dense_layers, start_singular_vectors
from plait.models.layers.lora import LoRAConfig
from plait.models.layers.norms import make_norm
from plait.models.looks.look import Observer
from plait.models.mixers.base import State
from plait.models.stack import Stack
from plait.models.stream import Stream

_EMBED_STD = 0.02


class LM(nnx.Module):
    """Embedding, stack, final norm, head. Tokens are int32 `[B, T]` with their segments (0 is padding) and positions."""

    def __init__(self, config: LMConfig, *, rngs: nnx.Rngs, seq_len: int):
        """Args: `config` with its vocabulary settled (`LMConfig.with_vocab`); `seq_len` of training, in tokens."""
        if config.vocab_size is None:
            raise ValueError(
                "model.vocab_size=None must be settled before the model is built; use LMConfig.with_vocab(tokenizer size)"
            )
        self.config, self.seq_len = config, seq_len

        def context(layer_index: Any, keys: Keys) -> BuildContext:
            return BuildContext(
                layer_index=layer_index,
                num_layers=config.num_layers,
                causal=config.causal,
                rngs=keys,
                seq_len=seq_len,
                param_dtype=jnp.dtype(config.param_dtype),
                compute_dtype=jnp.dtype(config.compute_dtype),
                norm_kind=config.norm_kind,
                sigma_reparam=config.sigma_reparam,
                lora=None if config.lora.rank is None else config.lora,
                defer_vectors=True,
                first_layers=config.first_layers,
            )

        ctx = context(config.num_layers, rngs)
        embed_init = jax.nn.initializers.normal(_EMBED_STD)
        self.embedding = ctx.param(embed_init, (config.vocab_size, config.d_model), (VOCAB, EMBED), role="embedding")
        positions = config.positions
        self.positions = None if positions is None else under("model.positions", positions.build, ctx, config.d_model, 1)
        self.embedding_norm = make_norm(ctx, config.d_model, eps=config.norm_eps) if config.embedding_norm else None
        self.dropout = Dropout(config.dropout, ctx) if config.dropout.asked else None
        self.shared = shared_modules(config, ctx)
        inputs = config.layer_inputs
        self.layer_inputs = None if inputs.dim is None else LayerInputs(inputs, config, ctx, embed_init)
        self.stack = Stack(config, rngs, context)
        self.norm = make_norm(ctx, config.d_model, eps=config.norm_eps) if config.norm not in ("post", "none") else None
        head = lambda size: Dense(ctx, config.d_model, size, (EMBED, VOCAB), init=embed_init, role="head")
        self.head = None if config.tie_embeddings else head(config.vocab_size)
        if config.sigma_reparam is not None:
            start_singular_vectors(self, config.sigma_reparam)

    def __call__(self, at: Tokens, *, observer: Observer | None = None) -> tuple[jax.Array, list[Extras]]:
        """Logits `[B, T, vocab]` float32 and what each layer gives beside them."""
        hidden, extras = self.hidden(at, observer=observer)
        return self.logits(hidden), extras

    def hidden(self, at: Tokens, *, observer: Observer | None = None) -> tuple[jax.Array, list[Extras]]:
        """What the head reads, `[B, T, D]`, and what each layer gives beside it."""
        at = at.placed(*at.ids.shape)
        stream, extras = self.stack(self._embed(at), at=at, observer=observer)
        return self._final(stream), extras

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
        """Empty decode state for sequences of at most `max_len` tokens. Raises ValueError where the model is not causal."""
        if not self.config.causal:
            raise ValueError("model.causal=False has no token after token; generate with a causal model, or score this one")
        if self.config.positions is not None:
            under("model.positions", self.config.positions.fit_length, max_len, "decoding")
        return self.stack.init_state(batch_size, max_len)

    def prefill(self, at: Tokens, state: State) -> tuple[jax.Array, State]:
        """Reads left-padded prompts (segment 0, then 1) from an empty state: logits `[B, vocab]` after them, and the state."""
        at = at.placed(*at.ids.shape)
        stream, state = self.stack.prefill(self._embed(at), state, at=at)
        return self.logits(self._final(stream)[:, -1]), state

    def step(self, at: Tokens, state: State) -> tuple[jax.Array, State]:
        """Reads one token a sequence, `[B, 1]`: logits `[B, vocab]` and the state."""
        stream, state = self.stack.step(self._embed(at), state, at=at)
        return self.logits(self._final(stream)[:, 0]), state

    def _embed(self, at: Tokens) -> Stream:
        x = self.embedding[...].astype(jnp.dtype(self.config.compute_dtype))[at.ids]
        if self.config.embedding_scale is not None:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        x = constrain(x, (BATCH, LENGTH, None))
        inputs = None if self.layer_inputs is None else self.layer_inputs(x, at)
        x = x if self.positions is None else self.positions.add(x, at)
        for_rows = lambda a: jnp.broadcast_to(a[None, None], (len(x), 1, *a.shape))
        carry = {name: for_rows(module()) for name, module in self.shared.items()}
        if inputs is not None:
            carry[LAYER_INPUTS] = inputs
        x = x if self.embedding_norm is None else self.embedding_norm(x)
        return Stream(x if self.dropout is None else self.dropout(x, at), carry)

    def _final(self, stream: Stream) -> jax.Array:
        x = stream.x if self.norm is None else self.norm(stream.x)
        return x if self.config.logit_scale is None else x * jnp.asarray(self.config.logit_scale, x.dtype)


def shared_modules(config: LMConfig, ctx: BuildContext) -> nnx.Dict:
    """What gives the carry that the model leaves before the first layer, by name."""
    return nnx.Dict({name: use.make(ctx) for name, use in config.shared.items() if use.make is not None})


def num_params(config: LMConfig) -> int:
    """Trained parameters of a model, from models whose layers all have one of its mixers: the time to count does not grow with depth."""

    def count(name: str) -> tuple[int, int]:
        """Outside of the blocks and inside one."""
        with unchecked():
            one = dataclasses.replace(config, pattern=name, mixers={name: config.mixers[name]})
        model = nnx.eval_shape(lambda: LM(one, rngs=nnx.Rngs(0), seq_len=1))
        every, shared, blocks = (size(module) for module in (model, model.shared, model.stack))
        return every - shared - blocks, blocks // config.num_layers

    size = lambda module: sum(p.size for p in jax.tree.leaves(nnx.state(module, nnx.Param)))
    ctx = lambda: BuildContext(rngs=nnx.Rngs(0), seq_len=1, num_layers=config.num_layers)
    counts = {name: count(name) for name in config.mixers}
    shared = size(nnx.eval_shape(lambda: shared_modules(config, ctx())))
    return counts[config.layers[0]][0] + shared + sum(counts[name][1] for name in config.layers)


def learned_shapes(config: LMConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of what training makes of a model, by dotted path: parameters, and buffers that it moves."""
    learned = nnx.state(nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0), seq_len=1)), nnx.filterlib.Any(nnx.Param, Moved))
    return {".".join(map(str, path)): jax.ShapeDtypeStruct(v.shape, v.dtype) for path, v in nnx.to_flat_state(learned)}


def fold(model: LM) -> LM:
    """`model` with sigmaReparam and adapters baked into plain weights: the same function. A plain model is returned as it is."""
    if model.config.sigma_reparam is None and model.config.lora.rank is None:
        return model
    values = nnx.to_pure_dict(nnx.state(model))
    for path, layer in dense_layers(model):
        values_of_layer = functools.reduce(lambda tree, key: tree[key], path, values)
        values_of_layer["kernel"] = layer.weight()
        for name in ("gain", "v", "u", "lora_a", "lora_b"):
            values_of_layer.pop(name, None)
    config = dataclasses.replace(model.config, sigma_reparam=None, lora=LoRAConfig())
    graph, state = nnx.split(nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0), seq_len=model.seq_len)))
    nnx.replace_by_pure_dict(state, values)
    return nnx.merge(graph, state)
