"""Pipeline parallelism: the repetitions of the layer pattern lie in stages, and micro-batches flow from stage to stage."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from plait.models import axes
from plait.models.mixers.stats import over_microbatches
from plait.models.schedule import Layers, Rows

AXIS = "pipeline"


def bubble_fraction(stages: int, microbatches: int) -> float:
    """Share of a step's time in which a stage waits for the first micro-batch or has passed on the last."""
    return (stages - 1) / (microbatches + stages - 1)


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A `plait.models.schedule.Schedule` over the mesh axis `pipeline`: GPipe (arXiv 1811.06965).

    In tick t stage s works on micro-batch t - s and then sends it on; the backward pass is the same loop in reverse, so the devices
    of a stage hold only its layers' parameters, gradients and moments. Ticks before a stage's first micro-batch and after its last
    compute something that nobody reads. Row i belongs to micro-batch i % microbatches, as when gradients are accumulated, and
    the numbers are those of accumulation.
    """

    mesh: Mesh
    microbatches: int

    def repeat(self, layers: Layers, x: jax.Array, rows: Rows, params: Any) -> tuple[jax.Array, Any]:
        stages, parts = self.mesh.shape[AXIS], self.microbatches

        def stage(params: Any, inputs: jax.Array, rows: Rows) -> tuple[jax.Array, Any]:
            at, inputs = jax.lax.axis_index(AXIS), inputs[0]

            def tick(arrived: jax.Array, t: jax.Array) -> tuple[jax.Array, Any]:
                x = jnp.where(at == 0, inputs[jnp.minimum(t, parts - 1)], arrived)
                own = jax.tree.map(lambda a: a[jnp.clip(t - at, 0, parts - 1)], rows)
                x, outs = jax.lax.scan(lambda x, one: layers(x, own, one), x, params)
                return jax.lax.ppermute(x, AXIS, [(s, s + 1) for s in range(stages - 1)]), (x, outs)

            _, (x, outs) = jax.lax.scan(tick, inputs[0], jnp.arange(parts + stages - 1))
            outs = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, at, parts), outs)
            return jnp.where(at == stages - 1, x[stages - 1 :], 0)[None], over_microbatches(outs)

        # The first stage's input and the last one's output are there on every stage: the embedding, the head and the loss are no
        # part of the pipeline. As an axis of stages, because a sum of bfloat16 inside a partly manual `shard_map` does not compile
        # on CPUs.
        inputs = self._cut(x)
        inputs = jnp.broadcast_to(inputs[None], (stages, *inputs.shape))
        by_stage = PartitionSpec(AXIS)
        x, outs = jax.shard_map(
            stage,
            mesh=self.mesh,
            in_specs=(by_stage, by_stage, PartitionSpec()),
            out_specs=by_stage,
            axis_names={AXIS},
            check_vma=False,
        )(params, inputs, jax.tree.map(self._cut, rows))
        return self._join(x.sum(0)), outs

    def once(self, layers: Layers, x: jax.Array, rows: Rows, params: Any) -> tuple[jax.Array, Any]:
        x, outs = jax.lax.map(lambda part: layers(part[0], part[1], params), (self._cut(x), jax.tree.map(self._cut, rows)))
        return self._join(x), over_microbatches(outs)

    def _cut(self, a: jax.Array) -> jax.Array:
        """`[B, T, ...]` as micro-batches `[M, B / M, T, ...]`."""
        a = jnp.moveaxis(a.reshape(a.shape[0] // self.microbatches, self.microbatches, *a.shape[1:]), 1, 0)
        return axes.constrain(a, (None, axes.BATCH, axes.LENGTH, *[None] * (a.ndim - 3)))

    def _join(self, a: jax.Array) -> jax.Array:
        """Micro-batches as one batch again."""
        a = jnp.moveaxis(a, 0, 1)
        a = a.reshape(-1, *a.shape[2:])
        return axes.constrain(a, (axes.BATCH, axes.LENGTH, *[None] * (a.ndim - 2)))
