"""Memory of a step on one device: what the compiler allots, and an estimate without it."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from plait.configs.experiment import ExperimentConfig
from plait.data.batch import Batch
from plait.kernels.chips import CHIPS, GIB
from plait.kernels.target import target as kernels_for
from plait.models import axes
from plait.train.loss import loss_terms
from plait.train.mesh import batch_sharding, ways
from plait.train.state import Blueprint, TrainState


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    parameters: float
    optimizer: float
    """Moments, and the average of the parameters where the run keeps one."""
    batch: float
    temporaries: float
    """Activations kept for the backward pass, gradients, gathered parameters, buffers of kernels and collectives."""
    program: float
    """The code, and what the compiler adds to arrays to fit its tiles."""
    limit: float | None
    """What a program may use; None where it is not known."""
    host: float = 0.0
    """State that waits in the host's memory."""
    compiled: bool = True
    """False for an estimate."""
    estimate: dict[str, float] = dataclasses.field(default_factory=dict)
    """What the temporaries are by estimate, where one was made."""

    @property
    def total(self) -> float:
        return self.parameters + self.optimizer + self.batch + self.temporaries + self.program

    @property
    def headroom(self) -> float | None:
        return None if self.limit is None else self.limit - self.total

    @property
    def fits(self) -> bool:
        """Whether it is within the limit; an estimate has to leave 15%."""
        return self.limit is None or self.total <= self.limit * (1.0 if self.compiled else 0.85)

    @property
    def largest(self) -> str:
        """The largest part."""
        parts = ("parameters", "optimizer", "batch", "temporaries")
        return max(parts, key=lambda name: getattr(self, name))


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Bytes of a step's arguments on one device, without padding."""

    parameters: float
    optimizer: float
    batch: float
    host: float

    @property
    def total(self) -> float:
        return self.parameters + self.optimizer + self.batch


def state_bytes(state: TrainState, config: ExperimentConfig, mesh: jax.sharding.Mesh) -> StateBytes:
    """Args: `state` of shapes, dtypes and shardings."""
    host = 0.0

    def local(arrays: Any) -> float:
        nonlocal host
        total = 0.0
        for array in jax.tree.leaves(arrays):
            size = math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
            if array.sharding.memory_kind == "pinned_host":
                host += size
            else:
                total += size
        return total

    parameters = local(state.params) + local(state.buffers)
    optimizer = local(state.optimizer) + local(state.ema)
    shape = (config.data.batch_size, config.data.seq_len)
    mine = batch_sharding(mesh, *shape, config.optimizer.accumulate).shard_shape(shape)
    return StateBytes(parameters, optimizer, len(Batch._fields) * 4.0 * math.prod(mine), host)


def compiled_memory(compiled: jax.stages.Compiled, state: StateBytes, limit: float | None) -> Memory:
    """From the compiler's own account; results take the place of the donated state."""
    stats: Any = compiled.memory_analysis()
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    padding = max(0.0, stats.argument_size_in_bytes - state.total)
    return Memory(
        parameters=state.parameters,
        optimizer=state.optimizer,
        batch=state.batch,
        temporaries=stats.temp_size_in_bytes + results,
        program=stats.generated_code_size_in_bytes + padding,
        limit=limit,
        host=state.host + stats.host_temp_size_in_bytes,
    )


@dataclasses.dataclass(frozen=True)
class Activations:
    """What the backward pass needs of a row of `seq_len` tokens, all layers together, in bytes."""

    whole: float
    """On every device of the axes that split layers by width."""
    divided: float
    """Split by them."""


def saved_activations(config: ExperimentConfig, blueprint: Blueprint, generation: str | None) -> Activations:
    """Traces the loss and adds up what its backward pass is given, kernels' residuals included; nothing is compiled."""
    data = dataclasses.replace(config.data, batch_size=_ROWS)
    return _saved(config.model, data, generation, blueprint.config.seed)


_ROWS = 251  # of the traced batch: a prime, by which the arrays with a row axis are told from the others


