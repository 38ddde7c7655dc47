"""MoBA: each query attends to its own block and to those past whose mean key it likes best."""

from __future__ import annotations

import dataclasses

from plait.kernels import topk_blocks
from plait.models.axes import KV_HEADS
from plait.models.build import BuildContext
from plait.models.mixers.base import register
from plait.models.mixers.sparse.selecting import Selectable, Selecting, SelectingConfig, mean_past


@register(
    "moba",
    kind="sparse",
    source="MoBA: Mixture of Block Attention for Long-Context LLMs (2502.13189)",
    proof="the authors' naive form, outputs and gradients",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MoBAConfig(SelectingConfig):
    """`o_i = sum_j softmax_j(q_i . k_j / sqrt(K)) v_j` over the visible keys of the blocks that the query's head chooses.

        s_in = q_i . mean_{j in block n} k_j     own block: always, causal     of those past: the top_k - 1 of the largest s_in

    Without parameters of its own: it can take turns with softmax attention in one model, in depth or in time. The choice has no
    gradient; queries and keys learn it through the attention. The paper keeps its last layers full when it fine-tunes. Keys are
    averaged with their positions.
    """

    @classmethod
    def example(cls) -> MoBAConfig:
        return cls(num_heads=4, num_kv_heads=2, head_dim=16, block_size=4, top_k=3)

    def build(self, d_model: int, ctx: BuildContext) -> MoBA:
        return MoBA(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        scores = 2.0 * self.count_heads(d_model) * self.head_dim * mean_past(seq_len, self.block_size, self.block_size + 1)
        return self.pair_flops(d_model) * self.seen_keys(d_model, seq_len) + scores


class MoBA(Selecting):
    """See `MoBAConfig`."""

    def __init__(self, config: MoBAConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        self.q = self.projection(ctx, d_model, self.num_heads, config.head_dim)
        self.k, self.v = (self.projection(ctx, d_model, self.num_kv_heads, config.head_dim, KV_HEADS) for _ in range(2))
        self.o = self.projection_back(ctx, d_model, config.head_dim)

    def project(self, x, *, at, state):
        placed = self.placed(x, at)
        q = self.turned(self.split(self.q(placed), self.num_heads), at)
        k = self.turned(self.split(self.k(placed), self.num_kv_heads, KV_HEADS), at)
        return Selectable(q, k, self.split(self.v(x), self.num_kv_heads, KV_HEADS)), state

    def select(self, inputs, at):
        means, blocks_at = self.mean_keys(inputs, at)
        return topk_blocks(
            inputs.q,
            means,
            blocks_at=blocks_at,
            at=at,
            top_k=self.config.top_k,
            block_size=self.config.block_size,
            num_blocks=self.num_blocks(inputs),
        )
