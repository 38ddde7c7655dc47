"""One jitted training step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from plait.data.batch import Batch
from plait.models.axes import BATCH, LENGTH, constrain
from plait.models.block import Extras, over_microbatches
from plait.models.config import LMConfig
from plait.models.layers.linear import power_iterate
from plait.models.looks.taps import Tapped
from plait.train.by_source import sums_by_source
from plait.train.loss import loss_terms
from plait.train.mesh import on_mesh
from plait.train.optimizers.precision import float32
from plait.train.optimizers.schedule import make_schedule
from plait.train.probes.base import Probes
from plait.train.state import Blueprint, TrainState, state_shardings

Metrics = dict[str, Any]
Step = Callable[..., tuple[TrainState, Metrics]]


def make_step(blueprint: Blueprint, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh, observer: Probes | None) -> Step:
    """The step `(state, batch, **controls) -> (state, metrics)`, traceable; jit it with the state donated.

    Metrics are scalars by name, and with `observer` also `"statistics"`, those of each layer. A step whose loss, gradient or
    update is not finite changes nothing but the counts of such steps; so does one whose loss or gradient norm is above `bounds`, float32 [2].
    The learning rate is `rate` times the schedule's. With `seed`, uint32, the step leaves out what `model.dropout` says. With `sources`, the
    number of each row's source in a mixture, int32 [B], metrics have `"sources"`: the sums of `sums_by_source`.
    """
    config = blueprint.config
    schedule = make_schedule(config.optimizer, config.steps, config.optimizer.learning_rate)
    piped = mesh.shape["pipeline"] > 1  # the micro-batches then are the pipeline's
    parts = 1 if piped else config.optimizer.accumulate
    layout = blueprint.update_shardings(mesh)
    home = state_shardings(blueprint, tx, mesh).optimizer

    def step(
        state: TrainState,
        batch: Batch,
        bounds: jax.Array | None = None,
        rate: jax.Array | None = None,
        sources: jax.Array | None = None,
        seed: jax.Array | None = None,
    ) -> tuple[TrainState, Metrics]:
        with on_mesh(mesh, config.optimizer.accumulate, config.mesh.context_exchange):
            buffers = state.buffers if blueprint.alone else _move_singular_vectors(blueprint, state)
            total = jnp.maximum(batch.loss_mask.astype(jnp.float32).sum(), 1.0)

            noise = None if seed is None else _noise(seed, state.step, batch.tokens.shape)

            def loss(variables, given):
                (params, taps), (batch, noise) = variables, given
                seer = None if observer is None else Tapped(observer, taps)
                model, by_row = blueprint.build(params, buffers), sources is not None
                return loss_terms(model, batch, total=total, share=1 / parts, observer=seer, by_row=by_row, noise=noise)

            # A pipeline adds up its micro-batches' gradients in what it is given.
            params = float32(state.params) if piped else state.params
            taps = () if observer is None else observer.taps(_heads(config.model))
            (grads, told), (value, terms) = _accumulate(
                jax.value_and_grad(loss, has_aux=True), (params, taps), (batch, noise), parts
            )
            if not blueprint.alone:
                buffers = _settle(blueprint, state.params, buffers, terms["extras"])
        if config.mesh.offload is not None:
            near = jax.tree.map(lambda s: s.with_memory_kind("device"), home)
            state = dataclasses.replace(state, optimizer=jax.device_put(state.optimizer, near))
        grads, params = jax.lax.with_sharding_constraint((grads, state.params), (layout, layout))
        grads = float32(grads)
        norm = optax.global_norm(grads)
        updates, optimizer = tx.update(grads, state.optimizer, params)
        if rate is not None:  # updates are in proportion to it
            updates = jax.tree.map(lambda update: (rate * update).astype(update.dtype), updates)
        params = optax.apply_updates(params, updates)
        if config.model.qk_clip.threshold is not None:
            params = _clip_logits(blueprint, params, buffers, terms["extras"])
        ema = state.ema
        keep = config.optimizer.ema
        if ema is not None and keep is not None:
            ema = jax.tree.map(lambda old, new: keep * old + (1 - keep) * new.astype(jnp.float32), ema, params)
        good = jnp.isfinite(value) & jnp.isfinite(norm) & jnp.isfinite(optax.global_norm(updates))
        if bounds is not None:
            good &= (terms["losses"]["train"] <= bounds[0]) & (norm <= bounds[1])
        one = jnp.ones((), jnp.int32)
        new = TrainState(state.step + one, params, buffers, optimizer, ema, jnp.zeros_like(state.bad_steps), state.skipped)
        old = dataclasses.replace(state, step=state.step + one, bad_steps=state.bad_steps + one, skipped=state.skipped + one)
        new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
        if config.mesh.offload is not None:
            new = dataclasses.replace(new, optimizer=jax.device_put(new.optimizer, home))
        metrics = {
            **{f"loss/{name}": value for name, value in terms["losses"].items()},
            "grad/norm": norm,
            "optimizer/learning_rate": schedule(state.step - state.skipped) * (1.0 if rate is None else rate),
            "optimizer/skipped_steps": new.skipped,
            "bad_steps": new.bad_steps,
            "tokens": batch.loss_mask.sum(),
        }
        if (threshold := config.model.qk_clip.threshold) is not None:
            logits = jnp.concatenate([one.max_logits for one in terms["extras"]])
            metrics["optimizer/clipped_heads"] = (logits > threshold).sum()
        if sources is not None:
            metrics["sources"] = sums_by_source(terms["rows"], sources, len(config.data.sources))
        if observer is not None:
            of = None if sources is None else _looked_at(sources, observer, config.optimizer.accumulate)[:, None]
            of = None if of is None else of == jnp.arange(len(config.data.sources))[None]
            looks = observer.across([one.statistics for one in terms["extras"]], of)
            layers = zip(looks, observer.conclude(told), strict=True)
            metrics["statistics"] = [{**of_looks, **of_gradients} for of_looks, of_gradients in layers]
        return new, metrics

    return step


def _noise(seed: jax.Array, step: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Of each token, uint32 `[B, T]`."""
    here = (BATCH, LENGTH)
    return constrain(jax.random.bits(jax.random.fold_in(jax.random.key(seed), step), shape, jnp.uint32), here)