@functools.lru_cache(maxsize=32)
def _saved(model: Any, data: Any, generation: str | None, seed: int) -> Activations:
    from plait.configs.optimizer import optimizer

    adamw, seq_len = optimizer("adamw", warmup_steps=0), data.seq_len
    config = ExperimentConfig(name="activations", steps=2, model=model, data=data, optimizer=adamw, seed=seed)
    blueprint = Blueprint(config)
    params, buffers = blueprint.shapes()
    batch = Batch(*(jax.ShapeDtypeStruct((_ROWS, seq_len), kind) for kind in (jnp.int32,) * 4 + (jnp.float32,)))

    def backward(params: Any, buffers: Any, batch: Batch) -> Any:
        def loss(params: Any) -> Any:
            return loss_terms(blueprint.build(params, buffers), batch, total=jnp.ones(()), share=1.0, observer=None)

        return jax.vjp(loss, params, has_aux=True)[1]

    if generation is None:
        found = jax.eval_shape(backward, params, buffers, batch)
    else:
        with kernels_for(generation):
            found = jax.eval_shape(backward, params, buffers, batch)
    whole = divided = 0.0
    for leaf in jax.tree.leaves(found):
        if leaf.size % _ROWS == 0 and leaf.shape:
            size = leaf.size * leaf.dtype.itemsize / _ROWS
            if leaf.shape[-1] == model.d_model:
                whole += size
            else:
                divided += size
    return Activations(whole, divided)


def estimated_memory(
    config: ExperimentConfig,
    mesh: jax.sharding.Mesh,
    state: StateBytes,
    blueprint: Blueprint,
    generation: str | None,
    limit: float | None,
    scale: float = 1.0,
) -> Memory:
    """Memory of a step by counting what must be alive at once in the backward pass of one period of the pattern.

    Args:
        scale: of the temporaries, from a compiled step of the same model.
    """
    parts = _temporaries(config, mesh, state, blueprint, generation)
    return Memory(
        parameters=state.parameters,
        optimizer=state.optimizer,
        batch=state.batch,
        temporaries=scale * sum(parts.values()),
        program=0.0,
        limit=limit,
        host=state.host,
        compiled=False,
        estimate={name: scale * size for name, size in parts.items()},
    )


def used_params(blueprint: Blueprint, mesh: jax.sharding.Mesh) -> float:
    """Parameters that the products of a device read: all but the shares of others in widths and experts."""
    params, _ = blueprint.shapes()
    ways_of = {name: ways(mesh, axes.EXPERTS) if axes.EXPERTS in blueprint.axes(name) else 1 for name in params}
    return sum(math.prod(like.shape) / ways_of[name] for name, like in params.items()) / ways(mesh, axes.MLP)


def _temporaries(
    config: ExperimentConfig, mesh: jax.sharding.Mesh, state: StateBytes, blueprint: Blueprint, generation: str | None
) -> dict[str, float]:
    model = config.model
    width = ways(mesh, axes.MLP)
    rows = config.data.batch_size / config.optimizer.accumulate / ways(mesh, axes.BATCH) / ways(mesh, axes.LENGTH)
    stages = ways(mesh, axes.LAYERS)
    in_flight = config.optimizer.accumulate / stages if stages > 1 else 1  # a stage keeps its layers' part of each micro-batch
    _, period, count = model.periods
    kept = saved_activations(config, blueprint, generation)
    again = 0.0
    if model.remat is not None:  # of one stretch of layers, everything is computed again
        every = saved_activations(_with_remat(config, None), blueprint, generation)
        tpu = generation in CHIPS and CHIPS[generation].platform == "tpu"
        stretch = period if tpu else 1  # a TPU's schedule overlaps the layers of a period
        again = rows * (every.whole + every.divided / width) * stretch / model.num_layers
    itemsize = jnp.dtype(model.compute_dtype).itemsize
    gathered = itemsize * used_params(blueprint, mesh) * 2 / max(count, 1)  # two periods' weights
    head = model.d_model * (model.vocab_size or 0) / width * (itemsize + 4)  # the head and its gradient
    gradients = state.parameters * (2 if config.optimizer.accumulate > 1 else 1)
    return {
        "activations kept for the backward pass": in_flight * rows * (kept.whole + kept.divided / width),
        "activations computed again": again,
        "gathered parameters": gathered,
        "head and its gradient": head,
        "gradients": gradients,
    }


def _with_remat(config: ExperimentConfig, remat: Any) -> ExperimentConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))


def size_text(size: float) -> str:
    """Bytes with a unit."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(size) >= unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size:,.0f} B"
