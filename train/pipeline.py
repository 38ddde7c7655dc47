"""Pipeline parallelism: the repetitions of the layer pattern lie in stages, and micro-batches flow from stage to stage."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from plait.kernels import Tokens
from plait.models import axes
from plait.models.block import over_microbatches
from plait.models.flow import Layers
from plait.models.stream import Stream

AXIS = "pipeline"


def bubble_fraction(stages: int, microbatches: int) -> float:
    """Share of a step's time in which a stage waits for the first micro-batch or has passed on the last."""
    return (stages - 1) / (microbatches + stages - 1)


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A `plait.models.flow.Flow` over the mesh axis `pipeline`: GPipe (arXiv 1811.06965).

    In tick t stage s works on micro-batch t - s and then sends it on; the backward pass is the same loop in reverse, so the devices
    of a stage hold only its layers' parameters, gradients and moments. Ticks before a stage's first micro-batch and after its last
    compute something that nobody reads. Row i belongs to micro-batch i % microbatches, as when gradients are accumulated, and
    the numbers are those of accumulation.
    """

    mesh: Mesh
    microbatches: int

    def repeat(self, layers: Layers, stream: Stream, at: Tokens, params: Any) -> tuple[Stream, Any]:
        stages, parts = self.mesh.shape[AXIS], self.microbatches

        def stage(params: Any, inputs: Stream, at: Tokens) -> tuple[Stream, Any]:
            here, inputs = jax.lax.axis_index(AXIS), jax.tree.map(lambda a: a[0], inputs)

            def tick(arrived: Stream, t: jax.Array) -> tuple[Stream, Any]:
                new = jax.tree.map(lambda a: a[jnp.minimum(t, parts - 1)], inputs)
                stream = jax.tree.map(lambda new, old: jnp.where(here == 0, new, old), new, arrived)
                own = jax.tree.map(lambda a: a[jnp.clip(t - here, 0, parts - 1)], at)
                stream, outs = jax.lax.scan(lambda stream, one: layers(stream, own, one), stream, params)
                hops = [(s, s + 1) for s in range(stages - 1)]
                return jax.tree.map(lambda a: jax.lax.ppermute(a, AXIS, hops), stream), (stream, outs)

            first = jax.tree.map(lambda a: a[0], inputs)
            _, (streams, outs) = jax.lax.scan(tick, first, jnp.arange(parts + stages - 1))
            outs = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, here, parts), outs)
            last = jax.tree.map(lambda a: jnp.where(here == stages - 1, a[stages - 1 :], 0)[None], streams)
            return last, over_microbatches(outs)

        # The first stage's input and the last one's output are there on every stage: the embedding, the head and the loss are no
        # part of the pipeline. As an axis of stages, because a sum of bfloat16 inside a partly manual `shard_map` does not compile
        # on CPUs.
        inputs = jax.tree.map(lambda a: jnp.broadcast_to(a[None], (stages, *a.shape)), jax.tree.map(self._cut, stream))
        by_stage = PartitionSpec(AXIS)
        streams, outs = jax.shard_map(
            stage,
            mesh=self.mesh,
            in_specs=(by_stage, by_stage, PartitionSpec()),
            out_specs=by_stage,
            axis_names={AXIS},
            check_vma=False,
        )(params, inputs, jax.tree.map(self._cut, at))
        return jax.tree.map(lambda a: self._join(a.sum(0)), streams), outs

    def once(self, layers: Layers, stream: Stream, at: Tokens, params: Any) -> tuple[Stream, Any]:
        parts = jax.tree.map(self._cut, (stream, at))
        stream, outs = jax.lax.map(lambda part: layers(part[0], part[1], params), parts)
        return jax.tree.map(self._join, stream), over_microbatches(outs)

    def _cut(self, a: jax.Array) -> jax.Array:
        """`[B, T, ...]` as micro-batches `[M, B / M, T, ...]`."""
        a = jnp.moveaxis(a.reshape(a.shape[0] // self.microbatches, self.microbatches, *a.shape[1:]), 1, 0)
        return axes.constrain(a, (None, axes.BATCH, axes.LENGTH, *[None] * (a.ndim - 3)))

    def _join(self, a: jax.Array) -> jax.Array:
        """Micro-batches as one batch again."""
        a = jnp.moveaxis(a, 0, 1)
        a = a.reshape(-1, *a.shape[2:])
        return axes.constrain(a, (axes.BATCH, axes.LENGTH, *[None] * (a.ndim - 2)))
