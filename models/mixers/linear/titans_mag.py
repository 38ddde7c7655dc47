"""Titans, memory as a gate: sliding-window attention and the neural memory side by side, the memory gating what attention gives."""

from __future__ import annotations

import dataclasses

from plait.configs.domains import Span
from plait.models.build import BuildContext
from plait.models.looks.look import look
from plait.models.mixers.base import Mixed, Mixer, register
from plait.models.mixers.heads import join_heads
from plait.models.mixers.linear.titans import TITLE, MemoryGate, PersistentAttention, TitansConfig, TitansMemory, mean_keys


@register("titans_mag", kind="linear", source=TITLE, proof="token by token in float64; the delta rule; three tokens by hand")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TitansMAGConfig(TitansConfig):
    """`o = W (norm(y) * sigmoid(norm(m)))`, `y = SWA([p; x])`, `m_t = M_t(q_t)`, the norms with a learned scale of each channel.

    M learns online, `S_t = eta_t S_{t-1} - theta_t grad |M(k_t) - v_t|^2`, `M_t = (1 - alpha_t) M_{t-1} + S_t`, gradients being taken at
    chunk borders; alpha, eta, theta are sigmoids of x. Its q, k, v are convolved with SiLU, q and k of unit norm. The attention also sees
    the persistent tokens p, without a position. The paper names the nonlinearity of its gate sigma and does not say on which side it is.
    """

    window_size: Span = 512
    """Visible keys of a query of the attention, itself included."""

    @classmethod
    def example(cls) -> TitansMAGConfig:
        return cls(num_heads=2, head_dim=8, expand=2.0, chunk_size=8, window_size=8, num_persistent=2)

    def build(self, d_model: int, ctx: BuildContext) -> TitansMAG:
        return TitansMAG(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        return self.memory_flops(d_model) + self.attention_flops(d_model, seq_len, mean_keys(self.window_size, seq_len))


class TitansMAG(Mixer):
    """See `TitansMAGConfig`. The heads are those of the attention, then the memories."""

    def __init__(self, config: TitansMAGConfig, d_model: int, ctx: BuildContext):
        self.config = config
        self.attention = PersistentAttention(config, d_model, ctx, config.window_size)
        self.memory = TitansMemory(config, d_model, ctx)
        self.join = MemoryGate(config, d_model, ctx, self.memory.num_heads * config.head_dim)
        self.num_heads = 2 * self.memory.num_heads

    def __call__(self, x, *, at, carry, observer=None):
        at, parts = at.placed(*x.shape[:2]), (self.attention, self.memory)
        inputs = [part.project(x, at=at, state=None)[0] for part in parts]
        outputs = [part.attend(read, at=at, state=None)[0] for part, read in zip(parts, inputs, strict=True)]
        looks = () if observer is None else tuple(
            look(observer, at=at, x=x, mixer=part, inputs=read, o=o) for part, read, o in zip(parts, inputs, outputs, strict=True)
        )  # fmt: skip
        return Mixed(self.join(*map(join_heads, outputs)), carry, looks=looks)

    def init_state(self, batch_size, max_len):
        return [part.init_state(batch_size, max_len) for part in (self.attention, self.memory)]

    def prefill(self, x, state, *, at, carry):
        return self._advance("attend", x, state, at.placed(*x.shape[:2]), carry)

    def step(self, x, state, *, at, carry):
        return self._advance("attend_step", x, state, at, carry)

    def _advance(self, attend, x, state, at, carry):
        outputs, after = [], []
        for part, old in zip((self.attention, self.memory), state, strict=True):
            inputs, projected = part.project(x, at=at, state=old)
            o, new = getattr(part, attend)(inputs, at=at, state=projected)
            outputs.append(join_heads(o))
            after.append(new)
        return self.join(*outputs), carry, after