def _looked_at(rows: jax.Array, observer: Probes, parts: int) -> jax.Array:
    """Of `[B]`, one for each row of a batch, those of the sequences that an observer looks at: of the last of `parts` micro-batches, as
    `_accumulate` and the pipeline cut them."""
    last = rows.reshape(-1, parts)[:, -1]
    return last[observer.pick_sequences(last.shape[0])]


def _heads(config: LMConfig) -> list[int]:
    """How many each layer has."""
    return [len(mixer.head_kinds(config.d_model)) for mixer in config.layer_mixers]


def _move_singular_vectors(blueprint: Blueprint, state: TrainState) -> dict[str, jax.Array]:
    if blueprint.config.model.sigma_reparam is None:
        return state.buffers
    model = blueprint.build(state.params, state.buffers)
    power_iterate(model)
    return blueprint.split(model)[1]


def _settle(
    blueprint: Blueprint, params: dict[str, jax.Array], buffers: dict[str, jax.Array], extras: Sequence[Extras]
) -> dict[str, jax.Array]:
    """The buffers after layers that count tokens have moved theirs."""
    if not any(one.counts for one in extras):
        return buffers
    model = blueprint.build(params, buffers)
    model.stack.settle([one.counts for one in extras])
    return blueprint.split(model)[1]


def _clip_logits(
    blueprint: Blueprint, params: dict[str, jax.Array], buffers: dict[str, jax.Array], extras: Sequence[Extras]
) -> dict[str, jax.Array]:
    """The parameters after heads whose logits were too large have had their queries and keys scaled back."""
    model = blueprint.build(params, buffers)
    model.stack.clip([one.max_logits for one in extras if one.max_logits is not None])
    return blueprint.split(model)[0]


def _accumulate(grad: Callable, variables: Any, batch: Any, parts: int) -> tuple[Any, tuple]:
    """Gradients and loss terms summed over `parts` micro-batches of `batch`, arrays `[B, ...]`, in float32; extras as `over_microbatches`
    says."""
    if parts == 1:
        (value, terms), grads = grad(variables, batch)
        return grads, (value, terms)
    # Row i goes to micro-batch i % parts, so that every data shard has its part of each.
    micro = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(a.shape[0] // parts, parts, *a.shape[1:]), 1, 0), batch)

    def body(carry, batch):
        (value, terms), grads = grad(variables, batch)
        extras, rows = terms.pop("extras"), terms.pop("rows", None)
        sums = (float32(grads), (value, terms))
        return sums if carry is None else jax.tree.map(jnp.add, carry, sums), (extras, rows)

    shapes, _ = jax.eval_shape(lambda b: body(None, jax.tree.map(lambda a: a[0], b)), micro)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    (grads, (value, terms)), (extras, rows) = jax.lax.scan(body, zeros, micro)
    by_row = {} if rows is None else {"rows": jnp.moveaxis(rows, 0, 1).reshape(-1, rows.shape[-1])}
    return grads, (value, {**terms, "extras": over_microbatches(extras), **by_row})
