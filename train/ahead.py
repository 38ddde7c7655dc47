"""The training step of a config, compiled ahead of time for accelerators that are not at hand."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp

from plait.configs.experiment import ExperimentConfig
from plait.data.batch import Batch
from plait.kernels.target import target
from plait.models.mixers.stats import ProbeConfig
from plait.train.mesh import batch_sharding
from plait.train.optimizer import make_optimizer
from plait.train.state import Blueprint, create_state, state_shardings
from plait.train.step import make_step


def lower_step(
    config: ExperimentConfig, mesh: jax.sharding.Mesh, generation: str | None, probe: ProbeConfig | None = None
) -> jax.stages.Lowered:
    """The step that a run of `config` takes on `mesh`, lowered; `.compile()` runs the real compiler.

    Args:
        config: with the model's vocabulary settled.
        mesh: over described devices (`jax.experimental.topologies`) or real ones.
        generation: what the kernels are traced for, a name of `plait.kernels.target.TARGETS`; None for what is at hand.
        probe: lowers the step that also returns statistics.

    Raises:
        ValueError: the mesh does not divide the model or the batch, or the generation is unknown.
    """
    blueprint = Blueprint(config)
    tx = make_optimizer(config.optimizer, config.steps, blueprint.decay)
    shardings = state_shardings(blueprint, tx, mesh)
    rows = batch_sharding(mesh, config.data.batch_size, config.data.seq_len, config.optimizer.accumulate)
    place = lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)  # noqa: E731
    state: Any = jax.tree.map(place, jax.eval_shape(lambda: create_state(blueprint, tx)), shardings)
    shape = (config.data.batch_size, config.data.seq_len)
    batch = Batch(*(jax.ShapeDtypeStruct(shape, t, sharding=rows) for t in (jnp.int32,) * 4 + (jnp.float32,)))
    step = jax.jit(make_step(blueprint, tx, mesh, probe), donate_argnums=0, out_shardings=(shardings, None))
    with contextlib.nullcontext() if generation is None else target(generation):
        return step.lower(state, batch)
