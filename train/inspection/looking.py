"""Passes of a trained model that somebody watches, with all of its heads or some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from plait.data.batch import Batch
from plait.kernels import Tokens
from plait.models.config import LMConfig
from plait.models.lm import LM
from plait.models.looks.look import Observer
from plait.models.looks.taps import Tapped
from plait.train.convert.sample import rows_of
from plait.train.loss import token_losses
from plait.train.mesh import on_mesh
from plait.train.probes.base import Probes
from plait.train.run import Trained

Kept = Sequence[np.ndarray]
"""Which heads of each layer give something, bool `[H]`."""
Seen = tuple[Any, list[dict[str, jax.Array]]]
"""What was read of the model's outputs, and the statistics of each layer."""


def num_heads(model: LMConfig) -> list[int]:
    """How many each layer has."""
    return [len(mixer.head_kinds(model.d_model)) for mixer in model.layer_mixers]


def looking(
    trained: Trained, observer: Observer, read: Callable[[LM, jax.Array], Any] = lambda model, hidden: None
) -> Callable[..., Seen]:
    """The pass `(at, kept) -> Seen`, compiled once; `read` has the model and its hidden states. All heads are kept by default."""
    program = trained.program
    accumulate, _ = rows_of(program.config, program.mesh, 1)

    @jax.jit
    def look(params: Any, buffers: Any, at: Tokens, kept: Any) -> Seen:
        with on_mesh(program.mesh, accumulate, program.config.mesh.context_exchange):
            model = program.blueprint.build(params, buffers)
            taps = [{"heads": {}, "residual": {}, "kept": one} for one in kept]
            hidden, extras = model.hidden(at, observer=Tapped(observer, taps))
            return read(model, hidden), [dict(one.statistics) for one in extras]

    every = [np.ones(count, bool) for count in num_heads(program.config.model)]
    return lambda at, kept=every: look(trained.params, trained.buffers, at, list(kept))


def probing(trained: Trained, observer: Probes) -> Callable[[Batch, Kept], Seen]:
    """The pass `(batch, kept) -> Seen` of probes, those of gradients of the loss included, compiled once: with the losses of the tokens,
    `[B, T]` in nats, 0 off the loss mask."""
    program = trained.program
    accumulate, _ = rows_of(program.config, program.mesh, 1)
    zeros = observer.taps(num_heads(program.config.model))

    @jax.jit
    def probe(params: Any, buffers: Any, batch: Batch, kept: Any) -> Seen:
        def loss(taps: Any) -> tuple[jax.Array, Any]:
            with on_mesh(program.mesh, accumulate, program.config.mesh.context_exchange):
                watched = [{**own, "kept": one} for own, one in zip(taps, kept, strict=True)]
                nll, _, extras = token_losses(program.blueprint.build(params, buffers), batch, Tapped(observer, watched))
                return nll.sum() / jnp.maximum(batch.loss_mask.sum(), 1.0), (nll, [one.statistics for one in extras])

        told, (nll, layers) = jax.grad(loss, has_aux=True)(zeros)
        both = zip(observer.across(layers), observer.conclude(told), strict=True)
        return nll, [{**of_looks, **of_gradients} for of_looks, of_gradients in both]

    return lambda batch, kept: probe(trained.params, trained.buffers, batch, list(kept))
