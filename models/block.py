"""One block: norm, mixer, residual, norm, channel mixer, residual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from plait.models.axes import BATCH, LENGTH, constrain
from plait.models.build import BuildContext
from plait.models.config import LMConfig
from plait.models.mixers.base import State
from plait.models.mixers.stats import ProbeConfig, Stats, residual_statistics
from plait.models.norms import RMSNorm


class Block(nnx.Module):
    """A layer of the model; the residual stream `x` is `[B, T, D]` (`[B, D]` in `step`)."""

    def __init__(self, config: LMConfig, ctx: BuildContext):
        self.norm = config.norm
        self.scope = layer_scope(config.layers[ctx.layer_index])
        self.mixer = config.layer_mixers[ctx.layer_index].build(config.d_model, ctx)
        self.channel_mixer = config.channel_mixer.build(config.d_model, ctx)
        self.mixer_norm = RMSNorm(ctx, config.d_model, eps=config.norm_eps)
        self.channel_norm = RMSNorm(ctx, config.d_model, eps=config.norm_eps)

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array, positions: jax.Array, probe: ProbeConfig | None = None
    ) -> tuple[jax.Array, Stats | None]:
        where = {"segment_ids": segment_ids, "positions": positions}
        x, stats = self._around(x, lambda h: self.mixer(h, **where, probe=probe))
        if probe is not None:
            stats = (stats or Stats()).merged(**residual_statistics(jax.lax.stop_gradient(x), **where, probe=probe))
        return x, stats

    def prefill(self, x: jax.Array, state: State, *, segment_ids: jax.Array, positions: jax.Array) -> tuple[jax.Array, State]:
        return self._around(x, lambda h: self.mixer.prefill(h, state, segment_ids=segment_ids, positions=positions))

    def step(self, x: jax.Array, state: State, *, positions: jax.Array) -> tuple[jax.Array, State]:
        return self._around(x, lambda h: self.mixer.step(h, state, positions=positions))

    def _around(self, x: jax.Array, mixer: Callable[[jax.Array], tuple[jax.Array, Any]]) -> tuple[jax.Array, Any]:
        mix = jax.named_scope(self.scope)(mixer)
        if self.norm == "pre":
            y, out = mix(self.mixer_norm(x))
            x = x + y
            x = x + self._mix_channels(self.channel_norm(x))
        else:
            y, out = mix(x)
            x = self.mixer_norm(x + y)
            x = self.channel_norm(x + self._mix_channels(x))
        return constrain(x, (*(BATCH, LENGTH)[: x.ndim - 1], None)), out

    @jax.named_scope("layer_channel_mixer")
    def _mix_channels(self, x: jax.Array) -> jax.Array:
        return self.channel_mixer(x)


def layer_scope(name: str) -> str:
    """The name, in compiled programs, of what a mixer of this pattern name does."""
    return "layer_" + name.replace("/", ".")
