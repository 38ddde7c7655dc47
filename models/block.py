"""One block: norm, mixer, residual and, where there is one, norm, channel mixer, residual."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from plait.kernels import Tokens
from plait.models.attention_losses import AttentionLossConfig, attention_losses
from plait.models.axes import BATCH, LENGTH, constrain
from plait.models.build import BuildContext, Norm
from plait.models.channel_mixers.base import ChannelMixerConfig, MixedChannels
from plait.models.dropout import Dropout, DropoutConfig
from plait.models.layers.layer_inputs import LayerGate, LayerInputsConfig
from plait.models.layers.norms import AnyNorm, make_norm
from plait.models.looks.look import Look, Observer, Statistics, look
from plait.models.looks.taps import everything, keeping, tapped
from plait.models.mixers.base import Losses, Mixed, MixerConfig, State
from plait.models.qk_clip import QKClipConfig
from plait.models.stream import Carry, Stream


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
    max_logits: jax.Array | None = None
    """The largest of each head in the step, `[H]`, NaN where unknown; where they are clipped."""


def over_microbatches(stacked: Any) -> Any:
    """A tree of `Extras` of one step from those of its micro-batches, stacked: the mean of losses, of statistics the last, counts
    summed, logits the largest."""

    def one(extras: Extras) -> Extras:
        mean, last, total = lambda a: a.mean(0), lambda a: a[-1], lambda a: a.sum(0)
        most = None if extras.max_logits is None else extras.max_logits.max(0)
        return Extras(
            jax.tree.map(mean, extras.losses), jax.tree.map(last, extras.statistics), jax.tree.map(total, extras.counts), most
        )

    return jax.tree.map(one, stacked, is_leaf=lambda x: isinstance(x, Extras))


class BlockState(NamedTuple):
    """Decode memory of a layer."""

    mixer: State
    channel_mixer: Any


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
        stream_gains: bool = False,
        layer_scalar: bool = False,
        layer_inputs: LayerInputsConfig,
        qk_clip: QKClipConfig,
        attention_loss: AttentionLossConfig,
        dropout: DropoutConfig,
    ):
        """Args: `name` is that of the mixer in the pattern; the others are options of `LMConfig`."""
        self.norm, self.parallel, self.residual_scale, self.stream_scale = norm, parallel, residual_scale, stream_scale
        self.qk_clip, self.attention_loss = qk_clip, attention_loss
        self.scope = layer_scope(name)
        self.dropout = Dropout(dropout, ctx) if dropout.asked else None
        self.mixer = mixer.build(d_model, ctx)
        self.channel_mixer = None if channel_mixer is None else channel_mixer.build(d_model, ctx)
        make = lambda wanted: make_norm(ctx, d_model, eps=norm_eps) if wanted else None
        self.mixer_norm = make(norm != "none")
        self.channel_norm = make(norm != "none" and channel_mixer is not None and not channel_mixer.own_norm)
        self.mixer_out_norm = make(norm == "both")
        self.channel_out_norm = make(norm == "both" and channel_mixer is not None)
        gain = lambda wanted: ctx.param(jax.nn.initializers.ones, (d_model,), (None,)) if wanted and stream_gains else None
        self.mixer_gain, self.channel_gain = gain(True), gain(channel_mixer is not None)
        self.layer_gate = None if layer_inputs.dim is None else LayerGate(layer_inputs, d_model, ctx, eps=norm_eps)
        self.scalar = ctx.param(jax.nn.initializers.ones, (1,), (None,)) if layer_scalar else None

    def __call__(self, stream: Stream, *, at: Tokens, observer: Observer | None = None) -> tuple[Stream, Extras]:
        """The stream after the block."""
        clips = self.qk_clip.threshold is not None
        looked_at = clips or bool(self.attention_loss.asked)
        watching = everything(observer) if looked_at else observer
        dropped = (lambda y, half: y) if self.dropout is None else lambda y, half: self.dropout(y, at, half)
        kept = None if self.dropout is None else self.dropout.kept_heads(self.mixer.num_heads, at)
        shown = watching if kept is None else keeping(watching, kept)

        def mix(x: jax.Array, carry: Carry) -> tuple[jax.Array, Carry, Mixed]:
            mixed = self.mixer(x, at=at, carry=carry, observer=shown)
            return dropped(mixed.y, 0), mixed.carry, mixed

        def mix_channels(x: jax.Array) -> tuple[jax.Array, MixedChannels]:
            assert self.channel_mixer is not None
            channels = self.channel_mixer(x, at=at)
            return dropped(channels.y, 1), channels

        stream, mixed, channels = self._through(stream, mix, mix_channels)
        channels = MixedChannels(stream.x) if channels is None else channels  # nothing beside it
        statistics: Statistics = {}
        if observer is not None:
            looks = mixed.looks or (look(watching or observer, at=at, x=stream.x),)
            residual = jax.lax.stop_gradient(stream.x[observer.pick_sequences(stream.x.shape[0])])
            observed = jax.lax.stop_gradient(channels.observed)
            seen = [one.seen_by(observer) for one in looks] if looked_at else looks
            statistics = observer.measure(tuple(dataclasses.replace(one, residual=residual, channels=observed) for one in seen))
            stream = Stream(tapped(observer, "residual", stream.x, at=at), stream.carry)
        counts = {name: one.counts for name, one in (("mixer", mixed), ("channel_mixer", channels)) if one.counts}
        losses = attention_losses(mixed.looks, self.attention_loss) if self.attention_loss.asked else {}
        max_logits = _max_logits(mixed.looks, self.mixer.num_heads) if clips else None
        return stream, Extras({**mixed.losses, **channels.losses, **losses}, statistics, counts, max_logits)

    def settle(self, counts: Mapping[str, Mapping[str, Any]]) -> None:
        """Moves buffers once a step by its counts; leading axes are stacked layers."""
        for name, own in counts.items():
            getattr(self, name).settle(own)

    def clip(self, max_logits: jax.Array) -> None:
        """Scales queries and keys back once a step, by the largest logits of its heads; leading axes are stacked layers."""
        threshold = jnp.float32(self.qk_clip.threshold)
        ratio = jnp.where(max_logits > threshold, threshold / max_logits, 1)
        self.mixer.clip(ratio, self.qk_clip.alpha)

    def init_state(self, batch_size: int, max_len: int) -> BlockState:
        """Empty decode state for sequences of at most `max_len` tokens."""
        channels = None if self.channel_mixer is None else self.channel_mixer.init_state(batch_size)
        return BlockState(self.mixer.init_state(batch_size, max_len), channels)

    def prefill(self, stream: Stream, state: BlockState, *, at: Tokens) -> tuple[Stream, BlockState]:
        """As the call on left-padded prompts, from an empty state; also the state after the last token."""
        return self._decode(self.mixer.prefill, stream, state, at)

    def step(self, stream: Stream, state: BlockState, *, at: Tokens) -> tuple[Stream, BlockState]:
        """One token."""
        return self._decode(self.mixer.step, stream, state, at)

    def _decode(self, mix: Callable[..., Any], stream: Stream, state: BlockState, at: Tokens) -> tuple[Stream, BlockState]:
        def mix_channels(x: jax.Array) -> tuple[jax.Array, Any]:
            assert self.channel_mixer is not None
            return self.channel_mixer.advance(x, state.channel_mixer, at=at)

        stream, *states = self._through(stream, lambda x, carry: mix(x, state.mixer, at=at, carry=carry), mix_channels)
        return stream, BlockState(*states)

    def _through(
        self,
        stream: Stream,
        mixer: Callable[[jax.Array, Carry], tuple[jax.Array, Carry, Any]],
        mix_channels: Callable[[jax.Array], tuple[jax.Array, Any]],
    ) -> tuple[Stream, Any, Any]:
        """The stream after the block, and what its halves give beside it."""
        read = self._before(stream.x, self.mixer_norm)
        y, carry, out = jax.named_scope(self.scope)(mixer)(read, stream.carry)
        x = self._added(read if self.norm == "input" else stream.x, y, self.mixer_norm, self.mixer_out_norm, self.mixer_gain)
        channels = None
        if self.channel_mixer is not None:
            read = self._before(stream.x if self.parallel else x, self.channel_norm)
            y, channels = jax.named_scope("layer_channel_mixer")(mix_channels)(read)
            x = self._added(read if self.norm == "input" else x, y, self.channel_norm, self.channel_out_norm, self.channel_gain)
        if self.layer_gate is not None:
            x = self.layer_gate(x, carry)
        if self.scalar is not None:
            x = x * self.scalar[...].astype(x.dtype)[None, None]
        return Stream(constrain(x, (BATCH, LENGTH, None)), carry), out, channels

    def _before(self, x: jax.Array, norm: AnyNorm | None) -> jax.Array:
        """What a half of the block reads."""
        return norm(x) if norm is not None and self.norm in ("pre", "both", "input") else x

    def _added(self, x: jax.Array, y: jax.Array, norm: AnyNorm | None, out_norm: AnyNorm | None, gain: Any) -> jax.Array:
        """The stream with what a half of the block gives."""
        if norm is not None and self.norm == "output":
            y = norm(y)
        if out_norm is not None:
            y = out_norm(y)
        if self.residual_scale is not None:
            y = y * self.residual_scale
        if self.stream_scale is not None:
            x = x * self.stream_scale
        if gain is not None:
            x = x * gain[...].astype(x.dtype)[None, None]
        return norm(x + y) if norm is not None and self.norm == "post" else x + y


def _max_logits(looks: tuple[Look, ...], heads: int) -> jax.Array:
    """Those of a layer's heads, `[H]`; NaN where unknown."""
    blank = lambda one: jnp.full(one.mixer.num_heads, jnp.nan)
    known = [blank(one) if one.max_logits is None else jax.lax.stop_gradient(one.max_logits) for one in looks if one.mixer]
    return jnp.concatenate(known) if sum(map(len, known)) == heads else jnp.full(heads, jnp.nan)


def layer_scope(name: str) -> str:
    """The name, in compiled programs, of what a mixer of this pattern name does."""
    return "layer_" + name.replace("/", ".")
