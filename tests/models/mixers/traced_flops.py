"""Operations of a mixer's training pass, counted in its traced program."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Literal, jaxprs_in_params

from plait.kernels import dispatch
from plait.kernels.attention import AttentionStats
from plait.kernels.attention.call import AttentionCall
from plait.kernels.dispatch import Implementation
from plait.kernels.topk_blocks import reference as topk
from plait.kernels.topk_blocks.call import TopkCall
from plait.kernels.weighted_attention import reference
from plait.kernels.weighted_attention.call import WeightedCall
from plait.models.mixers.sparse import sea

ATTENTION = ("attention", "routed_attention")
"""Ops whose operations are the pairs that a query sees, whatever an implementation computes besides."""
SELECTION = "topk_blocks"
"""Such an op, whose pairs are a query and a block that it scores."""
OF_LOSS = "index_divergence"
"""Such an op, of a loss, which does not count."""
BY_RULE = "weighted_attention"
"""Such an op: a pair costs what one more key adds to one more row of its reference, and a row what it costs without keys."""


def count_flops(monkeypatch: pytest.MonkeyPatch, run: Callable, *args: jax.Array) -> float:
    """2 per multiply-add of `run(*args)`: products and recurrences as the references are traced, and attention's visible pairs."""
    pairs: list[jax.Array] = []
    monkeypatch.setattr(sea, "map_loss", lambda scores, *args, **options: jnp.zeros(()))  # a loss, which does not count
    for name, op in dispatch._ops.items():
        chosen = {"reference": op.implementations["reference"]}
        if name in ATTENTION:
            chosen = {"reference": Implementation(functools.partial(_attention, pairs, name == "attention"))}
        elif name == SELECTION:
            chosen = {"reference": Implementation(functools.partial(_selection, pairs))}
        elif name == OF_LOSS:
            chosen = {"reference": Implementation(lambda call: jnp.zeros(call.q.shape[:2]))}
        elif name == BY_RULE:
            chosen = {"reference": Implementation(functools.partial(_by_rule, pairs))}
        monkeypatch.setattr(op, "implementations", chosen)

    def traced(*args):
        pairs.clear()
        return run(*args), sum(pairs, jnp.zeros(()))

    jaxpr = jax.make_jaxpr(traced)(*args).jaxpr
    return _products(jaxpr, [True] * len(jaxpr.invars)) + float(jax.jit(lambda *args: traced(*args)[1])(*args))


def _attention(pairs: list[jax.Array], with_stats: bool, call: AttentionCall) -> Any:
    """Zeros of the right shape; the operations go into `pairs`."""
    queries, keys = call.sides
    visible = call.mask.dense(queries.positions, keys.positions, queries.segment_ids, keys.segment_ids)[:, None]
    if call.selected is not None:
        visible = visible & call.selected.shown(keys.positions)
    heads = call.q.shape[2] // visible.shape[1]
    pairs.append(2 * (call.q.shape[3] + call.v.shape[3]) * heads * visible.sum())
    o = jnp.zeros((*call.q.shape[:3], call.v.shape[3]), call.q.dtype)
    stats = AttentionStats(*[jnp.zeros(o.shape[:3])] * len(AttentionStats._fields))
    return (o, stats) if with_stats else o


def _selection(pairs: list[jax.Array], call: TopkCall) -> jax.Array:
    """The choice itself, on which other pairs depend; the scores that it has no use for are taken off its traced product."""
    (batch, length, heads, channels), count = call.q.shape, call.blocks.shape[1]
    pairs.append(2 * channels * heads * (topk.scored(call).sum() - batch * length * count))
    return topk.topk_blocks(call)


def _by_rule(pairs: list[jax.Array], call: WeightedCall) -> jax.Array:
    """Zeros of the right shape; the operations go into `pairs`."""
    halo, (batch, num_keys, _, num_channels) = call.rule.halo, call.v.shape

    def cost(rows: int, keys: int) -> float:
        sized = lambda count: lambda x: jax.ShapeDtypeStruct((batch, count, *x.shape[2:]), x.dtype)
        some = call.on_queries(sized(halo + rows)).on_keys(sized(keys)).replace(own_keys=False)
        jaxpr = jax.make_jaxpr(lambda call: reference.weighed(call, None))(some).jaxpr
        return _products(jaxpr, [True] * len(jaxpr.invars))

    of_row, of_longer_row = (cost(3, keys) - cost(2, keys) for keys in (num_keys, num_keys + 1))
    of_pair = of_longer_row - of_row
    queries, keys = call.queries, call.keys
    visible = call.mask.dense(queries.positions, keys.positions, queries.segment_ids, keys.segment_ids)[:, halo:]
    pairs.append(of_pair / batch * visible.sum() + (of_row - num_keys * of_pair) * call.length)
    return jnp.zeros((batch, call.length, call.q.shape[2], num_channels), call.q.dtype)


def _products(jaxpr, data: list[bool]) -> float:
    """2 per multiply-add of matrix products, convolutions and outer products; loop lengths multiplied in.

    `data` says which arguments depend on the activations: products of positions with frequencies are a table. A product that is
    written twice, of the same arguments, is one, also where these are reshaped alike each time.
    """
    total, seen, reshaped = 0.0, set(), {}
    same_as = lambda v: id(v) if isinstance(v, Literal) else reshaped.get(v, id(v))
    depends = dict(zip(jaxpr.invars, data, strict=True))
    for eqn in jaxpr.eqns:
        flags = [not isinstance(v, Literal) and depends.get(v, False) for v in eqn.invars]
        depends |= dict.fromkeys(eqn.outvars, any(flags))
        out, operands = eqn.outvars[0].aval, [v.aval for v in eqn.invars]
        same = (eqn.primitive, *map(same_as, eqn.invars))
        if eqn.primitive.name == "reshape":
            reshaped[eqn.outvars[0]] = (same_as(eqn.invars[0]), out.shape)
        if eqn.primitive.name == "dot_general":
            if any(flags) and same not in seen:
                (contracted, _), _ = eqn.params["dimension_numbers"]
                total += 2.0 * out.size * math.prod(operands[0].shape[i] for i in contracted)
            seen.add(same)
        elif eqn.primitive.name == "conv_general_dilated":
            total += 2.0 * out.size * math.prod(operands[1].shape[:-1])
        elif eqn.primitive.name == "mul" and all(flags) and all(out.size > operand.size for operand in operands):
            total += 2.0 * out.size
        else:
            for inner in jaxprs_in_params(eqn.params):
                body = getattr(inner, "jaxpr", inner)
                exact = len(body.invars) == len(flags) and eqn.primitive.name != "scan"
                count = _products(body, flags if exact else [any(flags)] * len(body.invars))
                total += count * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
    return total
