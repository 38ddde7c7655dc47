"""The calls that are tried: ops through their public functions, with inputs like those of a model at work."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from plait import kernels
from plait.kernels import ChunkMask, Mask, PowerMask, SelectedBlocks, Tokens
from plait.train.verify.rooflines import TAPS, Shape

Array = jax.Array
Arrays = dict[str, Array]


class Drawn(NamedTuple):
    """How an argument is drawn: its shape, and what it stands for."""

    shape: tuple[int, ...]
    what: Literal[
        "values",
        "unit",
        "log_decay",
        "strength",
        "weight",
        "state",
        "words",
        "segments",
        "long segments",
        "active",
        "blocks",
        "tokens",
        "whole",
    ] = "values"


_WHOLE = ("words", "segments", "long segments", "active", "blocks", "tokens")
_FLOAT32 = ("log_decay", "state")
_ENDS = (0.78, 0.95)
"""Where long documents end, of a row."""
BLOCK = 64
"""Tokens a selected block."""
TOP_K = 200
"""Tokens that are chosen one by one."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One op with one set of options."""

    op: str
    arguments: Callable[[Shape], dict[str, Drawn]]
    run: Callable[[Arrays, str], dict[str, Array]]
    """(arguments, implementation) to results by name, the main one first."""

    learns: bool = True
    """Whether it has gradients."""

    unordered: tuple[str, ...] = ()
    """Implementations that add gradients up in no fixed order: their bits may differ from call to call."""

    def shapes(self, shape: Shape, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of each argument."""
        return {name: jax.ShapeDtypeStruct(drawn.shape, _dtype(drawn, dtype)) for name, drawn in self.arguments(shape).items()}

    def draw(self, shape: Shape, dtype: str, seed: int = 0) -> Arrays:
        """Random arguments, rounded to `dtype`, on the default device."""
        rng = np.random.default_rng(seed)
        return {
            name: jnp.asarray(_values(rng, drawn, shape), _dtype(drawn, dtype)) for name, drawn in self.arguments(shape).items()
        }


def differentiable(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those with gradients."""
    return {name: x for name, x in arguments.items() if jnp.issubdtype(x.dtype, jnp.floating)}


def _dtype(drawn: Drawn, dtype: str) -> Any:
    if drawn.what in _WHOLE:
        return bool if drawn.what == "active" else jnp.int32
    return "float32" if drawn.what in _FLOAT32 else dtype


def _values(rng: np.random.Generator, drawn: Drawn, shape: Shape) -> np.ndarray:
    match drawn.what:
        case "words":
            return rng.integers(0, shape.vocabulary, drawn.shape)
        case "active":
            return rng.random(drawn.shape) < 0.75
        case "segments":
            return _documents(drawn.shape)
        case "long segments":
            return np.broadcast_to(
                np.searchsorted(_ENDS, np.arange(drawn.shape[1]) / drawn.shape[1], side="right") + 1, drawn.shape
            )
        case "blocks":
            return _selected(rng, drawn.shape)
        case "tokens":
            return _chosen(rng, drawn.shape)
    x = rng.standard_normal(drawn.shape)
    match drawn.what:
        case "unit":
            return x / np.linalg.norm(x, axis=-1, keepdims=True)
        case "log_decay":
            return -np.exp(x - 3)
        case "strength":
            return 1 / (1 + np.exp(-x))
        case "weight":
            return x / math.sqrt(drawn.shape[0])
        case "whole":
            return np.rint(x)
    return x


def _documents(shape: tuple[int, ...]) -> np.ndarray:
    """Segment ids: documents of several lengths with padding between and after them; in the second row, padding first."""
    batch, length = shape
    ids = np.zeros(shape, np.int32)
    for row in range(batch):
        borders = [0, length // 7, length // 7 + 3, length // 2 + 5, length - length // 9]
        for number, (start, stop) in enumerate(itertools.pairwise(borders), start=1):
            ids[row, start + 2 * (row % 2) : stop] = number
    return ids


def _selected(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of blocks up to each token's own, its own among them."""
    own = (np.arange(shape[1]) // BLOCK)[None, :, None, None]
    numbers = rng.integers(0, own + 1, shape)
    numbers[..., :1] = own
    return numbers


def _chosen(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of tokens of the sequence, each once, of which those in the future are hidden and a few are none."""
    length, count = shape[1], shape[3]
    spread = np.arange(count) * (length // count)
    numbers = (rng.integers(0, length, (*shape[:3], 1)) + spread) % length
    return np.where(rng.random(shape) < 0.1, -1, numbers)


def _attention(s: Shape, *more: tuple[str, Drawn]) -> dict[str, Drawn]:
    keys = Drawn((s.batch, s.length, s.kv_heads, s.dim))
    return {"q": Drawn((s.batch, s.length, s.heads, s.dim)), "k": keys, "v": keys} | dict(more)


def _attend(x: Arrays, implementation: str, *, mask: Mask | None = None, stats: bool = False, **options: Any) -> dict[str, Array]:
    options |= {name: x[name] for name in ("sinks",) if name in x}
    if "blocks" in x:
        options["selected"] = SelectedBlocks(indices=x["blocks"], block_size=BLOCK, num_blocks=-(-x["q"].shape[1] // BLOCK))
    found = kernels.attention(
        x["q"], x["k"], x["v"], mask=mask or Mask(), at=_at(x), return_stats=stats, implementation=implementation, **options
    )
    return {"o": found[0], **found[1]._asdict()} if stats else {"o": found}


def _latents(s: Shape) -> dict[str, Drawn]:
    """Queries of all heads and the one head of keys, whose channels are the values."""
    chosen = Drawn((s.batch, s.length, 1, min(s.length, TOP_K)), "tokens")
    return {"q": Drawn((s.batch, s.length, s.heads, s.dim)), "k": Drawn((s.batch, s.length, 1, s.dim)), "tokens": chosen}


def _gather(x: Arrays, implementation: str) -> dict[str, Array]:
    length, dim = x["q"].shape[1::2]
    selected = SelectedBlocks(indices=x["tokens"], block_size=1, num_blocks=length)
    options = {"mask": Mask(), "value_dim": dim, "selected": selected, "return_stats": True}
    o, rows = kernels.attention(x["q"], x["k"], implementation=implementation, **options)
    return {"o": o, **rows._asdict()}


def _indexed(s: Shape) -> dict[str, Drawn]:
    wide = (s.batch, s.length, s.heads, s.dim)
    index = {"index_q": Drawn(wide), "index_k": Drawn((s.batch, s.length, s.dim)), "weights": Drawn(wide[:3])}
    return index | _latents(s)


def _diverge(x: Arrays, implementation: str) -> dict[str, Array]:
    selected = SelectedBlocks(indices=x["tokens"], block_size=1, num_blocks=x["q"].shape[1])
    options: dict[str, Any] = {"mask": Mask(), "selected": selected, "implementation": implementation}
    _, lse = kernels.attention(x["q"], x["k"], value_dim=x["k"].shape[3], return_lse=True, **options)
    arrays = [x[name] for name in ("index_q", "index_k", "weights", "q", "k")]
    known = {"divergence": None, "divergence_after_attention": lse}
    return {name: kernels.index_divergence(*arrays, lse=lse, **options) for name, lse in known.items()}


def _choice(s: Shape, *more: tuple[str, Drawn]) -> dict[str, Drawn]:
    """Of whole numbers, whose sums are the same in any order."""
    heads = {"q": s.heads, "k": s.kv_heads}
    return {name: Drawn((s.batch, s.length, n, s.dim), "whole") for name, n in heads.items()} | dict(more)


def _choose(x: Arrays, implementation: str, **options: Any) -> dict[str, Array]:
    """The chosen blocks in order, as numbers."""
    at = (_at(x) or Tokens()).placed(*x["q"].shape[:2])
    runs = kernels.whole_blocks(at, options.get("stride", BLOCK), options.get("span"))
    chosen = kernels.topk_blocks(
        x["q"],
        x["k"][:, : runs.at.positions.shape[1]],
        blocks_at=runs.at,
        at=at,
        top_k=3,
        block_size=BLOCK,
        num_blocks=-(-x["q"].shape[1] // BLOCK),
        by_group=True,
        implementation=implementation,
        **options,
    )
    return {"blocks": jnp.sort(chosen.indices, axis=-1).astype(jnp.float32)}


def _scored(s: Shape) -> dict[str, Drawn]:
    """Of whole numbers too: many scores of tokens are equal."""
    wide = (s.batch, s.length, s.heads, s.dim)
    return {"q": Drawn(wide, "whole"), "k": Drawn((*wide[:2], 1, s.dim), "whole"), "weights": Drawn(wide[:3], "whole")} | dict(
        [_segments(s)]
    )


def _choose_tokens(x: Arrays, implementation: str) -> dict[str, Array]:
    """The chosen tokens in order, as numbers."""
    batch, length = x["q"].shape[:2]
    at = (_at(x) or Tokens()).placed(batch, length)
    chosen = kernels.topk_blocks(
        x["q"],
        x["k"],
        weights=x["weights"],
        blocks_at=at,
        at=at,
        top_k=min(length, TOP_K),
        block_size=1,
        num_blocks=length,
        num_local=0,
        by_group=True,
        implementation=implementation,
    )
    return {"tokens": jnp.sort(chosen.indices, axis=-1).astype(jnp.float32)}


def _at(x: Arrays) -> Tokens | None:
    return Tokens(segment_ids=x["segments"]) if "segments" in x else None


def _masses(x: Arrays, implementation: str) -> dict[str, Array]:
    lse = kernels.attention(x["q"], x["k"], x["v"], mask=Mask(), return_stats=True, implementation=implementation)[1].lse
    return {"mass": kernels.column_mass(x["q"], x["k"], lse, mask=Mask(), implementation=implementation)}


def _routed(x: Arrays, implementation: str) -> dict[str, Array]:
    arrays = (x[name] for name in ("q", "k", "v", "active"))
    return {"o": kernels.routed_attention(*arrays, mask=Mask(), at=_at(x), implementation=implementation)}


def _recurrence(s: Shape, *, decay: str | None, beta: bool = False, documents: bool = False) -> dict[str, Drawn]:
    wide, heads = (s.batch, s.length, s.kv_heads, s.dim), (s.batch, s.length, s.heads)
    named = {"q": Drawn(wide, "unit"), "k": Drawn(wide, "unit"), "v": Drawn((*heads, s.dim))}
    if decay is not None:
        named["g"] = Drawn(heads if decay == "head" else (*heads, s.dim), "log_decay")
    if beta:
        named["beta"] = Drawn(heads, "strength")
    if documents:
        named["initial_state"] = Drawn((s.batch, s.heads, s.dim, s.dim), "state")
        named["segments"] = Drawn((s.batch, s.length), "segments")
    return named


def _recur(x: Arrays, implementation: str) -> dict[str, Array]:
    options: dict[str, Any] = {"initial_state": x.get("initial_state"), "at": _at(x), "implementation": implementation}
    if "beta" in x:
        o, state = kernels.delta_rule(x["q"], x["k"], x["v"], x.get("g"), x["beta"], l2_norm_eps=1e-6, **options)
    else:
        o, state = kernels.decay(x["q"], x["k"], x["v"], x["g"], **options)
    return {"o": o, "state": state}


def _conv(x: Arrays, implementation: str) -> dict[str, Array]:
    y, state = kernels.short_conv(x["x"], x["weight"], at=_at(x), implementation=implementation)
    return {"y": y, "state": state}


def _nll(x: Arrays, implementation: str) -> dict[str, Array]:
    nll, lse = kernels.cross_entropy(x["hidden"], x["weight"], x["targets"], implementation=implementation)
    return {"nll": nll, "lse": lse}


def _words(s: Shape) -> dict[str, Drawn]:
    width = s.heads * s.dim
    return {
        "hidden": Drawn((s.batch, s.length, width)),
        "weight": Drawn((width, s.vocabulary), "weight"),
        "targets": Drawn((s.batch, s.length), "words"),
    }


def _channels(s: Shape, *more: tuple[str, Drawn]) -> dict[str, Drawn]:
    width = s.heads * s.dim
    return {"x": Drawn((s.batch, s.length, width)), "weight": Drawn((TAPS, width), "weight")} | dict(more)


def _segments(s: Shape) -> tuple[str, Drawn]:
    return "segments", Drawn((s.batch, s.length), "segments")


def _long(s: Shape) -> dict[str, Drawn]:
    return _attention(s, ("segments", Drawn((s.batch, s.length), "long segments")))


def _packed(s: Shape) -> dict[str, Drawn]:
    return _attention(s, _segments(s))


_RECURRENCES: dict[str, dict[str, Any]] = {
    "scalar_decay": {"decay": "head"},
    "vector_decay": {"decay": "channel"},
    "deltanet": {"decay": None, "beta": True},
    "gated_deltanet": {"decay": "head", "beta": True},
    "kda": {"decay": "channel", "beta": True},
}

TIMED: dict[str, Trial] = {
    "attention": Trial(op="attention", arguments=_attention, run=_attend),
    **{
        name: Trial(op="delta_rule" if "beta" in options else "decay", arguments=partial(_recurrence, **options), run=_recur)
        for name, options in _RECURRENCES.items()
    },
    "short_conv": Trial(op="short_conv", arguments=_channels, run=_conv),
    "cross_entropy": Trial(op="cross_entropy", arguments=_words, run=_nll),
}
"""Those whose time is taken too, with a roofline each (`rooflines.least`)."""

TRIALS: dict[str, Trial] = {
    **TIMED,
    "attention, statistics": Trial(op="attention", arguments=_packed, run=partial(_attend, stats=True)),
    "attention, window with sink tokens": Trial(
        op="attention", arguments=_packed, run=partial(_attend, mask=Mask(window_size=96, num_sink_tokens=4))
    ),
    "attention, both ways": Trial(op="attention", arguments=_packed, run=partial(_attend, mask=Mask(causal=False))),
    "attention, PowerAttention": Trial(op="attention", arguments=_packed, run=partial(_attend, mask=PowerMask(block_size=64))),
    "attention, chunks": Trial(op="attention", arguments=_packed, run=partial(_attend, mask=ChunkMask(chunk_size=96, shift=48))),
    "attention, sigmoid": Trial(op="attention", arguments=_packed, run=partial(_attend, normalizer="sigmoid", sigmoid_bias=-5.0)),
    "attention, soft cap and sink logits": Trial(
        op="attention",
        arguments=lambda s: _attention(s, _segments(s), ("sinks", Drawn((s.heads,)))),
        run=partial(_attend, logit_soft_cap=20.0),
    ),
    "attention, selected blocks": Trial(
        op="attention",
        arguments=lambda s: _attention(s, ("blocks", Drawn((s.batch, s.length, s.kv_heads, 4), "blocks"))),
        run=_attend,
    ),
    "attention, chosen tokens": Trial(op="attention", arguments=_latents, run=_gather, unordered=("pallas_gpu",)),
    "routed_attention": Trial(
        op="routed_attention",
        arguments=lambda s: _attention(s, _segments(s), ("active", Drawn((s.batch, s.length, s.heads), "active"))),
        run=_routed,
    ),
    "topk_blocks": Trial(op="topk_blocks", arguments=lambda s: _choice(s, _segments(s)), run=_choose, learns=False),
    "topk_blocks, runs": Trial(
        op="topk_blocks", arguments=_choice, run=partial(_choose, scale=0.125, stride=16, span=32), learns=False
    ),
    "topk_blocks, tokens": Trial(op="topk_blocks", arguments=_scored, run=_choose_tokens, learns=False),
    "index_divergence": Trial(op="index_divergence", arguments=_indexed, run=_diverge),
    "column_mass": Trial(op="column_mass", arguments=_attention, run=_masses, learns=False),
    **{
        f"{name}, documents": Trial(op=TIMED[name].op, arguments=partial(_recurrence, documents=True, **options), run=_recur)
        for name, options in _RECURRENCES.items()
    },
    "short_conv, documents": Trial(op="short_conv", arguments=lambda s: _channels(s, _segments(s)), run=_conv),
}
"""Every call that is tried, by name."""

LONG: dict[str, Trial] = {
    "attention, several tiles": Trial(op="attention", arguments=_long, run=partial(_attend, stats=True)),
    "attention, window, several tiles": Trial(op="attention", arguments=_long, run=partial(_attend, mask=Mask(window_size=1152))),
    "attention, PowerAttention, several tiles": Trial(
        op="attention", arguments=_long, run=partial(_attend, mask=PowerMask(block_size=1024))
    ),
    **{
        f"{name}, several blocks": Trial(op=TIMED[name].op, arguments=partial(_recurrence, **options), run=_recur)
        for name, options in _RECURRENCES.items()
    },
}
"""Calls of rows that are longer than what a kernel does at once, tried on an accelerator."""
