"""Attention transfer: a layer that is its teacher, beside a student that learns to give the same."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from plait.configs.components import at as under
from plait.configs.domains import Positive
from plait.kernels import Tokens
from plait.models.build import BuildContext, train_alone
from plait.models.looks.look import look
from plait.models.looks.taps import tapped
from plait.models.mixers.around import AroundHeads
from plait.models.mixers.base import HeadMixer, Mixed, MixerConfig, WrapperConfig, abstract, products, register
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.lolcats import LoLCATsConfig

LOSS = "transfer"


@register(
    "transfer",
    source="LoLCATs: On Low-Rank Linearizing of Large Language Models (2410.10254)",
    proof="teacher and student apart",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferConfig(WrapperConfig):
    """`y = teacher(x)`, and a loss `c mean (teacher(x) - student(x))^2`: each layer of the model reads what it always read, and the students
    learn all at once. The mean is over tokens, heads and channels, and over the layers.

    The model's outputs are those of the teachers, in training and decoding; `convert linearize` puts the students into their place.
    """

    mixer: MixerConfig = LoLCATsConfig()
    """The student."""
    teacher: MixerConfig = SoftmaxConfig()
    """The mixer that is there."""
    match: Literal["heads", "outputs"] = "heads"
    """What is compared: the heads before they are projected back, as many and as wide in both, or the layer's outputs."""
    coefficient: Positive = 1000.0
    """c."""
    trains: Literal["new", "all"] = "new"
    """What of the student is trained, and nothing else of the model: what its teacher has not, as feature maps; or all of it."""

    def check(self) -> None:
        for name, mixer in (("mixer", self.mixer), ("teacher", self.teacher)):
            if isinstance(mixer, WrapperConfig):
                raise ValueError(f"{name}={mixer.name} is itself around a mixer; give a plain one")

    @classmethod
    def example(cls) -> TransferConfig:
        return cls(mixer=LoLCATsConfig.example(), teacher=SoftmaxConfig(num_heads=4, head_dim=16))

    @property
    def kind(self):  # type: ignore[override]
        """That of the teacher."""
        return self.teacher.kind

    @property
    def told_as(self) -> str:
        return self.teacher.told_as

    @property
    def directions(self):  # type: ignore[override]
        """Those of both."""
        return tuple(one for one in self.teacher.directions if one in self.mixer.directions)

    @property
    def opaque(self):  # type: ignore[override]
        """That of the teacher."""
        return self.teacher.opaque

    @property
    def longest(self) -> int | None:
        return self.teacher.longest

    @property
    def unclipped(self) -> str | None:
        return "has a teacher that is not trained"

    def fit(self, d_model: int) -> None:
        for name, mixer in (("mixer", self.mixer), ("teacher", self.teacher)):
            under(name, mixer.fit, d_model)
            if mixer.carries(d_model):
                raise ValueError(
                    f"{name} shares {mixer.carries(d_model)[0].name} with other layers, which has no part here; leave it out"
                )
        abstract(self, d_model)  # raises where the two do not match

    def carries(self, d_model: int):
        return ()

    def head_kinds(self, d_model: int):
        return self.teacher.head_kinds(d_model)

    def product_flops(self, d_model: int) -> float:
        back = getattr(abstract(self, d_model).student, "o", None) if self.match == "heads" else None
        return super().product_flops(d_model) - (0.0 if back is None else products(back))

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        return self.teacher.mixing_flops(d_model, seq_len) + self.mixer.mixing_flops(d_model, seq_len)

    def decode_flops(self, d_model: int, context: int) -> float:
        return self.teacher.decode_flops(d_model, context)

    def build(self, d_model: int, ctx: BuildContext) -> Transfer:
        return Transfer(self, d_model, ctx)


