"""The stack of blocks: a scan over repetitions of the pattern's period, what stands before and after them unrolled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from plait.kernels import Tokens
from plait.models.axes import LAYERS
from plait.models.block import Block, Extras
from plait.models.build import BuildContext, Keys, NumberedKeys
from plait.models.config import LMConfig
from plait.models.flow import WHOLE_BATCH, Flow, flow
from plait.models.layers.grouped import GROUPED
from plait.models.looks.look import Observer
from plait.models.looks.taps import Tapped
from plait.models.mixers.base import State
from plait.models.stream import Stream

_SAVE = jax.checkpoint_policies
_POLICIES = {
    "full": _SAVE.nothing_saveable,
    "dots": _SAVE.save_from_both_policies(_SAVE.dots_with_no_batch_dims_saveable, _SAVE.save_only_these_names(GROUPED)),
}
Apply = Callable[[Block, Stream, Tokens, Any], tuple[Stream, Any]]


class Stack(nnx.Module):
    """`num_layers` blocks. Repeated periods are stacked on a leading `layers` axis, made and run by one traced period, so that compile
    time does not grow with depth."""

    def __init__(self, config: LMConfig, rngs: nnx.Rngs, context: Callable[[Any, Keys], BuildContext]):
        """Args: `context(layer_index, rngs)` gives the build context of a layer."""
        self.remat = config.remat
        self.lead, self.period, self.count = config.periods

        def block(static: int, index: Any, keys: Keys) -> Block:
            name = config.layers[static]
            return Block(
                name,
                config.mixers[name],
                config.channel_mixer_of(name),
                config.d_model,
                context(index, keys),
                norm=config.norm_of(name),
                norm_eps=config.norm_eps,
                parallel=config.parallel_block,
                residual_scale=config.residual_scale,
                stream_scale=config.stream_scale,
                stream_gains=config.stream_gains,
                qk_clip=config.qk_clip,
                attention_loss=config.attention_loss,
                dropout=config.dropout,
                layer_scalar=config.layer_scalars,
                layer_inputs=config.layer_inputs,
            )

        def period(start: Any, keys: Keys) -> nnx.List:
            return nnx.List([block(self.lead + i, start + i, keys) for i in range(self.period)])

        self.first = nnx.List([block(i, i, rngs) for i in range(self.lead)])
        end = self.lead + (self.period * self.count if self.count > 1 else 0)
        self.periods = _stacked(period, rngs, range(self.lead, end, self.period)) if self.count > 1 else None
        self.rest = nnx.List([block(i, i, rngs) for i in range(end, config.num_layers)])

    def __call__(self, stream: Stream, *, at: Tokens, observer: Observer | None = None) -> tuple[Stream, list[Extras]]:
        """The stream after the last block, and what each layer gives beside it."""

        def apply(block: Block, stream: Stream, at: Tokens, taps: Any) -> tuple[Stream, Extras]:
            own = dataclasses.replace(observer, taps=taps) if isinstance(observer, Tapped) else observer
            return block(stream, at=at, observer=own)

        taps = self._by_block(observer.taps) if isinstance(observer, Tapped) else (None, None, None)
        stream, (first, stacked, rest) = self._run(apply, stream, at, taps, flow())
        layers = [jax.tree.map(lambda a, i=i: a[i], s) for i in range(self.count if stacked else 0) for s in stacked]
        return stream, first + layers + rest

    def settle(self, counts: Sequence[Mapping[str, Any]]) -> None:
        """Lets mixers move their buffers by the counts of a step, one mapping a layer."""
        self.give(lambda block, own: block.settle(own), counts)

    def clip(self, max_logits: Sequence[jax.Array]) -> None:
        """Lets mixers scale queries and keys back by the largest logits of a step, those of one layer after another."""
        self.give(lambda block, own: block.clip(own), max_logits)

    def give(self, to: Callable[[Block, Any], None], each: Sequence[Any]) -> None:
        """What is of each layer, to its block; stacked where the blocks are: `to` sees those of a period once."""
        first, stacked, rest = self._by_block(each)
        for block, own in zip([*self.first, *(self.periods or ()), *self.rest], [*first, *stacked, *rest], strict=True):
            to(block, own)

    def init_state(self, batch_size: int, max_len: int) -> State:
        """Empty decode states of every layer."""
        stacked = None
        if self.periods is not None:
            graph, variables = nnx.split(self.periods)
            period = lambda variables: [block.init_state(batch_size, max_len) for block in nnx.merge(graph, variables)]
            stacked = jax.vmap(period, axis_size=self.count)(variables)  # a layer's state may depend on its parameters
        first, rest = ([block.init_state(batch_size, max_len) for block in blocks] for blocks in (self.first, self.rest))
        return first, stacked, rest

    def prefill(self, stream: Stream, state: State, *, at: Tokens) -> tuple[Stream, State]:
        """As the call on left-padded prompts, from empty states; also the states after the last token."""
        return self._run(lambda block, stream, at, state: block.prefill(stream, state, at=at), stream, at, state)

    def step(self, stream: Stream, state: State, *, at: Tokens) -> tuple[Stream, State]:
        """One token."""
        return self._run(lambda block, stream, at, state: block.step(stream, state, at=at), stream, at, state)

    def _by_block(self, layers: Sequence[Any]) -> tuple[Sequence[Any], list, Sequence[Any]]:
        """Trees, one a layer, as blocks are held: before the repeated periods, stacked in them, and after."""
        end = self.lead + (self.period * self.count if self.periods is not None else 0)
        repeated = [layers[self.lead + i : end : self.period] for i in range(len(self.periods or ()))]
        return layers[: self.lead], [jax.tree.map(lambda *each: jnp.stack(each), *own) for own in repeated], layers[end:]

    def _run(
        self, apply: Apply, stream: Stream, at: Tokens, state: tuple[Any, Any, Any], flow: Flow = WHOLE_BATCH
    ) -> tuple[Stream, tuple[list, Any, list]]:
        def layers(graph: Any) -> Callable:
            def through(stream: Stream, at: Tokens, xs: tuple[Any, Any]) -> tuple[Stream, list]:
                params, states = xs
                outs = []
                for i, block in enumerate(nnx.merge(graph, params)):
                    stream, out = apply(block, stream, at, None if states is None else states[i])
                    outs.append(out)
                return stream, outs

            return through if self.remat is None else jax.checkpoint(through, policy=_POLICIES[self.remat])

        def each(blocks: nnx.List, stream: Stream, states: Any) -> tuple[Stream, list]:
            if not len(blocks):
                return stream, []
            graph, params = nnx.split(blocks)
            return flow.once(layers(graph), stream, at, (params, states))

        stacked: Any = None
        stream, first = each(self.first, stream, state[0])
        if self.periods is not None:
            graph, params = nnx.split(self.periods)
            period, xs = layers(graph), (params, state[1])
            stream, stacked = flow.repeat(period, _with_whole_carry(period, stream, at, xs), at, xs)
        stream, rest = each(self.rest, stream, state[2])
        return stream, (first, stacked, rest)


def _with_whole_carry(period: Callable, stream: Stream, at: Tokens, xs: Any) -> Stream:
    """The stream with zeros for what the period's layers will leave in the carry: a scan's carry has one structure from the start."""
    left = jax.eval_shape(lambda stream, at, xs: period(stream, at, jax.tree.map(lambda a: a[0], xs))[0], stream, at, xs).carry
    new = {name: like for name, like in left.items() if name not in stream.carry}
    return Stream(stream.x, {**stream.carry, **jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), new)})


def _stacked(make: Callable[[Any, Keys], nnx.List], rngs: nnx.Rngs, starts: range) -> nnx.List:
    """Modules `make(start, keys)` as one, each variable stacked on a leading `layers` axis, from one trace.

    The keys are those that making them one after another would draw.
    """
    stream = rngs.params
    key, number = stream.key[...], stream.count[...]
    keys = NumberedKeys(key, 0)
    graph, _ = nnx.split(nnx.eval_shape(lambda: make(starts[0], keys)))
    drawn = keys.number

    def variables(i: jax.Array) -> nnx.State:
        return nnx.split(make(starts.start + i * starts.step, NumberedKeys(key, number + i * drawn)))[1]

    def name_layers(variable: nnx.Variable) -> nnx.Variable:
        variable.set_metadata(axes=(LAYERS, *variable.get_metadata()["axes"]))
        return variable

    stacked = jax.vmap(variables)(jnp.arange(len(starts)))
    stream.count[...] = number + len(starts) * drawn
    return nnx.merge(graph, jax.tree.map(name_layers, stacked, is_leaf=lambda v: isinstance(v, nnx.Variable)))
