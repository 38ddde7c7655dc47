"""What a run carries from step to step, and how a model is taken apart into it and put together again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from plait.configs.experiment import ExperimentConfig
from plait.configs.optimizer import Parameter
from plait.kernels import Tokens
from plait.models.axes import EXPERTS, LAYERS, Axes
from plait.models.block import Extras
from plait.models.build import Adapter, Alone, Role
from plait.models.layers.lora import TARGETS
from plait.models.lm import LM
from plait.models.looks.look import Observer
from plait.train import mesh as meshes
from plait.train.optimizers.precision import float32

Arrays = dict[str, jax.Array]
"""Arrays by dotted path in the model."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes."""

    step: jax.Array
    """Optimizer steps taken, int32."""
    params: Arrays
    """Trained parameters."""
    buffers: Arrays
    """Non-trained model state: sigmaReparam's singular vectors and layers' constants, and the whole model where a part of it is trained."""
    optimizer: optax.OptState
    ema: Arrays | None
    """Running average of the parameters in float32, where configured."""
    bad_steps: jax.Array
    """Non-finite steps in a row, int32."""
    skipped: jax.Array
    """Non-finite steps skipped so far, int32."""


_TELL = {"document_ranking": "a blockrank layer with an answer_id"}
"""The layers that a loss on attention is of, where those are not softmax layers."""


class Blueprint:
    """A model without its arrays: builds it from them, and knows the axes and the kind of each."""

    def __init__(self, config: ExperimentConfig):
        """Args: `config` with the model's vocabulary settled. Raises ValueError where adapters or losses on attention are asked for and no
        layer has one."""
        self.config = config
        model = nnx.eval_shape(self._create)
        self._graph, state = nnx.split(model)
        self._variables: dict[str, nnx.Variable] = {_dotted(path): v for path, v in nnx.to_flat_state(state)}
        self._paths = {_dotted(path): path for path, _ in nnx.to_flat_state(state)}
        self.adapters = {name for name, v in self._variables.items() if isinstance(v, Adapter)}
        """Parameters of adapters."""
        self.alone = {name for name, v in self._variables.items() if isinstance(v, Alone)}
        """Parameters, adapters' among them, beside which nothing else is trained or moved where there are any."""
        self.params = self.alone or self.learned
        """Trained parameters."""
        lora = config.model.lora
        if lora.rank is not None and not self.adapters:
            there = dict.fromkeys(role for _, role in self.products()[1] if role in TARGETS)
            raise ValueError(
                f"model.lora.targets={lora.targets!r} is the role of no dense layer of this model; use one of {', '.join(there)}"
            )

        if config.model.attention_loss.asked:
            self._check_attention_losses()

    def _check_attention_losses(self) -> None:
        """Raises ValueError where a loss on attention is asked for and no layer has it."""
        model, extras = self.config.model, self.extras()
        for name, coefficient in model.attention_loss.asked.items():
            if not any(f"attention/{name}" in layer.losses for layer in extras):
                raise ValueError(
                    f"model.attention_loss.{name}={coefficient:g} is of what no layer of model.pattern={model.pattern!r} tells; "
                    f"use {_TELL.get(name, 'softmax layers of two heads or more')}, or leave it out"
                )

    def _create(self, seed: ArrayLike | None = None) -> LM:
        key = jax.random.key(self.config.seed if seed is None else seed)
        return LM(self.config.model, rngs=nnx.Rngs(key), seq_len=self.config.data.seq_len)

    @property
    def learned(self) -> set[str]:
        """Parameters of the model, trained here or not."""
        return {name for name, v in self._variables.items() if isinstance(v, nnx.Param)}

    @property
    def num_params(self) -> int:
        """Parameters of the model, those of adapters included."""
        return sum(self._variables[name].size for name in self.learned)

    @property
    def num_trained(self) -> int:
        """Those that are trained."""
        return sum(self._variables[name].size for name in self.params)

    def products(self) -> tuple[list[tuple[str, Role]], list[tuple[str, Role]]]:
        """Matrices and the dense layers that they are of, by dotted path and role: those with an adapter, and those without."""
        found: tuple[list[tuple[str, Role]], list[tuple[str, Role]]] = ([], [])
        for name in sorted(self.learned - self.adapters):
            layer, _, own = name.rpartition(".")
            facts = self._variables[name].get_metadata()
            role, own_axes = facts["role"], [axis for axis in facts["axes"] if axis not in (LAYERS, EXPERTS)]
            if len(own_axes) > 1:
                has = f"{layer}.lora_a" in self.adapters and own == "kernel"
                found[not has].append((layer if own == "kernel" else name, role))
        return found

    def describe(self) -> str:
        """How large it is, and what of it is trained."""
        if not self.alone:
            return f"{self.num_params:,} parameters"
        if not self.adapters:
            return f"{self.num_params:,} parameters, of which {self.num_trained:,} are trained: those of students"
        having, without = self.products()
        left = ", ".join(dict.fromkeys(f"{name.rpartition('.')[2]} ({role})" for name, role in without)) or "none"
        return (
            f"{self.num_params:,} parameters, of which {self.num_trained:,} are trained: adapters of {len(having)} layers or stacks of layers, "
            f"left without: {left}"
        )

    def adapted(self) -> dict[str, Any]:
        """Facts of a model of which a part is trained; none of another."""
        having, without = map(dict, self.products())
        adapters = {"adapters": {"of": having, "not_of": without}} if self.adapters else {}
        return {"num_trained_params": self.num_trained, **adapters} if self.alone else {}

    def init(self, seed: ArrayLike | None = None) -> tuple[Arrays, Arrays]:
        """Fresh `(params, buffers)`, the same for a seed on any mesh; None is the config's seed. One that is traced leaves the program to
        other seeds too."""
        return self.split(self._create(seed))

    def axes(self, name: str) -> Axes:
        """Logical axes of an array of the model."""
        return self._variables[name].get_metadata()["axes"]

    def shapes(self) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, jax.ShapeDtypeStruct]]:
        """Shapes and dtypes of `(params, buffers)`; unlike an abstract `init`, this traces nothing."""
        every = {name: jax.ShapeDtypeStruct(v.shape, v.dtype) for name, v in self._variables.items()}
        return {k: v for k, v in every.items() if k in self.params}, {k: v for k, v in every.items() if k not in self.params}

    def extras(self, observer: Observer | None = None) -> list[Extras]:
        """What each layer gives beside the stream, without its arrays."""
        one = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        hidden = lambda *state: self.build(*state[:2]).hidden(Tokens(*state[2:]), observer=observer)[1]
        return jax.eval_shape(hidden, *self.shapes(), one, one, one)

    def split(self, model: LM) -> tuple[Arrays, Arrays]:
        """The `(params, buffers)` of a model."""
        values = {_dotted(path): v[...] for path, v in nnx.to_flat_state(nnx.state(model))}
        return {k: v for k, v in values.items() if k in self.params}, {k: v for k, v in values.items() if k not in self.params}

    def build(self, params: Mapping[str, jax.Array], buffers: Mapping[str, jax.Array]) -> LM:
        """The model with these arrays."""
        values = {**params, **buffers}
        flat = [(self._paths[name], variable.replace(values[name])) for name, variable in self._variables.items()]
        return nnx.merge(self._graph, nnx.from_flat_state(flat))

    def shardings(self, mesh: Mesh) -> tuple[dict[str, NamedSharding], dict[str, NamedSharding]]:
        """Shardings of `(params, buffers)`. Raises ValueError where the mesh does not divide a parameter."""
        every = {
            name: meshes.sharding(mesh, variable.get_metadata()["axes"], variable.shape, f"parameter {name}")
            for name, variable in self._variables.items()
        }
        return {k: v for k, v in every.items() if k in self.params}, {k: v for k, v in every.items() if k not in self.params}

    def update_shardings(self, mesh: Mesh) -> dict[str, NamedSharding]:
        """How each parameter's gradient, moments and average lie for the optimizer's update: as it does itself, or by ZeRO."""
        params, _ = self.shardings(mesh)
        if not self.config.mesh.zero:
            return params
        found = {name: self._variables[name] for name in params}
        return {name: meshes.spread(params[name], v.get_metadata()["axes"], v.shape) for name, v in found.items()}

    def parameters(self, mesh: Mesh | None = None) -> dict[str, Parameter]:
        """What an optimizer is told of each parameter; how it lies for the update where a mesh is given."""
        layouts: Mapping[str, NamedSharding] = {} if mesh is None else self.update_shardings(mesh)
        found = {}
        for name in sorted(self.params):
            variable = self._variables[name]
            facts = variable.get_metadata()
            found[name] = Parameter(name, variable.shape, facts["axes"], facts["role"], facts["split"], layouts.get(name))
        return found


