"""DeepSeek sparse attention: latent attention to the tokens that a light indexer scores best."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from plait.configs.domains import Channels, Coefficient, Heads, Span
from plait.kernels import Tokens, divergence_served_by_kernel, served_by_kernel
from plait.models.build import BuildContext
from plait.models.mixers.base import register
from plait.models.mixers.full.mla import MLA, MLAConfig, MLAInputs
from plait.models.mixers.full.weighted import mean_keys
from plait.models.mixers.sparse.indexer import Index, Indexer, chosen, index_loss
from plait.models.mixers.sparse.selecting import mean_past

LOSS = "index/dsa"

WORTH = 128
"""All pairs of heads and keys over the tokens that are chosen, at least, where latents are attended to: bringing a row takes a TPU about as
long as the chunked form so many pairs. By estimates, not measured."""


@register(
    "dsa",
    kind="sparse",
    source="DeepSeek-V3.2 (2512.02556)",
    proof="transformers: DeepSeek-V3.2; its loss, written in torch",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DSAConfig(MLAConfig):
    """MLA over the top_k visible tokens of the largest `I_is`, the same for all heads.

        I_is = sum_h w_ih relu(a_ih . c_s)     over index heads; a from the queries' latent, one c a token, w from the layer's input

    The choice has no gradient, and what the indexer reads is detached: it learns by `index/dsa` alone, `KL(p_i || softmax(I_i))` over the
    tokens that the query sees, p being the mean over heads of attention's weights, and nothing else learns by that. Training has two stages.
    In `warm_up` attention is dense and the indexer alone is trained, everything else in the model is as it was; in `sparse` all is
    trained, and attention is to the chosen tokens.
    """

    directions = ("causal",)

    top_k: Span = 2048
    """Tokens that a query sees; in sequences that are no longer, all."""
    index_heads: Heads = 64
    """Heads of the indexer."""
    index_head_dim: Channels = 128
    """Channels of a head of the indexer, `rope_head_dim` of them, the first, with positions."""
    index_interleaved: bool = False
    """Pairs of channels that the indexer turns are neighbours (GLM-5), not in halves (DeepSeek), whatever they are in the attention."""
    stage: Literal["warm_up", "sparse"] = "sparse"
    """`warm_up`: attention sees all, and of the model the indexers alone are trained; `sparse`: it sees top_k tokens."""
    index_loss: Coefficient | None = 1.0
    """Coefficient of `index/dsa`, the mean over tokens and layers; None leaves the indexer as it is."""

    def check(self) -> None:
        super().check()
        if self.positions is not None and self.index_head_dim < self.rope_head_dim:
            raise ValueError(
                f"index_head_dim={self.index_head_dim} must hold the rope_head_dim={self.rope_head_dim} channels with positions; "
                f"use at least {self.rope_head_dim}"
            )
        if self.stage == "warm_up" and self.index_loss is None:
            raise ValueError("index_loss=None leaves nothing to train in stage='warm_up'; set index_loss, or use stage='sparse'")

    @classmethod
    def example(cls) -> DSAConfig:
        small = {"num_heads": 4, "kv_rank": 24, "q_rank": 32, "nope_head_dim": 16, "rope_head_dim": 8, "v_head_dim": 12}
        return cls(**small, top_k=7, index_heads=3, index_head_dim=12)  # type: ignore[arg-type]

    def function(self, d_model: int) -> DSAConfig:
        return dataclasses.replace(super().function(d_model), index_loss=1.0)

    def from_weights(self, d_model: int) -> DSAConfig:
        return dataclasses.replace(super().from_weights(d_model), stage="sparse", index_loss=1.0)

    def build(self, d_model: int, ctx: BuildContext) -> DSA:
        return DSA(self, d_model, ctx)

    def seen_keys(self, d_model: int, seq_len: int) -> float:
        return mean_keys(seq_len, self.top_k if self.stage == "sparse" else None)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        if not self._chooses(seq_len):
            return super().mixing_flops(d_model, seq_len)
        return 2.0 * self.num_heads * self.head_channels * self.seen_keys(d_model, seq_len) + self._score_flops * mean_past(
            seq_len, 1, 1
        )

    def decode_flops(self, d_model: int, context: int) -> float:
        if not self._chooses(context + 1):
            return super().decode_flops(d_model, context)
        return super().decode_flops(d_model, self.top_k - 1) + self._score_flops * (context + 1)

    def _chooses(self, seq_len: int) -> bool:
        return self.stage == "sparse" and seq_len > self.top_k

    @property
    def _score_flops(self) -> float:
        """Of a query and a token."""
        return 2.0 * self.index_heads * self.index_head_dim


class DSA(MLA):
    """See `DSAConfig`."""

    config: DSAConfig

    def __init__(self, config: DSAConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        positions = config.positions
        if positions is not None:
            positions = dataclasses.replace(positions, interleaved=config.index_interleaved)
        self.indexer = Indexer(
            ctx,
            d_model,
            query_dim=config.q_rank or d_model,
            num_heads=config.index_heads,
            head_dim=config.index_head_dim,
            rotary=None if positions is None else positions.build(ctx, d_model, config.index_heads),
            turned=config.rope_head_dim,
            alone=config.stage == "warm_up",
        )

    def index(self, x, queries, at):
        return self.indexer(x, queries, at)

    def project(self, x, *, at, state):
        inputs, state = super().project(x, at=at, state=state)
        return self.choosing(inputs, inputs.index, at), state

    def project_step(self, x, *, at, state):
        inputs, state = super().project_step(x, at=at, state=state)
        return self.choosing(inputs, inputs.index._replace(k=state.entries["index"]), at), state

    def choosing(self, inputs: MLAInputs, index: Index, at: Tokens) -> MLAInputs:
        """The inputs with the tokens that the scores of `index` choose."""
        if self.config.stage == "warm_up":
            return inputs
        return inputs._replace(selected=chosen(index, at, inputs.kv_at, self.config.top_k))

    def operands(self, inputs, at):
        """Where a kernel brings the chosen tokens together and that is worth it, the latents, which all heads share; else each head's own
        keys, of which less is to be multiplied."""
        pairs = self.num_heads * inputs.k.shape[1]
        if inputs.selected is not None and pairs >= WORTH * self.config.top_k:
            q_nope, q_rope = jnp.split(inputs.q, [self.config.nope_head_dim], axis=-1)
            q, k = self.absorbed(q_nope, q_rope, inputs.latent, inputs.k_rope)
            operands: dict[str, Any] = {"q": q, "k": k, "value_dim": self.config.kv_rank}
            if served_by_kernel(**operands, at=at, **self.options(inputs)):
                return operands
        return super().operands(inputs, at)

    def prepare(self, inputs, *, at):
        return inputs if self.config.index_loss is None else inputs._replace(attended=self.attended(inputs, at))

    def auxiliary_losses(self, inputs, x, *, at):
        if self.config.index_loss is None:
            return {}
        options, operands = {**self.options(inputs), "at": at}, self.operands(inputs, at)
        index, q, k = inputs.index, operands["q"], operands["k"]
        lse = None if inputs.attended is None else inputs.attended[1]
        if "value_dim" in operands and not divergence_served_by_kernel(index.q, index.k, index.weights, q, k, **options):
            q, k, lse = inputs.q, inputs.k, None  # less to be multiplied; logits that are rounded otherwise
        return {LOSS: self.config.index_loss * index_loss(index, q, k, lse=lse, **options)}

    def entries(self):
        return {**super().entries(), "index": ((self.config.index_head_dim,), None)}

    def kept(self, new):
        return {**super().kept(new), "index": new.index.k}
