"""Needles in a text: whether the model finds one again, and which heads copy it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from plait.configs.components import Config
from plait.configs.domains import Length, Rows, Whole
from plait.kernels import Tokens
from plait.models.lm import LM
from plait.models.looks.look import Look
from plait.train.convert.sample import pieces, rows_of
from plait.train.inspection.heads import InspectError
from plait.train.inspection.looking import Kept, looking
from plait.train.probes.means import weights
from plait.train.probes.statistic import Panel, Statistic
from plait.train.run import Trained

RETRIEVAL = 0.1
"""Score from which a head is called a retrieval head. Source: Retrieval Head (2404.15574)."""
_FOUND = 0.5
"""Share of the answer that must be right for a prompt to count. Source: the same, of ROUGE-1 recall."""

STATISTIC = Statistic(
    name="retrieval",
    per="head",
    unit="share",
    meaning="retrieval score: share of a needle's answer that the head copies, looking most at the very token that comes next, in the needle",
    panel=Panel(title="Retrieval score", section="Retrieval heads", map=True, most=True, limits=(0, 1)),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleConfig(Config):
    """Tokens hidden in pieces of the text, and asked for at their end."""

    path = "needle"
    prompts: Rows = 16
    """Needles, at depths spread evenly over their pieces."""
    length: Length | None = None
    """Tokens of a prompt; by default those of a row, for which a shorter text is repeated."""
    cue: Annotated[int, Whole(1, 1024)] = 4
    """First tokens of a needle, which are repeated at the end,"""
    answer: Annotated[int, Whole(1, 1024)] = 8
    """and those after them, which the model is to say."""


@dataclasses.dataclass(frozen=True)
class Needles:
    """Prompts `hay needle hay cue answer`, of which all have their cue and answer at the same place."""

    ids: np.ndarray
    """int32 `[P, T]`."""
    starts: np.ndarray
    """int32 `[P]`: where the needles begin."""
    size: int
    """Tokens of a needle."""
    answer: int
    """Tokens of its answer, the last of the prompt too."""

    @property
    def rows(self) -> np.ndarray:
        """The positions from which the answer is said."""
        length = self.ids.shape[1]
        return np.arange(length - self.answer - 1, length - 1, dtype=np.int32)


def needles_of(trained: Trained, text: np.ndarray, config: NeedleConfig, length: int, start: int | None, seed: int) -> Needles:
    """Needles of tokens drawn from all those of the text, each once, so that nothing but the needle says what comes after its cue.

    Args:
        length: tokens of a prompt.
        start: the token that a document begins with, where it has one.

    Raises:
        InspectError: the text has too few different tokens, or the prompts too few for anything but needles.
    """
    size, first = config.cue + config.answer, int(start is not None)
    hay = length - first - 2 * size
    if hay < 1:
        raise InspectError(
            f"needle.length={length}{', as many as a row has,' if config.length is None else ''} must leave a piece of text beside a needle of "
            f"{size} tokens and itself again; use {2 * size + 65} or more, or smaller needle.cue and needle.answer"
        )
    own = np.unique(text)
    if len(own) < size:
        raise InspectError(
            f"text has {len(own)} different tokens, and a needle has needle.cue + needle.answer = {size}; use smaller ones, or more text"
        )
    rng = np.random.default_rng(seed)
    _, count = rows_of(trained.program.config, trained.program.mesh, config.prompts)
    hays = pieces(rng, (count, hay), 0, text)
    depths = ((np.arange(count) + 0.5) * (hay + 1) / count).astype(np.int32)
    ids = []
    for piece, depth in zip(hays, depths, strict=True):
        needle = rng.choice(own, size, replace=False).astype(np.int32)
        ids.append(np.concatenate([piece[:depth], needle, piece[depth:], needle]))
    rows = np.stack(ids)
    if start is not None:
        rows = np.concatenate([np.full((count, 1), start, np.int32), rows], axis=1)
    return Needles(rows, depths + first, size, config.answer)


@dataclasses.dataclass(frozen=True)
class Copying:
    """An observer of the rows from which answers are said: `hits` `[H, P]`, the share of answer tokens that a head copies. It does where its
    largest weight is on a token of the needle, and that is the token that comes next."""

    needles: Needles
    whole = False

    def pick_sequences(self, batch_size: int) -> slice:
        return slice(None)

    def pick_rows(self, length: int) -> jax.Array:
        return jnp.asarray(self.needles.rows)

    def measure(self, looks: tuple[Look, ...]) -> dict[str, jax.Array]:
        count = len(self.needles.ids)
        blank = lambda look: jnp.full((0 if look.mixer is None else look.mixer.num_heads, count), jnp.nan)
        return {"hits": jnp.concatenate([blank(one) if one.implied is None else self._hits(one.implied) for one in looks])}

    def _hits(self, implied: jax.Array) -> jax.Array:
        needles, ids = self.needles, jnp.asarray(self.needles.ids)
        top = jnp.argmax(weights(implied), axis=-1)  # [P, H, R]
        start = jnp.asarray(needles.starts)[:, None, None]
        inside = (top >= start) & (top < start + needles.size)
        said = jnp.take_along_axis(ids[:, None], top.reshape(len(ids), 1, -1), axis=-1).reshape(top.shape)
        return (inside & (said == ids[:, None, needles.rows + 1])).mean(-1).T


TITLES = ("needle tokens recalled", "whole needles", "retrieval heads")


@dataclasses.dataclass(frozen=True)
class Recall:
    """How a model does on needles."""

    tokens: float
    """Share of answer tokens that are the likeliest after what is before them."""
    whole: float
    """Share of needles whose answer is right to its end: what greedy decoding says."""
    scores: list[np.ndarray]
    """Retrieval score of the heads of each layer, float `[H]`; NaN where unknown: no weights, or no needle found."""

    @property
    def found(self) -> int | None:
        """Retrieval heads; None where nothing was retrieved."""
        told = np.concatenate(self.scores)
        return int((told >= RETRIEVAL).sum()) if np.isfinite(told).any() else None

    @property
    def cells(self) -> list[str]:
        """As tables show it, under `TITLES`."""
        return [f"{self.tokens:.1%}", f"{self.whole:.1%}", "–" if self.found is None else str(self.found)]

    def best(self, among: list[tuple[int, int]], count: int) -> tuple[tuple[int, int], ...]:
        """So many heads with the highest scores above 0, or fewer where there are fewer."""
        told = [(self.scores[layer][head], layer, head) for layer, head in among if self.scores[layer][head] > 0]
        ranked = sorted(told, key=lambda one: (-one[0], one[1], one[2]))
        return tuple((layer, head) for _, layer, head in ranked[:count])


def recalling(trained: Trained, needles: Needles) -> Callable[[Kept], Recall]:
    """What makes the recall of the model with some heads kept."""

    def likeliest(model: LM, hidden: jax.Array) -> jax.Array:
        return jnp.argmax(model.logits(hidden[:, needles.rows]), axis=-1)

    recall = looking(trained, Copying(needles), likeliest)

    def of(kept: Kept) -> Recall:
        said, layers = recall(Tokens(jnp.asarray(needles.ids)), kept)
        right = np.asarray(said) == needles.ids[:, needles.rows + 1]
        found = right.mean(1) > _FOUND
        hits = [np.asarray(layer["hits"], np.float64) for layer in layers]
        scores = [one[:, found].mean(1) if found.any() else np.full(len(one), np.nan) for one in hits]
        return Recall(float(right.mean()), float(right.all(1).mean()), scores)

    return of
