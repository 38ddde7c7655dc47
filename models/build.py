"""What a layer needs to build itself besides its own config."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Container, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from plait.kernels.reflections import orthonormal_rows
from plait.models.axes import Axes

if TYPE_CHECKING:
    from plait.models.layers.lora import LoRAConfig

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
SigmaReparam = Literal["spectral", "one"]
Norm = Literal["pre", "post", "none", "output", "both", "input"]
NormKind = Literal["rms", "rms_1p", "layer"]
"""`x / rms(x) * scale`; the same with `1 + scale` for the scale, which begins at 0; or `(x - mean(x)) / std(x) * scale + bias`."""
Role = Literal["matrix", "embedding", "head", "gate", "router", "conv", "decay", "vector"]
"""What a parameter is, for optimizers: a matrix that maps features to features, the embedding or the head, a projection to gates or
to a router's scores, a convolution, a decay rate, or another vector (gains, biases)."""
PRODUCTS: tuple[Role, ...] = ("matrix", "embedding", "head", "gate", "router")
"""Roles that multiply activations: they decay, and count in FLOPs."""


def fan_in_normal(gain: float = 1.0) -> Initializer:
    """Truncated normal of standard deviation `gain / sqrt(fan_in)`, fan-in being the last axis but one."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        std = gain / shape[-2] ** 0.5 / 0.87962566  # the standard deviation of a unit normal cut at two sigmas
        return (std * jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)).astype(dtype)

    return init


def orthogonal(gain: float = 1.0) -> Initializer:
    """`gain` times a matrix with orthonormal columns, or rows where it is wider than tall, uniform among all such.

    Equal to `jax.nn.initializers.orthogonal` of the same key up to rounding, without LAPACK.
    """

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        rows = orthonormal_rows(jax.random.normal(key, (max(shape), min(shape)), jnp.float32).T)
        return (gain * (rows if shape[0] < shape[1] else rows.T)).astype(dtype)

    return init


class Buffer(nnx.Variable):
    """Non-trained state of a layer: sharded and checkpointed like a parameter, never seen by the optimizer."""


class Moved(Buffer):
    """One that training moves and nothing else tells: part of what a model is, which travels with its parameters."""


class Alone(nnx.Param):
    """A parameter of a model that trains those of this kind alone."""


class Adapter(Alone):
    """Part of a low-rank adapter."""


def train_alone(module: Any, but: Container[Any] = ()) -> None:
    """Makes the parameters of a module those that are trained, but for the parts named in `but`."""
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        *above, name = path
        if path[0] not in but:
            owner = functools.reduce(
                lambda found, key: found[key] if isinstance(key, int) else getattr(found, str(key)), above, module
            )
            setattr(owner, str(name), Alone(variable[...], **variable.get_metadata()))


class Keys(Protocol):
    """A stream of random keys, such as `flax.nnx.Rngs`."""

    def params(self) -> jax.Array:
        """The next one."""


class NumberedKeys:
    """Keys by number from one on, as `flax.nnx.Rngs` gives them; the number may be traced."""

    def __init__(self, key: jax.Array, number: Any):
        self.key, self.number = key, number

    def params(self) -> jax.Array:
        key = jax.random.fold_in(self.key, self.number)
        self.number = self.number + 1
        return key


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildContext:
    """The surroundings of one layer: where it stands, its random stream, and the numerics every layer of the model shares."""

    rngs: Keys
    seq_len: int
    """Training sequence length in tokens (layers accept any length; some options scale with this one)."""
    layer_index: Any = 0
    """Traced where layers are stacked: what depends on it is an array, kept in a `Buffer`."""
    num_layers: int = 1
    causal: bool = True
    """Whether a token sees those before it only, or all of its document."""
    param_dtype: Any = jnp.float32
    compute_dtype: Any = jnp.float32
    norm_kind: NormKind = "rms"
    """Of the norms of the residual stream, and of softmax attention's queries and keys."""
    sigma_reparam: SigmaReparam | None = None
    lora: LoRAConfig | None = None
    """The adapters that dense layers have."""
    defer_vectors: bool = False
    """Whether `start_singular_vectors` of the whole model will find those of sigmaReparam, in place of each layer its own."""
    shapes_only: bool = False
    """Whether values are of no account, so that parameters need not be drawn."""
    first_layers: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """The first layer that uses each name of the carry."""

    def param(
        self,
        init: Initializer,
        shape: tuple[int, ...],
        axes: Axes,
        *,
        role: Role = "vector",
        split: tuple[int, tuple[int, ...]] | None = None,
        exact: bool = False,
    ) -> nnx.Param:
        """A trained parameter of logical `axes`, drawn in float32 and rounded once.

        Args:
            role: what it is to the optimizer.
            exact: whether it is kept in float32 whatever others are in, as decay rates are.
            split: axis, counted from the end, and sizes of the independent matrices that a fused projection holds, as one a head.
        """
        dtype = jnp.float32 if exact or role == "decay" else self.param_dtype
        value = jnp.zeros(shape) if self.shapes_only else init(self.rngs.params(), shape, jnp.float32)
        return nnx.Param(value.astype(dtype), axes=axes, role=role, split=split)

    @property
    def residual_init(self) -> Initializer:
        """Initialiser of projections that write to the residual stream: shrunk with depth so that its variance stays bounded."""
        return fan_in_normal((2 * self.num_layers) ** -0.5)
