"""What parts of rows send each other over the `context` axis, by each way of exchange, read from the traced layers; nothing is compiled."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from plait.configs.experiment import ExperimentConfig
from plait.kernels import Tokens
from plait.kernels.context import Exchange
from plait.kernels.context.ring import MERGE, RING
from plait.kernels.sharding import splitting
from plait.kernels.target import target as kernels_for
from plait.models import axes
from plait.models.build import BuildContext
from plait.models.mixers.base import MixerConfig
from plait.train.mesh import mesh_axes, ways
from plait.train.pods.plan.compiled.hlo import Collective, Kind
from plait.train.pods.plan.roofline import route
from plait.train.pods.plan.topology import Target

_KINDS: Mapping[str, Kind] = {
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "ppermute": "collective-permute",
    "all_to_all": "all-to-all",
    "psum": "all-reduce",
}
_BACKWARD = 2.5
"""Products of attention's backward pass for one of its forward pass: five of the same size for two."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """A step's exchange between the parts of rows."""

    exchange: Exchange
    collectives: tuple[Collective, ...]
    seconds: float
    """Of all of them, one after the other, by data sheets."""
    exposed: float
    """Those that no work can hide: what goes round is sent beside the attention to a part, at the peak; the rest is needed at once."""
    merging: float
    """Seconds of adding up, in float32, what parts give that went round: their memory traffic at the peak."""
    held: float
    """Bytes that the layer with the most receives, forward and backward: what it must have room for beside its own tokens."""
    alike: bool
    """Nothing in it is other than in gathering: no mask, heads or layers that this way serves."""

    @property
    def waited(self) -> float:
        """Seconds of a step that it adds."""
        return self.exposed + self.merging

    @property
    def bytes(self) -> float:
        return sum(one.bytes for one in self.collectives)

    @property
    def sends(self) -> int:
        """Collectives that a device takes part in: keys beside values, segments beside states, each by itself."""
        return sum(one.count for one in self.collectives)


@dataclasses.dataclass(frozen=True)
class _Sent:
    """One collective of a traced layer, for one row, or sum of what parts give."""

    kind: Kind | None
    """None of a sum."""
    times: int
    bytes: float
    """Of the full arrays, once; of a sum, what it reads and writes."""
    backward: bool
    beside: bool
    """Sent while a part is attended to."""
    body: int
    """What runs at a time: the same number for those of one computation."""


def exchanges(config: ExperimentConfig, mesh: jax.sharding.Mesh, target: Target) -> list[Parts]:
    """Every way of exchange of a step, that which adds least to it first; of equal ones that which holds least. None on one part."""
    assert target.chip is not None
    if ways(mesh, axes.LENGTH) == 1:
        return []
    found = [_parts(config, mesh, target, exchange) for exchange in get_args(Exchange)]
    return sorted(found, key=lambda one: (one.alike, one.waited, one.held))


def layer_collectives(config: ExperimentConfig, mesh: jax.sharding.Mesh, target: Target, exchange: Exchange) -> list[Collective]:
    """What the mixers of a step send over `context`, by kind."""
    over = tuple(a for a in mesh_axes(axes.LENGTH) if mesh.shape[a] > 1)
    count: dict[Kind, int] = collections.Counter()
    size: dict[Kind, float] = collections.defaultdict(float)
    for times, rows, sent in _of_layers(config, mesh, target, exchange):
        for one in sent:
            if one.kind is None:
                continue
            count[one.kind] += times * one.times * _passes(config, one)
            size[one.kind] += times * rows * one.times * one.bytes * _passes(config, one)
    return [Collective(kind, over, count[kind], size[kind]) for kind in count]


def _parts(config: ExperimentConfig, mesh: jax.sharding.Mesh, target: Target, exchange: Exchange) -> Parts:
    assert target.chip is not None
    model, length = config.model, config.data.seq_len
    way = route(mesh, mesh_axes(axes.LENGTH), target)
    seconds = exposed = merging = held = 0.0
    for (times, rows, sent), mixer in zip(_of_layers(config, mesh, target, exchange), _layers(config), strict=True):
        tokens = rows * length / ways(mesh, axes.LENGTH) / ways(mesh, axes.MLP)
        work = tokens * mixer.between_flops(model.d_model, length) / target.chip.flops
        for backward in (False, True):
            took = {True: 0.0, False: 0.0}
            for one in sent:
                if one.backward == backward and one.kind is not None:
                    took[one.beside] += one.times * way.seconds(one.kind, rows * one.bytes)
            again = 1 if backward or model.remat is None else 2
            seconds += times * again * sum(took.values())
            exposed += times * again * (took[False] + max(0.0, took[True] - work * (_BACKWARD if backward else 1)))
        added = sum(one.times * one.bytes * _passes(config, one) for one in sent if one.kind is None)
        merging += times * rows * added / target.chip.memory_bandwidth
        held = max(held, rows * _held(sent))
    found = tuple(layer_collectives(config, mesh, target, exchange))
    alike = exchange != "gather" and list(found) == layer_collectives(config, mesh, target, "gather")
    return Parts(exchange, found, seconds, exposed, merging, held, alike)


def _passes(config: ExperimentConfig, one: _Sent) -> int:
    """How often a step runs it: what the forward pass sends, once more where layers are computed again."""
    return 1 if one.backward or config.model.remat is None else 2


def _held(sent: tuple[_Sent, ...]) -> float:
    """What both passes receive at once, and of what goes round, which is gone when it was sent on, a turn of the pass with more."""
    size: dict[tuple[bool, bool, int], float] = collections.defaultdict(float)
    for one in (one for one in sent if one.kind is not None):
        size[one.beside, one.backward, one.body] += one.bytes
    of = lambda *key: [n for (*found, _), n in size.items() if found == list(key)]
    at_once = sum(max(of(False, backward), default=0.0) for backward in (False, True))
    return at_once + max(min(of(True, backward), default=0.0) for backward in (False, True))


def _layers(config: ExperimentConfig) -> list[MixerConfig]:
    """The different mixers of the stack."""
    return list(dict.fromkeys(config.model.layer_mixers))


def _of_layers(
    config: ExperimentConfig, mesh: jax.sharding.Mesh, target: Target, exchange: Exchange
) -> Iterator[tuple[int, float, tuple[_Sent, ...]]]:
    """Of each of `_layers`: how many times a step runs it, the rows of a device each time, and what it sends for one."""
    model, data, parts = config.model, config.data, config.optimizer.accumulate
    count = collections.Counter(model.layer_mixers)
    rows = data.batch_size / parts / ways(mesh, axes.BATCH)
    sizes = ways(mesh, axes.LENGTH), ways(mesh, axes.HEADS)
    for mixer in _layers(config):
        shape = model.d_model, model.causal, model.compute_dtype, data.seq_len
        sent = traced(mixer, *shape, sizes, exchange, None if target.chip is None else target.generation)
        yield count[mixer] * parts, rows, sent


@functools.lru_cache(maxsize=256)
def traced(
    mixer: MixerConfig,
    d_model: int,
    causal: bool,
    dtype: str,
    length: int,
    sizes: tuple[int, int],
    exchange: Exchange,
    generation: str | None,
) -> tuple[_Sent, ...]:
    """What one layer sends for one row of a length, forward and backward.

    Args:
        sizes: devices that share a row, and heads.
        generation: whose kernels are traced; None for plain JAX, which exchanges the same.
    """
    mesh = AbstractMesh(sizes, ("context", "tensor"), axis_types=(AxisType.Auto,) * 2)
    context = lambda: BuildContext(
        rngs=nnx.Rngs(0), seq_len=length, compute_dtype=jnp.dtype(dtype), causal=causal, shapes_only=True
    )
    graph, variables = nnx.split(nnx.eval_shape(lambda: mixer.build(d_model, context())))
    x, number = jax.ShapeDtypeStruct((1, length, d_model), dtype), jax.ShapeDtypeStruct((1, length), jnp.int32)

    def both(variables: Any, x: jax.Array, at: Tokens) -> Any:
        y, back = jax.vjp(lambda variables, x: nnx.merge(graph, variables)(x, at=at, carry={}).y, variables, x)
        return y, back(y)

    log = logging.getLogger("plait")
    level = log.level
    log.setLevel(logging.ERROR)  # what a way cannot serve is told of the way that is taken, when that is
    try:
        with (
            kernels_for(generation) if generation else contextlib.nullcontext(),
            splitting(mesh, batch=(), heads=("tensor",), context=("context",), exchange=exchange),
        ):
            jaxpr = jax.make_jaxpr(both)(variables, x, Tokens(None, number, number)).jaxpr
    finally:
        log.setLevel(level)
    return tuple(_sent(jaxpr, [True] * len(jaxpr.outvars), 1, ""))


def _sent(jaxpr: Any, wanted: list[bool], times: int, stack: str) -> Iterator[_Sent]:
    """The collectives along `context` of a traced computation, and sums of parts, that its `wanted` results need."""
    variables = lambda found: {var for var in found if not hasattr(var, "val")}  # and no literals
    live = variables(var for var, one in zip(jaxpr.outvars, wanted) if one)
    for eqn in reversed(jaxpr.eqns):
        results = [var in live for var in eqn.outvars]
        if not any(results):
            continue
        live |= variables(eqn.invars)
        here = f"{stack}/{eqn.source_info.name_stack}"
        name = eqn.primitive.name
        over = eqn.params.get("axis_name", eqn.params.get("axes", ()))
        if name in _KINDS and "context" in (over if isinstance(over, tuple) else (over,)):
            arrays = eqn.invars if name == "reduce_scatter" else eqn.outvars
            size = sum(math.prod(var.aval.shape) * var.aval.dtype.itemsize for var in arrays)
            yield _Sent(_KINDS[name], times, size, "transpose" in here, RING in here, id(jaxpr))
        elif name == "add" and MERGE in here and eqn.outvars[0].aval.ndim == 4:
            size = sum(var.aval.size * var.aval.dtype.itemsize for var in (*eqn.invars, *eqn.outvars))
            yield _Sent(None, times, size, "transpose" in here, True, id(jaxpr))
        elif name != "pallas_call":
            for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                inner: Any = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    same = name != "scan" and len(inner.outvars) == len(results)
                    again = eqn.params["length"] if name == "scan" else 1
                    yield from _sent(inner, results if same else [True] * len(inner.outvars), times * again, here)