class Transfer(AroundHeads):
    """See `TransferConfig`. `inner` is the teacher."""

    student: HeadMixer

    def __init__(self, config: TransferConfig, d_model: int, ctx: BuildContext):
        if ctx.lora is not None:
            raise ValueError(
                "a model with transfer trains its students alone and has no part for model.lora; leave lora.rank None until they are in place"
            )
        self.config = config
        built = {"mixer": config.mixer.build(d_model, ctx), "teacher": config.teacher.build(d_model, ctx)}
        found: dict[str, HeadMixer] = {}
        for name, mixer in built.items():
            if not isinstance(mixer, HeadMixer):
                raise ValueError(f"{name}={getattr(config, name).name} has no heads; use a mixer with heads")
            found[name] = mixer
        self.student, self.inner = found["mixer"], found["teacher"]
        self.num_heads = self.inner.num_heads
        if config.match == "heads":
            theirs, ours = (_head_shape(mixer, d_model, ctx) for mixer in (self.inner, self.student))
            if theirs != ours:
                raise ValueError(
                    f"mixer={config.mixer.name} has {ours[0]} heads of {ours[1]} channels and teacher={config.teacher.name} {theirs[0]} of "
                    f"{theirs[1]}; give both the same, or use match='outputs'"
                )
        known = {path[0] for path, _ in nnx.to_flat_state(nnx.state(self.inner, nnx.Param))} if config.trains == "new" else set()
        train_alone(self.student, known)

    def __call__(self, x, *, at, carry, observer=None):
        at = at.placed(*x.shape[:2])
        inputs, _ = self.project(x, at=at, state=None)
        prepared = self.prepare(inputs, at=at)
        o = self.mix(prepared, x, at=at)
        heads = tapped(observer, "heads", self.finish(o, inputs, x), at=at)
        y = self.output(heads)
        target, found = self._pair(heads, x, at)
        error = jnp.square(found - target).reshape(*x.shape[:2], -1).mean(-1)
        losses = {LOSS: self.config.coefficient * _mean(error, at)}
        looks = () if observer is None else (look(observer, at=at, x=x, mixer=self, inputs=inputs, o=o),)
        return Mixed(y, carry, {**self.auxiliary_losses(prepared, x, at=at), **losses}, looks, self.counts(inputs, x, at=at))

    def observe(self, inputs, x, *, at):
        heads = self.finish(self.mix(inputs, x, at=at), inputs, x)
        target, found = self._pair(heads, x, at)
        size = lambda y: _mean(jnp.square(y).reshape(*x.shape[:2], -1).sum(-1), at)
        return {**super().observe(inputs, x, at=at), "transfer_error": size(found - target) / jnp.maximum(size(target), 1e-30)}

    def _pair(self, heads: jax.Array, x: jax.Array, at: Tokens) -> tuple[jax.Array, jax.Array]:
        """What the teacher gave and what the student gives of the same input, `[B, T, ...]` float32."""
        x, heads = jax.lax.stop_gradient((x, heads))
        inputs, _ = self.student.project(x, at=at, state=None)
        found = self.student.finish(self.student.mix(inputs, x, at=at), inputs, x)
        if self.config.match == "outputs":
            heads, found = jax.lax.stop_gradient(self.output(heads)), self.student.output(found)
        return heads.astype(jnp.float32), found.astype(jnp.float32)


def _head_shape(mixer: HeadMixer, d_model: int, ctx: BuildContext) -> tuple[int, ...]:
    """Heads, and their channels as they are projected back."""
    at = Tokens().placed(1, 1)

    def heads(x: jax.Array) -> jax.Array:
        inputs, _ = mixer.project(x, at=at, state=None)
        return mixer.finish(mixer.mix(inputs, x, at=at), inputs, x)

    return jax.eval_shape(heads, jax.ShapeDtypeStruct((1, 1, d_model), ctx.compute_dtype)).shape[2:]


def _mean(x: jax.Array, at: Tokens) -> jax.Array:
    """Of `[B, T]` over the tokens that are not padding."""
    real = (at.segment_ids > 0).astype(jnp.float32)
    return (x * real).sum() / jnp.maximum(real.sum(), 1.0)
