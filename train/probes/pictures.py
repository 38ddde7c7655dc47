"""Attention pictures: what every head of every layer looks at in one held-out text."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from plait.data.batch import Batch
from plait.kernels import Tokens
from plait.models.looks.look import Look
from plait.train.pods.hosts.together import first
from plait.train.probes.collect import padded_layers
from plait.train.run_folder.probe_files import write_attention
from plait.train.state import Arrays, Blueprint

LENGTH = 64
"""Tokens of a picture at most."""


class Pictures:
    """An observer of every row of one sequence that keeps the attention itself."""

    whole = False

    def pick_sequences(self, batch_size: int) -> slice:
        return slice(0, 1)

    def pick_rows(self, length: int) -> jax.Array:
        return jnp.arange(length, dtype=jnp.int32)

    def measure(self, looks: tuple[Look, ...]) -> dict[str, jax.Array]:
        """`attention` `[H, T, T]`, NaN for heads without."""
        maps = [look.implied for look in looks]
        length = looks[0].x.shape[1]
        heads = [0 if look.mixer is None else look.mixer.num_heads for look in looks]
        if all(one is None for one in maps):
            return {}
        blank = [jnp.full((n, length, length), jnp.nan) for n in heads]
        return {"attention": jnp.concatenate([b if one is None else one[0] for one, b in zip(maps, blank, strict=True)])}


def write_pictures(
    run: Path,
    step: int,
    blueprint: Blueprint,
    mesh: Mesh,
    params: Arrays,
    buffers: Arrays,
    batch: Batch,
    strings: Callable[[Sequence[int]], list[str]],
) -> None:
    """Writes the implied attention of all layers over the longest document piece of `batch`, at most 64 tokens of it,
    which `strings` names.

    Every host computes it, on the same whole `batch`; host 0 writes.
    """
    row, start, length = _longest_piece(np.asarray(batch.segment_ids))
    length = min(length, LENGTH)
    tokens = np.asarray(batch.tokens)[row, start : start + length]

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def attend(params: Arrays, buffers: Arrays, tokens: jax.Array) -> list:
        _, extras = blueprint.build(params, buffers).hidden(Tokens(tokens), observer=Pictures())
        return [one.statistics.get("attention") for one in extras]

    maps = [None if a is None else np.asarray(a, np.float32) for a in attend(params, buffers, tokens[None])]
    if all(heads is None for heads in maps) or not first():
        return
    widest = max(heads.shape[0] for heads in maps if heads is not None)
    write_attention(run, step, padded_layers(maps, (widest, length, length)), strings(tokens.tolist()))


def _longest_piece(segment_ids: np.ndarray) -> tuple[int, int, int]:
    """`(row, start, length)` of the longest run of one non-zero segment."""
    best = (0, 0, 1)
    for row, ids in enumerate(segment_ids):
        borders = np.flatnonzero(np.diff(ids)) + 1
        starts = np.concatenate([[0], borders])
        lengths = np.diff(np.concatenate([starts, [len(ids)]]))
        for start, length in zip(starts, lengths, strict=True):
            if ids[start] > 0 and length > best[2]:
                best = (row, int(start), int(length))
    return best
