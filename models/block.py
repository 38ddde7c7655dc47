"""One block: norm, mixer, residual and, where there is one, norm, channel mixer, residual."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from plait.kernels import Tokens
from plait.models.axes import BATCH, LENGTH, constrain
from plait.models.build import BuildContext, Norm
from plait.models.channel_mixers.base import ChannelMixer, ChannelMixerConfig, MixedChannels
from plait.models.look import Observer, Statistics, look
from plait.models.mixers.base import Losses, Mixed, MixerConfig, State
from plait.models.norms import AnyNorm, make_norm
from plait.models.stream import Carry, Stream
from plait.models.taps import tapped


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Extras:
    """What a layer gives beside the stream."""

    losses: Losses = dataclasses.field(default_factory=dict)
    """Auxiliary losses by name, coefficients applied."""
    statistics: Statistics = dataclasses.field(default_factory=dict)
    """Of probe steps."""
    counts: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """What a step adds up over its tokens for `mixer` or `channel_mixer` to move its buffers by: see their `settle`."""


def over_microbatches(stacked: Any) -> Any:
    """A tree of `Extras` of one step from those of its micro-batches, stacked: the mean of losses, of statistics the last, counts
    summed."""

    def one(extras: Extras) -> Extras:
        mean, last, total = lambda a: a.mean(0), lambda a: a[-1], lambda a: a.sum(0)
        return Extras(
            jax.tree.map(mean, extras.losses), jax.tree.map(last, extras.statistics), jax.tree.map(total, extras.counts)
        )

    return jax.tree.map(one, stacked, is_leaf=lambda x: isinstance(x, Extras))


class Block(nnx.Module):
    """A layer of the model."""

    def __init__(
        self,
        name: str,
        mixer: MixerConfig,
        channel_mixer: ChannelMixerConfig | None,
        d_model: int,
        ctx: BuildContext,
        *,
        norm: Norm,
        norm_eps: float,
        parallel: bool = False,
        residual_scale: float | None = None,
        stream_scale: float | None = None,
    ):
        """Args: `name` is that of the mixer in the pattern; the others are options of `LMConfig`."""
        self.norm, self.parallel, self.residual_scale, self.stream_scale = norm, parallel, residual_scale, stream_scale
        self.scope = layer_scope(name)
        self.mixer = mixer.build(d_model, ctx)
        self.channel_mixer = None if channel_mixer is None else channel_mixer.build(d_model, ctx)
        make = lambda wanted: make_norm(ctx, d_model, eps=norm_eps) if wanted else None
        self.mixer_norm = make(norm != "none")
        self.channel_norm = make(norm != "none" and channel_mixer is not None)
        self.mixer_out_norm = make(norm == "both")
        self.channel_out_norm = make(norm == "both" and channel_mixer is not None)

    def __call__(self, stream: Stream, *, at: Tokens, observer: Observer | None = None) -> tuple[Stream, Extras]:
        """The stream after the block."""

        def mix(x: jax.Array, carry: Carry) -> tuple[jax.Array, Carry, Mixed]:
            mixed = self.mixer(x, at=at, carry=carry, observer=observer)
            return mixed.y, mixed.carry, mixed

        stream, mixed, channels = self._through(stream, mix, at)
        looks = mixed.looks
        statistics: Statistics = {}
        if observer is not None:
            looks = looks or (look(observer, at=at, x=stream.x),)
            residual = jax.lax.stop_gradient(stream.x[observer.pick_sequences(stream.x.shape[0])])
            observed = jax.lax.stop_gradient(channels.observed)
            looks = tuple(dataclasses.replace(one, residual=residual, channels=observed) for one in looks)
            statistics = observer.measure(looks)
            stream = Stream(tapped(observer, "residual", stream.x, at=at), stream.carry)
        counts = {name: one.counts for name, one in (("mixer", mixed), ("channel_mixer", channels)) if one.counts}
        return stream, Extras({**mixed.losses, **channels.losses}, statistics, counts)

    def settle(self, counts: Mapping[str, Mapping[str, Any]]) -> None:
        """Moves buffers once a step by its counts; leading axes are stacked layers."""
        for name, own in counts.items():
            getattr(self, name).settle(own)

    def prefill(self, stream: Stream, state: State, *, at: Tokens) -> tuple[Stream, State]:
        """As the call on left-padded prompts, from an empty state; also the state after the last token."""
        return self._through(stream, lambda x, carry: self.mixer.prefill(x, state, at=at, carry=carry), at)[:2]

    def step(self, stream: Stream, state: State, *, at: Tokens) -> tuple[Stream, State]:
        """One token."""
        return self._through(stream, lambda x, carry: self.mixer.step(x, state, at=at, carry=carry), at)[:2]

    def _through(
        self, stream: Stream, mixer: Callable[[jax.Array, Carry], tuple[jax.Array, Carry, Any]], at: Tokens
    ) -> tuple[Stream, Any, MixedChannels]:
        read = self._before(stream.x, self.mixer_norm)
        y, carry, out = jax.named_scope(self.scope)(mixer)(read, stream.carry)
        x = self._added(read if self.norm == "input" else stream.x, y, self.mixer_norm, self.mixer_out_norm)
        channels = MixedChannels(x)  # nothing beside it where there is no channel mixer
        if self.channel_mixer is not None:
            read = self._before(stream.x if self.parallel else x, self.channel_norm)
            channels = self._mix_channels(self.channel_mixer, read, at)
            x = self._added(read if self.norm == "input" else x, channels.y, self.channel_norm, self.channel_out_norm)
        return Stream(constrain(x, (BATCH, LENGTH, None)), carry), out, channels

    def _before(self, x: jax.Array, norm: AnyNorm | None) -> jax.Array:
        """What a half of the block reads."""
        return norm(x) if norm is not None and self.norm in ("pre", "both", "input") else x

    def _added(self, x: jax.Array, y: jax.Array, norm: AnyNorm | None, out_norm: AnyNorm | None) -> jax.Array:
        """The stream with what a half of the block gives."""
        if norm is not None and self.norm == "output":
            y = norm(y)
        if out_norm is not None:
            y = out_norm(y)
        if self.residual_scale is not None:
            y = y * self.residual_scale
        if self.stream_scale is not None:
            x = x * self.stream_scale
        return norm(x + y) if norm is not None and self.norm == "post" else x + y

    @staticmethod
    @jax.named_scope("layer_channel_mixer")
    def _mix_channels(channel_mixer: ChannelMixer, x: jax.Array, at: Tokens) -> MixedChannels:
        return channel_mixer(x, at=at)


def layer_scope(name: str) -> str:
    """The name, in compiled programs, of what a mixer of this pattern name does."""
    return "layer_" + name.replace("/", ".")