def create_state(blueprint: Blueprint, tx: optax.GradientTransformation, seed: ArrayLike | None = None) -> TrainState:
    """The state at step 0 (traceable, and so is the seed; None is the config's)."""
    return begin_with(blueprint, tx, *blueprint.init(seed))


def begin_with(blueprint: Blueprint, tx: optax.GradientTransformation, params: Arrays, buffers: Arrays) -> TrainState:
    """The state at step 0 with these arrays (traceable)."""
    zero = jnp.zeros((), jnp.int32)
    ema = None if blueprint.config.optimizer.ema is None else float32(params)
    return TrainState(zero, params, buffers, tx.init(params), ema, zero, zero)


def state_shardings(blueprint: Blueprint, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The sharding of each leaf of the state; moments are in the host's memory where `mesh.offload` says so."""
    params: Any
    buffers: Any
    params, buffers = blueprint.shardings(mesh)
    average: Any = blueprint.update_shardings(mesh)
    kind = "pinned_host" if blueprint.config.mesh.offload == "optimizer" else None
    moments = {name: layout.with_memory_kind(kind) for name, layout in average.items()}
    everywhere: Any = NamedSharding(mesh, PartitionSpec())
    abstract = abstract_state(blueprint, tx)
    optimizer: Any = optax.tree_utils.tree_map_params(
        tx,
        lambda moment, layout: moment if isinstance(moment, optax.MaskedNode) else layout,
        abstract.optimizer,
        moments,
        transform_non_params=lambda _: everywhere,
        is_leaf=lambda moment: isinstance(moment, optax.MaskedNode),  # a parameter of another group of the optimizer's
    )
    ema = None if abstract.ema is None else average
    return TrainState(everywhere, params, buffers, optimizer, ema, everywhere, everywhere)


def abstract_state(blueprint: Blueprint, tx: optax.GradientTransformation) -> TrainState:
    """Shapes and dtypes of the state; much quicker than an abstract `create_state`, which draws every parameter."""
    params: Any
    buffers: Any
    params, buffers = blueprint.shapes()
    ema = None if blueprint.config.optimizer.ema is None else jax.eval_shape(float32, params)
    zero: Any = jax.ShapeDtypeStruct((), jnp.int32)
    return TrainState(zero, params, buffers, jax.eval_shape(tx.init, params), ema, zero, zero)


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))
