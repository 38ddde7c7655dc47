"""Titans, memory as a layer: the neural memory reads first, and sliding-window attention attends to what it gives."""

from __future__ import annotations

import dataclasses

from plait.configs.domains import Span
from plait.models.axes import EMBED, HEADS
from plait.models.build import BuildContext
from plait.models.layers.linear import Dense
from plait.models.looks.look import Look, look
from plait.models.mixers.base import Mixed, Mixer, register
from plait.models.mixers.heads import join_heads
from plait.models.mixers.linear.titans import TITLE, PersistentAttention, TitansConfig, TitansMemory, mean_keys


@register("titans_mal", kind="linear", source=TITLE, proof="token by token in float64; the delta rule; three tokens by hand")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TitansMALConfig(TitansConfig):
    """`o = W_o SWA([p; y])`, `y_t = W_y (norm(M_t(q_t)) * silu(W_g x_t))`.

    M learns online, `S_t = eta_t S_{t-1} - theta_t grad |M(k_t) - v_t|^2`, `M_t = (1 - alpha_t) M_{t-1} + S_t`, gradients being taken at
    chunk borders; alpha, eta, theta are sigmoids of x. Its q, k, v are convolved with SiLU, q and k of unit norm; what it reads is
    normalised and gated before its projection. The attention also sees the persistent tokens p, without a position.
    """

    window_size: Span = 512
    """Visible keys of a query of the attention, itself included."""

    @classmethod
    def example(cls) -> TitansMALConfig:
        return cls(num_heads=2, head_dim=8, expand=2.0, chunk_size=8, window_size=8, num_persistent=2)

    def build(self, d_model: int, ctx: BuildContext) -> TitansMAL:
        return TitansMAL(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        return self.memory_flops(d_model) + self.attention_flops(d_model, seq_len, mean_keys(self.window_size, seq_len))


class GatedMemory(TitansMemory):
    """A memory layer of its own: what is read is normalised, gated and projected."""

    def __init__(self, config: TitansConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        self.gated_output(ctx, d_model, config)

    def finish(self, o, inputs, x):
        return super(TitansMemory, self).finish(o, inputs, x)


class TitansMAL(Mixer):
    """See `TitansMALConfig`. The heads are those of the attention, then the memories."""

    def __init__(self, config: TitansMALConfig, d_model: int, ctx: BuildContext):
        self.config = config
        self.memory = GatedMemory(config, d_model, ctx)
        self.attention = PersistentAttention(config, d_model, ctx, config.window_size)
        width = self.memory.num_heads * config.head_dim
        self.o = Dense(ctx, width, d_model, (HEADS, EMBED), init=ctx.residual_init)
        self.num_heads = 2 * self.memory.num_heads

    def __call__(self, x, *, at, carry, observer=None):
        at = at.placed(*x.shape[:2])
        looks: list[Look] = []
        y = x
        for part in (self.memory, self.attention):
            read, _ = part.project(y, at=at, state=None)
            o, _ = part.attend(read, at=at, state=None)
            if observer is not None:
                looks.insert(0, look(observer, at=at, x=y, mixer=part, inputs=read, o=o))
            y = self._output(part, o, read, y)
        return Mixed(y, carry, looks=tuple(looks))

    def _output(self, part, o, inputs, x):
        if part is self.memory:
            return part.output(part.finish(o, inputs, x))
        return self.o(join_heads(o))

    def init_state(self, batch_size, max_len):
        return [part.init_state(batch_size, max_len) for part in (self.memory, self.attention)]

    def prefill(self, x, state, *, at, carry):
        return self._advance("attend", x, state, at.placed(*x.shape[:2]), carry)

    def step(self, x, state, *, at, carry):
        return self._advance("attend_step", x, state, at, carry)

    def _advance(self, attend, x, state, at, carry):
        after = []
        for part, old in zip((self.memory, self.attention), state, strict=True):
            inputs, projected = part.project(x, at=at, state=old)
            o, new = getattr(part, attend)(inputs, at=at, state=projected)
            after.append(new)
            x = self._output(part, o, inputs, x)
        return x, carry, after
