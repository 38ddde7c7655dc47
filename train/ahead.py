"""The training step of a config, compiled ahead of time for accelerators that are not at hand."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from plait.configs.experiment import ExperimentConfig
from plait.data.batch import Batch
from plait.kernels.target import target
from plait.models.mixers.stats import ProbeConfig
from plait.train.mesh import batch_sharding
from plait.train.optimizer import make_optimizer
from plait.train.state import Blueprint, TrainState, abstract_state, state_shardings
from plait.train.step import make_step


@dataclasses.dataclass(frozen=True)
class Described:
    """A config's training step on a mesh, without arrays."""

    config: ExperimentConfig
    mesh: jax.sharding.Mesh
    blueprint: Blueprint
    tx: optax.GradientTransformation
    state: TrainState
    """Shapes and dtypes."""
    shardings: TrainState

    def lower(self, generation: str | None, probe: ProbeConfig | None = None) -> jax.stages.Lowered:
        """The step, lowered; see `lower_step`."""
        data = self.config.data
        rows = batch_sharding(self.mesh, data.batch_size, data.seq_len, self.config.optimizer.accumulate)
        place = lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)  # noqa: E731
        state: Any = jax.tree.map(place, self.state, self.shardings)
        shape = (data.batch_size, data.seq_len)
        batch = Batch(*(jax.ShapeDtypeStruct(shape, t, sharding=rows) for t in (jnp.int32,) * 4 + (jnp.float32,)))
        step = jax.jit(
            make_step(self.blueprint, self.tx, self.mesh, probe), donate_argnums=0, out_shardings=(self.shardings, None)
        )
        with contextlib.nullcontext() if generation is None else target(generation):
            return step.lower(state, batch)


def describe_step(config: ExperimentConfig, mesh: jax.sharding.Mesh, blueprint: Blueprint | None = None) -> Described:
    """The step that a run of `config` takes on `mesh`.

    Args:
        config: with the model's vocabulary settled.
        mesh: over described devices (`jax.experimental.topologies`) or real ones.
        blueprint: of this config; made if None.

    Raises:
        ValueError: the mesh does not divide the model or the batch.
    """
    batch_sharding(mesh, config.data.batch_size, config.data.seq_len, config.optimizer.accumulate)
    blueprint = Blueprint(config) if blueprint is None else blueprint
    tx = make_optimizer(config.optimizer, config.steps, blueprint.decay)
    return Described(config, mesh, blueprint, tx, abstract_state(blueprint, tx), state_shardings(blueprint, tx, mesh))


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
    return describe_step(config, mesh).lower(generation, probe)
