"""Native sparse attention: compressed tokens of all that is past, chosen blocks of it, and a window, each behind a gate."""

from __future__ import annotations

import dataclasses
from math import gcd
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from plait.configs.domains import Channels, Heads, Span, Whole
from plait.kernels import Mask, SelectedBlocks, Tokens, attention, attention_rows, topk_blocks, whole_blocks
from plait.kernels.shapes import accumulation_dtype
from plait.kernels.topk_blocks.whole_blocks import WholeBlocks
from plait.models.axes import EMBED, HEADS, KV_HEADS
from plait.models.build import BuildContext
from plait.models.layers.cache import Cache, Slots
from plait.models.layers.linear import Dense
from plait.models.looks.look import GateValues, Selection
from plait.models.mixers.base import abstract, products, register
from plait.models.mixers.full.dot_product import DotProduct
from plait.models.mixers.full.weighted import mean_keys
from plait.models.mixers.heads import split_heads
from plait.models.mixers.sparse.compression import Compression, mean
from plait.models.mixers.sparse.selecting import Blocks, SelectingConfig, mean_past


@register(
    "nsa",
    kind="sparse",
    source="Native Sparse Attention (2502.11089)",
    proof="fla: naive NSA, outputs and gradients; the paper's scores by hand",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class NSAConfig(SelectingConfig):
    """`o = sum_c sigmoid(g_c) softmax(q K_c^T / sqrt(K)) V_c` over three branches c, g a linear function of the layer's input.

        compressed   one key and value for each `span` tokens, beginning every `stride`, that have come to their end
        selected     the tokens of top_k blocks: the first, the local, and those of the largest p, the compressed branch's weights
                     summed over what of its runs lies in the block and over the heads of a group, which choose together
        window       the last tokens

    Blocks and runs are counted from the start of the document. The choice has no gradient: the scorer learns as the compressed branch.
    A network compresses keys before their positions, and what comes out has that of the run's last token; a mean is of keys with
    theirs. FLA's simplification is `compression = "mean"`, `keys = "shared"`, `span = stride = block_size`, and only a query's own block
    always chosen.
    """

    num_kv_heads: Heads | None = None
    """Key and value heads, a divisor of num_heads; None gives num_heads. The paper has 4 for 64 heads: a group chooses together."""
    block_size: Span = 64
    """Tokens of a block that is chosen as a whole, counted from the start of the document."""
    top_k: Blocks = 16
    """Blocks that a query sees, the first and the local ones among them."""
    num_first: Annotated[int, Whole(0, 2**20)] = 1
    """Leading blocks of the document that are always chosen."""
    num_local: Blocks = 2
    """Blocks up to the query's own that are always chosen."""
    window_size: Span = 512
    """Tokens of the window, the query's own included."""
    compression: Literal["mlp", "mean"] = "mlp"
    """What makes one token of a run's: a network that knows their places, or their mean."""
    span: Span = 32
    """Tokens that are compressed to one."""
    stride: Span = 16
    """Tokens from the beginning of one such run to the next, a divisor of span and of block_size."""
    hidden_dim: Channels | None = None
    """Channels inside the network; None gives head_dim."""
    keys: Literal["separate", "shared"] = "separate"
    """Whether each branch has its own keys and values, or all the same."""

    def check(self) -> None:
        super().check()
        for name in ("span", "block_size"):
            if getattr(self, name) % self.stride:
                raise ValueError(
                    f"stride={self.stride} must divide span={self.span} and block_size={self.block_size}; "
                    f"use {gcd(self.span, self.block_size)} or a divisor of it"
                )
        if self.top_k < self.num_first + self.num_local:
            raise ValueError(
                f"top_k={self.top_k} must hold num_first={self.num_first} and num_local={self.num_local}; "
                f"use at least {self.num_first + self.num_local}"
            )
        if self.hidden_dim is not None and self.compression == "mean":
            raise ValueError(f"hidden_dim={self.hidden_dim} is of compression='mlp', and a mean has none; leave it out")

    @classmethod
    def example(cls) -> NSAConfig:
        small = {"block_size": 8, "top_k": 4, "window_size": 6, "span": 4, "stride": 2}
        return cls(num_heads=4, num_kv_heads=2, head_dim=16, **small)  # type: ignore[arg-type]

    @property
    def opaque(self):  # type: ignore[override]
        """Why its heads have no implied attention; None where they have."""
        if self.compression == "mlp":
            return "a network compresses its values, which is not linear in them"
        return "its branches weigh values of their own" if self.keys == "separate" else None

    def sees_whole(self, d_model: int, seq_len: int) -> bool:
        return self.window_size >= seq_len or super().sees_whole(d_model, seq_len)

    def build(self, d_model: int, ctx: BuildContext) -> NSA:
        return NSA(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        runs = self.heads(d_model)[1] * max(1, seq_len // self.stride) / seq_len
        return self.between_flops(d_model, seq_len) + (runs - 1) * self._network_flops(
            d_model
        )  # one is counted with the projections

    def decode_flops(self, d_model: int, context: int) -> float:
        through = lambda length: length * self.between_flops(d_model, length)
        return through(context + 1) - through(context) + (self.heads(d_model)[1] - 1) * self._network_flops(d_model)

    def between_flops(self, d_model: int, seq_len: int) -> float:
        runs = mean_past(seq_len, self.stride, self.span)
        seen = runs + self.seen_keys(d_model, seq_len) + mean_keys(seq_len, self.window_size)
        return self.pair_flops(d_model) * seen + 2.0 * self.count_heads(d_model) * self.head_dim * runs

    def _network_flops(self, d_model: int) -> float:
        """Of a head's key and value of one run."""
        networks = abstract(self, d_model).networks
        return 0.0 if networks is None else products(networks)


class KV(NamedTuple):
    k: jax.Array  # [B, S, Hkv, K]
    v: jax.Array  # [B, S, Hkv, K]
    at: Any = None  # Tokens: where they stand, when they are not the queries' own tokens


class NSAInputs(NamedTuple):
    q: jax.Array  # [B, T, H, K]
    selected: KV
    window: KV
    raw: KV  # what is compressed
    compressed: Any  # KV at the runs' last tokens; None of one token, before those of a cache are there
    gates: jax.Array  # [B, T, H, 3] float32: compressed, selected, window

    @property
    def v(self) -> jax.Array:
        """The values of the selected branch."""
        return self.selected.v


class NSAState(NamedTuple):
    selected: Cache
    window: Cache | None  # a ring; None where keys are shared
    raw: Cache  # a ring of one run
    compressed: Cache  # a slot a run, at its last token


class NSA(DotProduct):
    """See `NSAConfig`."""

    def __init__(self, config: NSAConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        self.num_heads, self.num_kv_heads = config.heads(d_model)
        pair = lambda: nnx.List(self.projection(ctx, d_model, self.num_kv_heads, config.head_dim, KV_HEADS) for _ in range(2))
        own = config.keys == "separate"
        self.q = self.projection(ctx, d_model, self.num_heads, config.head_dim)
        self.kv, self.window_kv, self.compressed_kv = pair(), pair() if own else None, pair() if own else None
        widths = config.span, config.head_dim, config.hidden_dim or config.head_dim
        learned = config.compression == "mlp"
        self.networks = nnx.List(Compression(ctx, *widths) for _ in range(2)) if learned else None
        self.gate = Dense(ctx, d_model, 3 * self.num_heads, (EMBED, HEADS), heads=(1, self.num_heads), role="gate")
        self.o = self.projection_back(ctx, d_model, config.head_dim)
        self.near = Mask(window_size=config.window_size)
        self.ring, self.run = Slots(config.window_size), Slots(config.span)

    def project(self, x, *, at, state):
        inputs = self._of_tokens(x, at)
        runs = whole_blocks(at, self.config.stride, self.config.span)
        ends = runs.at.positions * self.config.stride + self.config.span - 1
        gathered = KV(*(runs.gather(y) for y in inputs.raw[:2]))
        return inputs._replace(compressed=self._compressed(gathered, runs.real, Tokens(None, runs.at.segment_ids, ends))), state

    def project_step(self, x, *, at, state):
        return self._of_tokens(x, at), state

    def _of_tokens(self, x: jax.Array, at: Tokens) -> NSAInputs:
        """The inputs without compressed tokens."""
        placed = self.placed(x, at)

        def one(pair: Any, turned: bool) -> KV:
            k, v = (self.split(dense(y), self.num_kv_heads, KV_HEADS) for dense, y in zip(pair, (placed, x), strict=True))
            return KV(self.turned(k, at) if turned else k, v)

        q = self.turned(self.split(self.q(placed), self.num_heads), at)
        kv = one(self.kv, True)
        window = kv if self.window_kv is None else one(self.window_kv, True)
        means = self.networks is None
        if self.compressed_kv is None:
            raw = kv if means else one(self.kv, False)
        else:
            raw = one(self.compressed_kv, means)
        gates = split_heads(self.gate(x), self.num_heads)
        gates = jax.nn.sigmoid(gates.astype(accumulation_dtype(gates)))
        return NSAInputs(q, kv, window, raw, None, gates)

    def _compressed(self, tokens: KV, real: jax.Array, at: Tokens) -> KV:
        """Runs `[B, N, C, Hkv, K]` as tokens, of which `at` says where they stand."""
        if self.networks is None:
            return KV(mean(tokens.k, real), mean(tokens.v, real), at)
        k, v = (network(y, real) for network, y in zip(self.networks, tokens[:2], strict=True))
        return KV(self.turned(k, at), v, at)

    def select(self, inputs: NSAInputs, at: Tokens) -> SelectedBlocks:
        """The blocks that each query sees."""
        config, (k, _, ends) = self.config, inputs.compressed
        number = (ends.positions + 1 - config.span) // config.stride
        return topk_blocks(
            inputs.q,
            k,
            blocks_at=Tokens(None, ends.segment_ids, number),
            at=at,
            top_k=config.top_k,
            block_size=config.block_size,
            num_blocks=-(-inputs.selected.k.shape[1] // config.block_size),
            num_local=config.num_local,
            num_first=config.num_first,
            by_group=True,
            scale=self.scale,
            stride=config.stride,
            span=config.span,
        )

    def branches(self, inputs: NSAInputs, at: Tokens) -> tuple[tuple[KV, dict[str, Any]], ...]:
        """Keys and values of each, and the arguments of the op."""
        chosen = {"mask": self.mask, "selected": self.select(inputs, at)}
        every = (inputs.compressed, {"mask": self.mask}), (inputs.selected, chosen), (inputs.window, {"mask": self.near})
        return tuple((kv, {**options, "at": at, "kv_at": kv.at, "scale": self.scale}) for kv, options in every)

    def weigh(self, inputs, *, at):
        heads: list[Any] = [attention(inputs.q, kv.k, kv.v, **options) for kv, options in self.branches(inputs, at)]
        gates = jnp.moveaxis(inputs.gates, -1, 0)[..., None]
        total: Any = sum(gate * o.astype(gate.dtype) for gate, o in zip(gates, heads, strict=True))
        return total.astype(inputs.q.dtype)

    def attend_active(self, inputs, active, *, at):
        return self.weigh(inputs, at=at)

    def implied(self, inputs, rows, *, at):
        if self.config.opaque is not None:
            return None
        runs = whole_blocks(at.placed(*inputs.q.shape[:2]), self.config.stride, self.config.span)
        shown = [attention_rows(inputs.q, kv.k, rows=rows, **options) for kv, options in self.branches(inputs, at)]
        shown[0] = jnp.einsum("bhrn,bns->bhrs", shown[0], _shares(runs, inputs.q.shape[1]), precision="highest")
        gates = jnp.moveaxis(inputs.gates[:, rows], (3, 2), (0, 2))[..., None]
        return sum(gate * a for gate, a in zip(gates, shown, strict=True))

    def observe(self, inputs, x, *, at):
        q, k = inputs.q, inputs.selected.k
        dense = lambda rows: attention_rows(q, k, rows=rows, at=at, mask=self.mask, scale=self.scale)
        return {"gates": {"output": GateValues(inputs.gates, 1.0)}, "selection": Selection(self.select(inputs, at), dense)}

    def init_state(self, batch_size, max_len):
        self.config.fit_length(max_len)
        entries = self.entries()
        slots = max(1, (max_len - self.config.span) // self.config.stride + 1)
        empty = lambda slots, length: slots.empty(batch_size, length, entries, self.dtype)
        window = None if self.config.keys == "shared" else empty(self.ring, max_len)
        run = empty(self.run, self.config.span)
        return NSAState(empty(self.slots, max_len), window, run, empty(self.slots, slots))

    def attend(self, inputs, *, at, state):
        if state is None:
            return self.weigh(inputs, at=at), None
        ends = inputs.compressed.at
        last = Tokens(None, at.segment_ids[:, -1:], at.positions[:, -1:])
        own = (ends.segment_ids == last.segment_ids) & (ends.segment_ids > 0) & (ends.positions <= last.positions)
        state = self._with_tokens(state, inputs, at)
        return self.weigh(inputs, at=at), state._replace(compressed=self._with_runs(state.compressed, inputs.compressed, own))

    def recall(self, inputs, carry, *, at, state):
        state, span = self._with_tokens(state, inputs, at), self.config.span
        places = at.positions - span + 1 + jnp.arange(span, dtype=jnp.int32)[None]  # the run that ends here, in order
        slots = places % span
        take = lambda y: jnp.take_along_axis(y, slots.reshape(*slots.shape, *[1] * (y.ndim - 2)), axis=1)
        real = take(state.raw.positions) == places
        run = KV(*(take(state.raw.entries[name])[:, None] for name in ("k", "v")))
        here = Tokens(None, jnp.ones_like(at.positions), at.positions)
        due = (places[:, :1] >= 0) & (places[:, :1] % self.config.stride == 0)
        compressed = self._with_runs(state.compressed, self._compressed(run, real[:, None], here), due)
        state = state._replace(compressed=compressed)
        kept = lambda cache: KV(cache.entries["k"], cache.entries["v"], cache.at)
        selected = kept(state.selected)
        window = selected if state.window is None else kept(state.window)
        return inputs._replace(selected=selected, window=window, compressed=kept(compressed)), carry, state

    def _with_tokens(self, state: NSAState, inputs: NSAInputs, at: Tokens) -> NSAState:
        write = lambda slots, cache, kv: slots.write(cache, {"k": kv.k, "v": kv.v}, at)
        return state._replace(
            selected=write(self.slots, state.selected, inputs.selected),
            window=None if state.window is None else write(self.ring, state.window, inputs.window),
            raw=write(self.run, state.raw, inputs.raw),
        )

    def _with_runs(self, cache: Cache, kv: KV, own: jax.Array) -> Cache:
        """The cache with those of the runs that are `own` `[B, N]`."""
        number = (kv.at.positions + 1 - self.config.span) // self.config.stride
        slot = jnp.where(own, number, cache.positions.shape[1])  # out of range: dropped
        row = jnp.arange(slot.shape[0])[:, None]
        put = lambda old, new: old.at[row, slot].set(new.astype(old.dtype), mode="drop")
        entries = {"k": put(cache.entries["k"], kv.k), "v": put(cache.entries["v"], kv.v)}
        return Cache(entries, put(cache.positions, kv.at.positions))


def _shares(runs: WholeBlocks, length: int) -> jax.Array:
    """`[B, N, T]`: of each run's mean the share of each token."""
    share = runs.real / jnp.maximum(runs.real.sum(2, keepdims=True), 1)
    batch, count, _ = runs.index.shape
    nothing = jnp.zeros((batch, count, length), jnp.float32)
    row, run = jnp.arange(batch)[:, None, None], jnp.arange(count)[None, :, None]
    return nothing.at[row, run, runs.index].add(share)
