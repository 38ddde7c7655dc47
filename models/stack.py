"""The stack of blocks: a scan over repetitions of the pattern's period, the remainder unrolled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from plait.models.axes import LAYERS
from plait.models.block import Block
from plait.models.build import BuildContext
from plait.models.config import LMConfig
from plait.models.mixers.base import State
from plait.models.mixers.stats import ProbeConfig, Stats
from plait.models.pattern import find_period
from plait.models.schedule import ALL_ROWS, Rows, Schedule, schedule

_POLICIES = {"full": jax.checkpoint_policies.nothing_saveable, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
Apply = Callable[[Block, jax.Array, Rows, Any], tuple[jax.Array, Any]]


class Stack(nnx.Module):
    """`num_layers` blocks. Repeated periods are stacked on a leading `layers` axis, so compile time does not grow with depth."""

    def __init__(self, config: LMConfig, context: Callable[[int], BuildContext]):
        """Args: `context(layer_index)` gives the build context of a layer."""
        self.remat = config.remat
        self.period, self.count = find_period(config.layers)
        block = lambda i: Block(config, context(i))
        scanned = self.period * self.count if self.count > 1 else 0
        self.periods = _stack([nnx.List([block(i) for i in range(s, s + self.period)]) for s in range(0, scanned, self.period)])
        self.rest = nnx.List([block(i) for i in range(scanned, config.num_layers)])

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array, positions: jax.Array, probe: ProbeConfig | None = None
    ) -> tuple[jax.Array, list[Stats | None]]:
        """The residual stream after the last block and the statistics of each layer."""
        rows = {"segment_ids": segment_ids, "positions": positions}
        x, (stacked, rest) = self._run(lambda b, x, rows, _: b(x, **rows, probe=probe), x, rows, (None, None), schedule())
        layers = [jax.tree.map(lambda a, i=i: a[i], s) for i in range(self.count if stacked else 0) for s in stacked]
        return x, layers + rest

    def init_state(self, batch_size: int, max_len: int) -> State:
        """Empty decode states of every layer."""
        stacked = None
        if self.periods is not None:
            one = [block.mixer.init_state(batch_size, max_len) for block in self.periods]
            stacked = jax.tree.map(lambda a: jnp.broadcast_to(a[None], (self.count, *a.shape)), one)
        return stacked, [block.mixer.init_state(batch_size, max_len) for block in self.rest]

    def prefill(self, x: jax.Array, state: State, *, segment_ids: jax.Array, positions: jax.Array) -> tuple[jax.Array, State]:
        rows = {"segment_ids": segment_ids, "positions": positions}
        return self._run(lambda b, x, rows, s: b.prefill(x, s, **rows), x, rows, state)

    def step(self, x: jax.Array, state: State, *, positions: jax.Array) -> tuple[jax.Array, State]:
        return self._run(lambda b, x, rows, s: b.step(x, s, **rows), x, {"positions": positions}, state)

    def _run(
        self, apply: Apply, x: jax.Array, rows: Rows, state: tuple[Any, Any], schedule: Schedule = ALL_ROWS
    ) -> tuple[jax.Array, tuple[Any, list]]:
        def layers(graph: Any) -> Callable:
            def through(x: jax.Array, rows: Rows, xs: tuple[Any, Any]) -> tuple[jax.Array, list]:
                params, states = xs
                outs = []
                for i, block in enumerate(nnx.merge(graph, params)):
                    x, out = apply(block, x, rows, None if states is None else states[i])
                    outs.append(out)
                return x, outs

            return through if self.remat is None else jax.checkpoint(through, policy=_POLICIES[self.remat])

        stacked: Any = None
        rest: list = []
        if self.periods is not None:
            graph, params = nnx.split(self.periods)
            x, stacked = schedule.repeat(layers(graph), x, rows, (params, state[0]))
        if len(self.rest):
            graph, params = nnx.split(self.rest)
            x, rest = schedule.once(layers(graph), x, rows, (params, state[1]))
        return x, (stacked, rest)


def _stack(periods: list[nnx.List]) -> nnx.List | None:
    """The periods as one, each variable stacked on a leading `layers` axis."""
    if not periods:
        return None
    graphs, states = zip(*(nnx.split(period) for period in periods), strict=True)
    if any(graph != graphs[0] for graph in graphs):
        raise ValueError(
            "layers of one kind differ between periods; keep what depends on layer_index in a plait.models.build.Buffer"
        )

    def join(*variables: nnx.Variable) -> nnx.Variable:
        stacked = variables[0].replace(jnp.stack([v[...] for v in variables]))
        stacked.set_metadata(axes=(LAYERS, *variables[0].get_metadata()["axes"]))
        return stacked

    return nnx.merge(graphs[0], jax.tree.map(join, *states, is_leaf=lambda v: isinstance(v, nnx.Variable)))
