"""Titans, memory as a context: attention within segments sees what the memory gives to them, and the memory learns what it finds."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp

from plait.kernels import memory_context
from plait.kernels.chunking import dot
from plait.kernels.memory_context import Learned, empty_context
from plait.kernels.shapes import l2_normalize
from plait.models.axes import EMBED, HEADS
from plait.models.build import BuildContext
from plait.models.layers.linear import Dense
from plait.models.looks.look import look
from plait.models.mixers.base import HeadKind, Mixed, Mixer, register
from plait.models.mixers.heads import join_heads, split_heads
from plait.models.mixers.linear.titans import TITLE, MemoryGate, TitansConfig, TitansMemory
from plait.models.positions.rope import rotate


@register("titans_mac", kind="linear", source=TITLE, proof="token by token in float64; the delta rule; three tokens by hand")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TitansMACConfig(TitansConfig):
    """`h = M_s(q(x))`, `y = attention([p; h; x])`, `o = W (norm(y) * sigmoid(norm(M_t(q(y)))))` in segments of chunk_size tokens.

    M_s is the memory before segment s. It learns online from y, `S_t = eta_t S_{t-1} - theta_t grad |M_s(k_t) - v_t|^2`,
    `M_t = (1 - alpha_t) M_{t-1} + S_t`, k, v and the sigmoids alpha, eta, theta being of y. q, k, v of the memory are convolved with SiLU,
    q and k of unit norm. A token sees the reads h of the tokens up to it, not all of its segment, which would tell it of later ones. Reads
    and tokens share keys and values, so the heads together are as wide as the model; h stands at its token's position, p at none.
    The paper names the nonlinearity of its gate sigma and does not say on which side it is.
    """

    @classmethod
    def example(cls) -> TitansMACConfig:
        return cls(num_heads=4, head_dim=16, expand=1.0, chunk_size=8, num_persistent=2)

    def heads(self, d_model: int) -> int:
        heads = super().heads(d_model)
        if heads * self.head_dim != d_model:
            raise ValueError(
                f"num_heads={heads} times head_dim={self.head_dim} must be d_model={d_model}, since reads of the memory stand beside "
                "tokens; leave num_heads None, with a head_dim that divides it"
            )
        return heads

    def head_kinds(self, d_model: int) -> tuple[HeadKind, ...]:
        attend: tuple[HeadKind, ...] = ("attention",)
        return attend * self.heads(d_model)

    def build(self, d_model: int, ctx: BuildContext) -> TitansMAC:
        return TitansMAC(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        answer = 2.0 * self.heads(d_model) * sum(a * b for a, b in itertools.pairwise(self.widths))
        twice = (
            2.0 * d_model * (3 * d_model + self.conv_size)
        )  # h: keys and values; x and y: the memory's queries, and their taps
        keys = 2.0 * self.chunk_size  # all places of a segment, masked
        return self.memory_flops(d_model) + answer + twice + self.attention_flops(d_model, seq_len, keys)


class TitansMAC(Mixer):
    """See `TitansMACConfig`. The heads are those of the attention."""

    def __init__(self, config: TitansMACConfig, d_model: int, ctx: BuildContext):
        self.config, self.dtype = config, ctx.compute_dtype
        self.num_heads = config.heads(d_model)
        self.q, self.k, self.v = (Dense(ctx, d_model, d_model, (EMBED, HEADS), heads=(1, self.num_heads)) for _ in range(3))
        init = jax.nn.initializers.normal(1.0)
        self.persistent = ctx.param(init, (config.num_persistent, d_model), (None, None))
        self.memory = TitansMemory(config, d_model, ctx)
        self.join = MemoryGate(config, d_model, ctx, d_model)

    def keys_values(self, y, positions):
        """See `plait.kernels.memory_context.Layers`; and the next three."""
        k, v = (split_heads(dense(y), self.num_heads) for dense in (self.k, self.v))
        return self._turn(k, positions), v

    def learned(self, y):
        memory = self.memory
        return Learned(memory.q(y), memory.k(y), memory.v(y), **memory.gates(y))

    def taps(self):
        return tuple(getattr(self.memory, name).weight[...] for name in self.memory.convs)

    def heads(self, q, k, v):
        q, k, v = (split_heads(y, self.num_heads) for y in (q, k, v))
        return l2_normalize(q), l2_normalize(k), v

    def _turn(self, x, positions):
        return x if self.config.rope_theta is None else rotate(x, positions, self.config.rope_theta)

    def _run(self, x, state, at):
        context, conv = state
        reads, conv = self.memory.q_conv(self.memory.q(x), at=at, state=conv)
        q = split_heads(self.q(x), self.num_heads)
        k, v = (split_heads(dense(self.persistent[...]), self.num_heads) for dense in (self.k, self.v))
        logits = dot("bthk,phk->bthp", q.astype(jnp.float32), k.astype(jnp.float32)) * self.config.head_dim**-0.5
        y, read, context = memory_context(
            l2_normalize(split_heads(reads, self.num_heads)),
            self._turn(q, at.positions),
            *self.keys_values(x, at.positions),
            persistent_logits=logits,
            persistent_values=v,
            layers=self,
            initial=tuple(w[...] for w in self.memory.initial),
            rule=self.config.rule,
            state=context,
            at=at,
        )
        return self.join(y, join_heads(read)), (context, conv)

    def __call__(self, x, *, at, carry, observer=None):
        at = at.placed(*x.shape[:2])
        y, _ = self._run(x, self.init_state(len(x), x.shape[1]), at)
        return Mixed(y, carry, looks=() if observer is None else (look(observer, at=at, x=x),))

    def init_state(self, batch_size, max_len):
        c = self.config
        context = empty_context(tuple(self.memory.initial), batch_size, c.chunk_size, c.head_dim, c.conv_size, self.dtype)  # type: ignore[arg-type]
        return context, self.memory.q_conv.init_state(batch_size)

    def prefill(self, x, state, *, at, carry):
        y, state = self._run(x, state, at.placed(*x.shape[:2]))
        return y, carry, state

    def step(self, x, state, *, at, carry):
        y, state = self._run(x, state, at.placed(*x.shape[:2]))
        return y, carry, state
