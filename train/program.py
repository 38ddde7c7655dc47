"""The training step of a config on a mesh: all of a run but its data and its arrays."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from plait.configs.experiment import ExperimentConfig
from plait.data.batch import Batch
from plait.kernels.target import target
from plait.train.optimizers import make_optimizer
from plait.train.pods.hosts.layout import BatchLayout, batch_layout
from plait.train.probes.base import Probes
from plait.train.state import Blueprint, TrainState, abstract_state, create_state, state_shardings
from plait.train.step import make_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """Make it with `of`. The mesh may be over devices that are not at hand (`jax.experimental.topologies`)."""

    config: ExperimentConfig
    mesh: Mesh
    blueprint: Blueprint
    tx: optax.GradientTransformation
    shardings: TrainState
    """Of each leaf of the state."""

    @classmethod
    def of(cls, config: ExperimentConfig, mesh: Mesh, blueprint: Blueprint | None = None, **more: Any) -> Self:
        """The step that a run of `config` takes on `mesh`.

        Args:
            config: with the model's vocabulary settled.
            mesh: over real or described devices.
            blueprint: of this config; made if None.
            more: fields of a subclass.

        Raises:
            ValueError: the mesh does not divide the model or the batch.
        """
        batch_layout(config, mesh)
        blueprint = Blueprint(config) if blueprint is None else blueprint
        tx = make_optimizer(config.optimizer, config.steps, blueprint.parameters(mesh))
        return cls(config=config, mesh=mesh, blueprint=blueprint, tx=tx, shardings=state_shardings(blueprint, tx, mesh), **more)

    @functools.cached_property
    def layout(self) -> BatchLayout:
        """That of the batches."""
        return batch_layout(self.config, self.mesh)

    def fresh(self) -> TrainState:
        """The state at step 0."""
        return self.lower_fresh().compile()(self._seed)

    def lower_fresh(self) -> jax.stages.Lowered:
        """What `fresh` runs, traced: of a seed, so that runs which differ in it share the program."""
        create = lambda seed: create_state(self.blueprint, self.tx, seed)
        return jax.jit(create, out_shardings=self.shardings).lower(self._seed)

    @property
    def controls(self) -> dict[str, np.uint32]:
        """What every step takes beside state and batch."""
        return {"seed": self._seed} if self.config.model.dropout.asked else {}

    @property
    def _seed(self) -> np.uint32:
        return np.uint32(self.config.seed)

    @functools.cached_property
    def like(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        place = lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)
        return jax.tree.map(place, abstract_state(self.blueprint, self.tx), self.shardings)

    def lower(
        self,
        observer: Probes | None = None,
        generation: str | None = None,
        controls: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> jax.stages.Lowered:
        """The step, traced with its state donated; `.compile()` runs the real compiler. Metrics come back whole on every host.

        Args:
            observer: lowers the step that also returns its statistics.
            generation: what the kernels are traced for, a name of `plait.kernels.chips.CHIPS`; None for what is at hand.
            controls: like what else the step takes beside state and batch.

        Raises:
            ValueError: the generation is unknown.
        """
        kinds = Batch(*(jnp.int32,) * 4, jnp.float32)
        batch = Batch(*(jax.ShapeDtypeStruct(self.layout.shape, kind, sharding=self.layout.sharding) for kind in kinds))
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        step = make_step(self.blueprint, self.tx, self.mesh, observer)
        with contextlib.nullcontext() if generation is None else target(generation):
            return jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, everywhere)).lower(
                self.like, batch, **self.controls, **controls
            )
