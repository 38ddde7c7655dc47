"""BlockRank: the documents of a prompt see the instruction and themselves, and the query sees all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from plait.configs.domains import INT32, Whole
from plait.kernels import Tokens, attention, attention_rows
from plait.models.build import BuildContext
from plait.models.layers.cache import Cache, current
from plait.models.looks.look import DocumentRanks
from plait.models.mixers.base import register
from plait.models.mixers.full.by_rule import MultiHead
from plait.models.mixers.full.dot_product import GroupedConfig

TokenId = Annotated[int, Whole(0, INT32)]
QUERY = 1 << 29
"""Number of the query's block: above that of any document."""


@register(
    "blockrank",
    kind="sparse",
    source="Scalable In-context Ranking with Generative Models (2510.05396)",
    proof="the block mask and the contrastive loss token by token in float64",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockRankConfig(GroupedConfig):
    """Softmax attention under the mask of a ranking prompt: `instruction | document 1 | ... | document N | query and answer`.

    A token sees, of those before it, its own block and the instruction, and in the query's block all. Blocks are told from the text: one
    begins at each `document_id`, the query's at the first `query_id`. Where neither stands, as in other text, all is instruction and this
    is full attention. Each query's softmax is over all that it sees, put together from up to three of the op, none of which visits what
    is hidden.

    With `answer_id`, a token of that id ends the query, and `attention_loss.document_ranking` trains what it and the token before it
    attend to: of the logits to documents only, a softmax, its sum in each document, the mean over heads and the two. The right documents are
    those whose first token, behind their `document_id`, is the token that answers: the one behind `answer_id`. Give the layer that is to
    rank a name of its own (`blockrank/middle`), the others no `answer_id`.
    """

    directions = ("causal",)

    document_id: TokenId = 1
    """With which a document begins."""
    query_id: TokenId = 2
    """With which the query begins."""
    answer_id: TokenId | None = None
    """With which the query ends, in the layer that is to rank; None in others."""
    num_documents: Annotated[int, Whole(1, 2**16)] = 64
    """The most documents of a prompt that the loss tells apart; later ones do not count in it."""

    def check(self) -> None:
        super().check()
        if len(set(self.token_ids.values())) < len(self.token_ids):
            raise ValueError(
                f"query_id={self.query_id} must differ from document_id and answer_id; give each marker a token of its own"
            )
        if self.positions is not None and self.positions.place == "logits":
            raise ValueError(
                f"positions={self.positions.name} adds to the logits, which here are those of several parts; use rotary or another"
            )

    @property
    def token_ids(self):
        ids = {"document_id": self.document_id, "query_id": self.query_id, "answer_id": self.answer_id}
        return {name: token for name, token in ids.items() if token is not None}

    @property
    def whole_without(self):
        return {"document_id": self.document_id, "query_id": self.query_id}

    @classmethod
    def example(cls) -> BlockRankConfig:
        return cls(num_heads=4, num_kv_heads=2, head_dim=16, answer_id=3, num_documents=4)

    def build(self, d_model: int, ctx: BuildContext) -> BlockRank:
        return BlockRank(self, d_model, ctx)


class Blocked(NamedTuple):
    q: jax.Array  # [B, T, H, K]
    k: jax.Array  # [B, S, Hkv, K]
    v: jax.Array  # [B, S, Hkv, K]
    number: jax.Array  # int32 [B, T], of each query's block: 0 the instruction, from 1 on documents, QUERY
    kv_number: jax.Array  # the same of keys
    kv_at: Tokens | None = None  # where the keys stand, when they are not the queries' own tokens


class BlockRankState(NamedTuple):
    tokens: Cache
    numbers: jax.Array  # int32 [B, S]


class BlockRank(MultiHead):
    """See `BlockRankConfig`."""

    def project(self, x, *, at, state):
        number = self._numbers(at)
        return self._with(super().project(x, at=at, state=None)[0], number), state

    def project_step(self, x, *, at, state):
        before = jnp.take_along_axis(state.numbers, jnp.maximum(at.positions - 1, 0), axis=1)
        before = jnp.where(at.positions > 0, before, 0)
        number = before if at.ids is None else self._advanced(before, at.ids)
        return self._with(super().project(x, at=at, state=None)[0], number), state

    def _with(self, inputs: Any, number: jax.Array) -> Blocked:
        return Blocked(inputs.q, inputs.k, inputs.v, number, number)

    def _advanced(self, before: jax.Array, ids: jax.Array) -> jax.Array:
        query = (before == QUERY) | (ids == self.config.query_id)
        return jnp.where(query, QUERY, before + (ids == self.config.document_id))

    def _numbers(self, at: Tokens) -> jax.Array:
        """int32 `[B, T]`: the block of each token in its own text."""
        if at.ids is None:
            return jnp.zeros_like(at.positions)
        starts = at.starts()

        def so_far(mark: int) -> jax.Array:
            there = ((at.ids == mark) & (at.segment_ids > 0)).astype(jnp.int32)
            total = jnp.cumsum(there, axis=1)
            return total - jnp.take_along_axis(total - there, starts, axis=1)

        return jnp.where(so_far(self.config.query_id) > 0, QUERY, so_far(self.config.document_id))

    def parts(self, inputs: Blocked, at: Tokens) -> Iterator[dict[str, Any]]:
        """The options of each op: of a token to its own block, to the instruction, and of the query's to documents."""
        at = at.placed(*inputs.q.shape[:2])
        keys = at if inputs.kv_at is None else inputs.kv_at
        common = {"mask": self.mask, "scale": self.scale}
        if inputs.kv_at is None:
            yield {**common, "at": _apart(at, inputs.number)}
        else:
            yield {**common, "at": _named(at, inputs.number), "kv_at": _named(keys, inputs.kv_number)}
        number, kv_number = inputs.number, inputs.kv_number
        yield {**common, "at": _only(at, number > 0), "kv_at": _only(keys, kv_number == 0)}
        yield {**common, "at": _only(at, number == QUERY), "kv_at": _only(keys, (kv_number > 0) & (kv_number < QUERY))}

    def weigh(self, inputs, *, at):
        found = [attention(inputs.q, inputs.k, inputs.v, return_lse=True, **options) for options in self.parts(inputs, at)]
        o, lse = map(jnp.stack, zip(*found, strict=True))
        return jnp.sum(jax.nn.softmax(lse, axis=0)[..., None] * o, axis=0).astype(inputs.q.dtype)

    def attend_active(self, inputs, active, *, at):
        return self.weigh(inputs, at=at)

    def implied(self, inputs, rows, *, at):
        options = list(self.parts(inputs, at))
        lse = [attention(inputs.q, inputs.k, inputs.v, return_lse=True, **one)[1] for one in options]
        share = jnp.swapaxes(jax.nn.softmax(jnp.stack(lse), axis=0)[:, :, rows], 2, 3)[..., None]  # [3, B, H, R, 1]
        return sum(s * attention_rows(inputs.q, inputs.k, rows=rows, **one) for s, one in zip(share, options, strict=True))

    def observe(self, inputs, x, *, at):
        return {} if self.config.answer_id is None or at.ids is None else {"document_ranks": self.ranks(inputs, at)}

    def ranks(self, inputs: Blocked, at: Tokens) -> DocumentRanks:
        """What the ends of queries attend to among the documents."""
        *_, options = self.parts(inputs, at)
        number, count = inputs.number, self.config.num_documents
        one = jax.nn.one_hot(jnp.where(number < QUERY, number, 0) - 1, count, dtype=inputs.q.dtype)
        shares = jnp.broadcast_to(one[:, :, None], (*one.shape[:2], self.num_kv_heads, count))
        mass: Any = attention(inputs.q, inputs.k, shares, **options)
        mass = mass.astype(jnp.float32).mean(2)  # [B, T, N]
        later = lambda y: jnp.concatenate([y[:, 1:], jnp.zeros_like(y[:, :1])], axis=1)
        earlier = lambda y: jnp.concatenate([jnp.zeros_like(y[:, :1]), y[:, :-1]], axis=1)
        same = later(at.segment_ids) == at.segment_ids
        ends = (at.ids == self.config.answer_id) & (number == QUERY) & same & (earlier(number) == QUERY)
        names = (at.ids == self.config.document_id) & (number < QUERY) & (number > 0) & same
        name, documents = later(at.ids), at.numbered()
        answer = jnp.where(ends, name, -1)
        there = names[:, None, :] & (documents[:, :, None] == documents[:, None, :])  # [B, T, S]
        right = (there & (answer[:, :, None] == name[:, None, :])).astype(jnp.float32)
        to_document = lambda y: jnp.einsum("bts,bsn->btn", y.astype(jnp.float32), one.astype(jnp.float32)) > 0
        return DocumentRanks((mass + earlier(mass)) / 2, to_document(there), to_document(right) & ends[..., None])

    def init_state(self, batch_size, max_len):
        tokens = super().init_state(batch_size, max_len)
        return BlockRankState(tokens, jnp.zeros(tokens.positions.shape, jnp.int32))

    def attend(self, inputs, *, at, state):
        o = self.weigh(inputs, at=at)
        return o, None if state is None else self._kept_with(state, inputs, at)

    def recall(self, inputs, carry, *, at, state):
        state = self._kept_with(state, inputs, at)
        return self.recalled(inputs, state.tokens)._replace(kv_number=state.numbers), carry, state

    def _kept_with(self, state: BlockRankState, inputs: Blocked, at: Tokens) -> BlockRankState:
        slot = jnp.where(current(at), at.positions, state.numbers.shape[1])  # out of range: dropped
        row = jnp.arange(slot.shape[0])[:, None]
        numbers = state.numbers.at[row, slot].set(inputs.number, mode="drop")
        return BlockRankState(self.slots.write(state.tokens, self.kept(inputs), at), numbers)


def _only(tokens: Tokens, some: jax.Array) -> Tokens:
    """The tokens, those that are not `some` as padding."""
    return Tokens(None, jnp.where(some, tokens.segment_ids, 0), tokens.positions)


def _apart(at: Tokens, number: jax.Array) -> Tokens:
    """The tokens of a row, each block a segment of its own."""
    new = (jnp.diff(at.numbered(), axis=1, prepend=0) != 0) | (jnp.diff(number, axis=1, prepend=0) != 0)
    return Tokens(None, jnp.where(at.segment_ids > 0, jnp.cumsum(new, axis=1) + 1, 0).astype(jnp.int32), at.positions)


def _named(tokens: Tokens, number: jax.Array) -> Tokens:
    """The tokens of one text, whose segments are its blocks."""
    return Tokens(None, jnp.where(tokens.segment_ids > 0, number + 1, 0), tokens.positions)
