"""Text from a trained model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from plait.configs.domains import COLDEST, Part, Temperature, Vocabulary, check_leaves
from plait.data.landmarks import Landmarks
from plait.data.tokenizers.tokenizer import Tokenizer
from plait.kernels import Tokens
from plait.models.lm import LM
from plait.models.mixers.base import State
from plait.train.mesh import on_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn."""

    temperature: Temperature = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: Vocabulary | None = None
    """Draw among this many likeliest tokens."""
    top_p: Part | None = None
    """Draw among the likeliest tokens that together have this probability."""

    def __post_init__(self) -> None:
        check_leaves(self)
        if 0 < self.temperature < COLDEST:
            raise ValueError(f"temperature={self.temperature} must be 0 or at least {COLDEST:g}; 0 takes the likeliest token")

    def draw(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        """Tokens `[B]` int32 from `logits` `[B, V]` float32."""
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.top_p is not None and self.top_p < 1:
            ordered = jnp.sort(logits, axis=-1)[:, ::-1]
            p = jax.nn.softmax(ordered, axis=-1)
            kept = jnp.cumsum(p, axis=-1) - p < self.top_p  # the token that crosses the share is kept
            least = jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def generate_tokens(
    model: LM,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int,
    vocab_size: int,
    sampling: Sampling,
    seed: int = 0,
    mesh: Mesh | None = None,
    landmarks: Landmarks | None = None,
) -> np.ndarray:
    """Continuations `[B, num_tokens]` of token prompts, by prefill and then one token a step.

    Args:
        prompts: at least one token each; shorter ones are padded on the left.
        vocab_size: the tokenizer's; the embedding's further rows are never drawn.
        landmarks: put into prompts and continuations where the model was trained with them, and left out of what is returned.
        mesh: where the model lies, if not on one device; sequences and heads of the decode state are divided over it too.

    Raises:
        ValueError: no prompt, an empty one, or num_tokens below 1.
    """
    if not prompts or min(map(len, prompts)) == 0:
        raise ValueError("prompt is empty after tokenising; give at least one token to go on from")
    if num_tokens < 1:
        raise ValueError(f"num_tokens={num_tokens} must be at least 1")
    steps = num_tokens
    if landmarks is not None:
        prompts = [landmarks.into_text(prompt) for prompt in prompts]
        steps += -(-num_tokens // (landmarks.every - 1))  # as many as there can be
    width = -(-max(map(len, prompts)) // 64) * 64  # few distinct shapes to compile
    at, lengths = padded(prompts, width, len(prompts))
    keys = jax.random.split(jax.random.key(seed), steps)
    options = {"vocab_size": vocab_size, "sampling": sampling, "mesh": mesh, "landmarks": landmarks}
    out = np.asarray(_continue(model, at, lengths, keys, **options))
    return out if landmarks is None else np.stack([row[row != landmarks.token][:num_tokens] for row in out])


def padded(texts: Sequence[Sequence[int]], width: int, rows: int) -> tuple[Tokens, np.ndarray]:
    """Texts of at most `width` tokens that end where their row ends, `[rows, width]`, and their lengths `[rows]`; rows without one are
    padding."""
    ids, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    for row, text in enumerate(texts):
        lengths[row] = len(text)
        ids[row, width - len(text) :] = text
    start = (width - lengths)[:, None]
    column = np.arange(width, dtype=np.int32)[None, :]
    return Tokens(ids, (column >= start).astype(np.int32), np.maximum(column - start, 0).astype(np.int32)), lengths


@functools.partial(jax.jit, static_argnames=("vocab_size", "sampling", "mesh", "landmarks"))
def _continue(
    model: LM,
    at: Tokens,
    lengths: jax.Array,
    keys: jax.Array,
    *,
    vocab_size: int,
    sampling: Sampling,
    mesh: Mesh | None,
    landmarks: Landmarks | None,
) -> jax.Array:
    """One token `[B]` for each of the keys: `[B, N]`."""
    with contextlib.nullcontext() if mesh is None else on_mesh(mesh):
        batch_size, width = at.ids.shape
        logits, state = model.prefill(at, model.init_state(batch_size, width + len(keys)))
        return written(model, (logits, state, lengths), keys, vocab_size, sampling, landmarks)[1]


Place = tuple[jax.Array, State, jax.Array]
"""Where texts stand: logits `[B, V]` of what comes next, the decode state, and the position `[B]` of what comes next."""


def written(
    model: LM, place: Place, keys: jax.Array, vocab_size: int, sampling: Sampling, landmarks: Landmarks | None = None
) -> tuple[Place, jax.Array]:
    """One token `[B]` for each of N keys, after `place`, landmarks where they stand: where the texts stand then, and `[B, N]` (traceable)."""

    def body(place: Place, key: jax.Array) -> tuple[Place, jax.Array]:
        logits, state, position = place
        legal = jnp.arange(logits.shape[-1])[None, :] < vocab_size
        token = sampling.draw(jnp.where(legal, logits, -jnp.inf), key)
        if landmarks is not None:
            token = jnp.where((position + 1) % landmarks.every == 0, jnp.int32(landmarks.token), token)
        logits, state = model.step(Tokens(token[:, None], None, position[:, None]), state)
        return (logits, state, position + 1), token

    place, out = jax.lax.scan(body, place, keys)
    return place, out.T


def generate_text(
    model: LM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    num_tokens: int,
    sampling: Sampling,
    document_start: bool,
    seed: int = 0,
    mesh: Mesh | None = None,
    landmarks: Landmarks | None = None,
) -> list[str]:
    """Continuations of `prompts`, each cut at its end-of-text. `document_start` puts the start token the model was trained with first,
    `landmarks` those that it was trained with between.

    Raises:
        ValueError: a prompt is no text, or as `generate_tokens`.
    """
    for prompt in prompts:
        if any("\ud800" <= char <= "\udfff" for char in prompt):
            raise ValueError(f"prompt={prompt!r} is not UTF-8; give text")
    start = [tokenizer.bos_id] if document_start else []
    encoded = [[*start, *tokenizer.encode(prompt).tolist()] for prompt in prompts]
    texts = []
    out = generate_tokens(
        model,
        encoded,
        num_tokens=num_tokens,
        vocab_size=tokenizer.vocab_size,
        sampling=sampling,
        seed=seed,
        mesh=mesh,
        landmarks=landmarks,
    )
    for row in out.tolist():
        end = row.index(tokenizer.eos_id) if tokenizer.eos_id in row else len(row)
        texts.append(tokenizer.decode(row[:end]))
    return texts
