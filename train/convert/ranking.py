"""Which layers of softmax attention most need to stay what they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from plait.configs.domains import choices
from plait.configs.probe import ProbeConfig
from plait.kernels import Tokens
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.pattern import pattern_of
from plait.train.convert.options import By
from plait.train.convert.sample import ids_of, num_ids_of, pieces, rows_of
from plait.train.convert.students import STUDENTS
from plait.train.convert.weights import ConvertError
from plait.train.inspection.looking import looking
from plait.train.probes.base import Probes
from plait.train.run import Trained, opened

_QUERIES, _ROWS = 64, 8


@dataclasses.dataclass(frozen=True)
class Need:
    """How the need of a head for full attention is measured, in [0, 1], and that of its layer."""

    probe: str
    statistic: str
    of_head: Callable[[np.ndarray], np.ndarray]
    of_layer: Callable[[np.ndarray], Any]
    reads_text: bool
    """Or else random ids, repeated."""


NEEDS: dict[By, Need] = {
    "recall": Need("induction", "induction", lambda x: x, np.nanmax, reads_text=False),
    "far": Need("distance", "far_share", lambda x: x, np.nanmean, reads_text=True),
    "entropy": Need("entropy", "entropy_ratio", lambda x: 1 - x, np.nanmean, reads_text=True),
}
"""`recall`: weight on what followed the same token before, in random tokens that come twice (prefix matching, 2209.11895), of the strongest
head. `far`: weight on tokens at least a window back, which a window does not see, of the mean head. `entropy`: one less entropy over its
largest, of the mean head: spiky weights are what maps of linear attention cannot give (Hedgehog, 2402.04347)."""


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The needs of the layers of softmax attention."""

    by: By
    layers: dict[int, float]
    """By number, the neediest first."""
    heads: dict[int, list[float]]
    names: tuple[str, ...]
    """Of all layers, in the pattern."""

    def kept(self, count: int) -> list[int]:
        """The layers that need it most. Raises ConvertError where all would be kept or none."""
        if not 0 < count < len(self.layers):
            raise ConvertError(
                f"keep={count} of {len(self.layers)} layers of softmax attention; it must be at least 1 and leave one to change, use "
                f"{max(1, len(self.layers) // 4)}"
            )
        return sorted(list(self.layers)[:count])

    def pattern(self, count: int, student: str) -> str:
        """The pattern that keeps so many layers and makes the others students of a kind."""
        if student not in STUDENTS:
            raise ConvertError(
                f"student={student!r} cannot take the place of softmax attention; use one of {choices([*STUDENTS])}"
            )
        changed = self.layers.keys() - set(self.kept(count))
        return pattern_of([student if index in changed else name for index, name in enumerate(self.names)])


def rank(run: Path, by: By, *, text: Path | None, far: int, seed: int) -> Ranking:
    """The layers of the model in `run`, ranked.

    Args:
        text: of which pieces are read, as long as the run's rows.
        far: tokens back from which attention is far.
        seed: of what is drawn.

    Raises:
        ConvertError: nothing to rank, no text, or rows in which nothing is so far back.
    """
    trained, need = opened(run), NEEDS[by]
    model, length = trained.program.config.model, trained.program.config.data.seq_len
    softmax = [index for index, mixer in enumerate(model.layer_mixers) if type(mixer) is SoftmaxConfig]
    if len(softmax) < 2:
        raise ConvertError(
            f"{str(run)!r} has {len(softmax)} layers of plain softmax attention, and of two or more some can stay; it has "
            f"model.pattern={model.pattern!r}"
        )
    if need.reads_text and text is None:
        raise ConvertError(f"by={by} is measured on text; give --text FILE, or use --by recall")
    if by == "far" and far >= length:
        raise ConvertError(f"far={far} must be below the run's rows of {length} tokens; use {max(1, length // 8)}")
    values = _statistics(trained, need, None if text is None or not need.reads_text else ids_of(text, trained), far, seed)
    heads = {index: need.of_head(values[index]) for index in softmax}
    scores = {index: float(need.of_layer(one)) if np.isfinite(one).any() else -np.inf for index, one in heads.items()}
    if not np.isfinite([*scores.values()]).all():
        raise ConvertError(f"by={by} has no value in some layer, on rows of {length} tokens; use longer rows, or another measure")
    order = sorted(softmax, key=lambda index: (-scores[index], index))
    return Ranking(by, {i: scores[i] for i in order}, {i: [float(x) for x in heads[i]] for i in order}, model.layers)


def _statistics(trained: Trained, need: Need, text: np.ndarray | None, far: int, seed: int) -> Sequence[np.ndarray]:
    """Those of each layer, by head."""
    program = trained.program
    length = program.config.data.seq_len
    _, rows = rows_of(program.config, program.mesh, _ROWS)
    rng = np.random.default_rng(seed)
    if need.reads_text:
        ids = pieces(rng, (rows, length), num_ids_of(trained), text)
    else:
        ids = np.tile(pieces(rng, (rows, -(-length // 2)), num_ids_of(trained), None), 2)[:, :length]
    observer = Probes(ProbeConfig(only=need.probe, rows=_QUERIES, sequences=rows, far=far))
    _, layers = looking(trained, observer)(Tokens(jnp.asarray(ids, jnp.int32)))
    return [np.asarray(layer.get(need.statistic, np.full(1, np.nan))) for layer in observer.across(layers)]
