"""Which heads of softmax attention need all tokens: gates between all of them and a window, trained on what lies far back."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from plait.kernels import Mask, Tokens, attention
from plait.models.block import Block
from plait.models.lm import LM
from plait.models.mixers.around import AroundHeads
from plait.models.mixers.full.softmax import Softmax
from plait.train.convert.linearize.recall_rows import recalling
from plait.train.convert.options import GatesConfig
from plait.train.convert.sample import rows_of
from plait.train.mesh import on_mesh
from plait.train.run import Trained
from plait.train.terminal.progress import ProgressLine

_RAMP = 5
"""The learning rate rises over one part in so many of the steps, and falls over as many."""


class Gated(AroundHeads):
    """Softmax attention of which a key head's queries give `g` of what all tokens give and `1 - g` of what a window and the first tokens
    give. Source: DuoAttention (arXiv 2410.10819) and the authors' code, which has a gate for each key head."""

    inner: Softmax

    def __init__(self, inner: Softmax, gates: jax.Array, window: Mask):
        """Args: `gates` `[Hkv]`, or of stacked layers `[..., Hkv]`."""
        self.inner, self.num_heads, self.window = inner, inner.num_heads, window
        self.gates = nnx.Param(gates)

    def mix(self, inputs, x, *, at):
        options = {**self.inner.options(inputs, at), "mask": self.window}
        far: Any = self.inner.mix(inputs, x, at=at)
        near: Any = attention(*inputs[:3], at=at, **options)
        gates = jnp.repeat(self.gates[...], self.num_heads // self.gates.shape[-1], axis=-1)[None, None, :, None]
        return (gates * far + (1 - gates) * near).astype(far.dtype)


def gate(model: LM, gates: Sequence[jax.Array], window_size: int, num_sink_tokens: int) -> None:
    """Puts gates, `[Hkv]` of each layer or `[0]` where it has none, into a model."""

    def put(block: Block, own: jax.Array) -> None:
        if own.shape[-1]:
            assert isinstance(block.mixer, Softmax)
            block.mixer = Gated(block.mixer, own, streaming(block.mixer.mask, window_size, num_sink_tokens))

    model.stack.give(put, gates)


def streaming(mask: Mask, window_size: int, num_sink_tokens: int) -> Mask:
    """What a window leaves of a mask; where that has one itself, no more than it."""
    if mask.window_size is not None:
        return dataclasses.replace(mask, window_size=min(mask.window_size, window_size))
    return dataclasses.replace(mask, window_size=window_size, num_sink_tokens=num_sink_tokens)


def trained_gates(
    trained: Trained, layers: Sequence[int], config: GatesConfig, *, text: np.ndarray | None, window_size: int, seed: int
) -> dict[int, np.ndarray]:
    """The gates of layers of softmax attention by layer, float64 in [0, 1], one for each query head: those of one key head are the same.

    Nothing else is trained. The loss is `mean |h - h'|^2 / |h|^2 + c mean g`: h and h' are what the head of the model reads, without gates
    and with them, where something far back is asked for. Gates begin at 1 and stay in [0, 1].

    Args:
        text: ids, into pieces of which keys are put; None for rows of the task that the run was trained on.
        window_size: tokens that a head sees without its gate, beside the first ones.
        seed: of the rows.

    Raises:
        ConvertError: the rows have no place for a key, or there is neither a text nor a task that asks.
    """
    program = trained.program
    accumulate, rows = rows_of(program.config, program.mesh, config.rows)
    read = recalling(trained, rows, text, seed)
    model = program.config.model
    mixers: Any = model.layer_mixers
    counts = [mixers[index].heads(model.d_model) if index in layers else (0, 0) for index in range(model.num_layers)]

    def hidden(params: Any, buffers: Any, at: Tokens, gates: Any) -> jax.Array:
        with on_mesh(program.mesh, accumulate, program.config.mesh.context_exchange):
            made = program.blueprint.build(params, buffers)
            if gates is not None:
                gate(made, gates, window_size, config.num_sink_tokens)
            return made.hidden(at)[0].astype(jnp.float32)

    def loss(gates: Any, params: Any, buffers: Any, at: Tokens, asked: jax.Array) -> jax.Array:
        whole = jax.lax.stop_gradient(hidden(params, buffers, at, None))
        apart = jnp.square(hidden(params, buffers, at, gates) - whole).sum(-1) / jnp.maximum(jnp.square(whole).sum(-1), 1e-30)
        distance = (apart * asked).sum() / jnp.maximum(asked.sum(), 1)
        return distance + config.penalty * jnp.concatenate(gates).mean()

    ramp = max(1, config.steps // _RAMP)
    rate = lambda step: config.learning_rate * jnp.minimum(1, jnp.minimum(step + 1, config.steps - step) / ramp)
    optimizer = optax.adam(rate)

    everywhere = NamedSharding(program.mesh, PartitionSpec())

    @functools.partial(jax.jit, out_shardings=everywhere)
    def step(gates: Any, moments: Any, *batch: Any) -> tuple[Any, Any, jax.Array]:
        value, slopes = jax.value_and_grad(loss)(gates, *batch)
        changes, moments = optimizer.update(slopes, moments)
        return jax.tree.map(lambda g, change: jnp.clip(g + change, 0, 1), gates, changes), moments, value

    gates = jax.device_put([jnp.ones(kv_heads) for _, kv_heads in counts], everywhere)
    moments = jax.jit(optimizer.init, out_shardings=everywhere)(gates)
    line = ProgressLine(config.steps)
    try:
        for number in range(config.steps):
            tokens, asked = read(number)
            at = Tokens(jnp.asarray(tokens, jnp.int32))
            gates, moments, value = step(gates, moments, trained.params, trained.buffers, at, jnp.asarray(asked, jnp.float32))
            line.update(number + 1, loss=float(value))
    finally:
        line.close()
    return {index: np.repeat(np.asarray(gates[index], np.float64), counts[index][0] // counts[index][1]) for index in layers}
