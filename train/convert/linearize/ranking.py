"""Which layers and heads of softmax attention most need to stay what they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from plait.configs.domains import choices
from plait.configs.probe import ProbeConfig
from plait.kernels import Tokens
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.pattern import pattern_of
from plait.train.convert.linearize.gating import trained_gates
from plait.train.convert.linearize.students import STUDENTS
from plait.train.convert.options import By, GatesConfig
from plait.train.convert.sample import ids_of, num_ids_of, pieces, rows_of
from plait.train.convert.weights import ConvertError
from plait.train.inspection.heads import Head
from plait.train.inspection.looking import looking
from plait.train.probes.base import Probes
from plait.train.run import Trained, opened

_QUERIES, _ROWS = 64, 8


@dataclasses.dataclass(frozen=True)
class Asked:
    """Of what the needs are to be measured, and how."""

    trained: Trained
    layers: Sequence[int]
    """Of softmax attention."""
    text: np.ndarray | None
    """Ids."""
    far: int
    seed: int
    gates: GatesConfig


@dataclasses.dataclass(frozen=True)
class Need:
    """How the need of a head for full attention is measured, in [0, 1], and that of its layer."""

    measure: Callable[[Asked], Mapping[int, np.ndarray]]
    """Those of the heads of layers, NaN where there is none."""
    of_layer: Callable[[np.ndarray], Any]
    text: Literal["must", "may", "no"]
    """Whether a text is read."""


def _probed(
    probe: str, statistic: str, of_head: Callable[[np.ndarray], np.ndarray] = lambda x: x, *, repeats: bool = False
) -> Callable[[Asked], Mapping[int, np.ndarray]]:
    """By what a probe tells, on pieces of the text or on random ids that come twice."""

    def measure(asked: Asked) -> Mapping[int, np.ndarray]:
        program = asked.trained.program
        length, num_ids = program.config.data.seq_len, num_ids_of(asked.trained)
        _, rows = rows_of(program.config, program.mesh, _ROWS)
        rng = np.random.default_rng(asked.seed)
        if repeats:
            ids = np.tile(pieces(rng, (rows, -(-length // 2)), num_ids, None), 2)[:, :length]
        else:
            ids = pieces(rng, (rows, length), num_ids, asked.text)
        observer = Probes(ProbeConfig(only=probe, rows=_QUERIES, sequences=rows, far=asked.far))
        _, layers = looking(asked.trained, observer)(Tokens(jnp.asarray(ids, jnp.int32)))
        found = observer.across(layers)
        return {index: of_head(np.asarray(found[index].get(statistic, np.full(1, np.nan)))) for index in asked.layers}

    return measure


def _gated(asked: Asked) -> Mapping[int, np.ndarray]:
    return trained_gates(asked.trained, asked.layers, asked.gates, text=asked.text, window_size=asked.far, seed=asked.seed)


NEEDS: dict[By, Need] = {
    "recall": Need(_probed("induction", "induction", repeats=True), np.nanmax, "no"),
    "far": Need(_probed("distance", "far_share"), np.nanmean, "must"),
    "entropy": Need(_probed("entropy", "entropy_ratio", lambda x: 1 - x), np.nanmean, "must"),
    "gates": Need(_gated, np.nanmean, "may"),
}
"""`recall`: weight on what followed the same token before, in random tokens that come twice (prefix matching, 2209.11895), of the strongest
head. `far`: weight on tokens at least a window back, which a window does not see, of the mean head. `entropy`: one less entropy over its
largest, of the mean head: spiky weights are what maps of linear attention cannot give (Hedgehog, 2402.04347). `gates`: how far a trained
gate between all tokens and a window stays open (DuoAttention, 2410.10819), of the mean head."""


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The needs of the layers of softmax attention."""

    by: By
    layers: dict[int, float]
    """By number, the neediest first."""
    heads: dict[int, list[float]]
    names: tuple[str, ...]
    """Of all layers, in the pattern."""
    groups: dict[int, int]
    """Heads of each layer that share one key head, and can only stay together."""

    def kept(self, count: int) -> list[int]:
        """The layers that need it most. Raises ConvertError where all would be kept or none."""
        _check_some("keep", count, len(self.layers), "layers")
        return sorted(list(self.layers)[:count])

    def kept_heads(self, count: int) -> tuple[list[int], list[Head]]:
        """The layers of which all heads are among the `count` that need it most, and such heads of other layers. Heads that share keys stay
        together, by the need of the strongest; those that would be too many do not. Raises ConvertError where all would be kept or none."""
        _check_some("keep_heads", count, sum(map(len, self.heads.values())), "heads")
        chosen: dict[int, list[int]] = {}
        for layer, group, _ in sorted(self._groups(), key=lambda one: (-one[2], one[0], one[1][0])):
            if len(group) <= count:
                count -= len(group)
                chosen.setdefault(layer, []).extend(group)
        if not chosen:
            least = min(self.groups.values())
            raise ConvertError(
                f"keep_heads={count} must be at least {least}, heads that share their keys and stay together; use {least}"
            )
        whole = {layer for layer, heads in chosen.items() if len(heads) == len(self.heads[layer])}
        return sorted(whole), sorted((layer, head) for layer in chosen.keys() - whole for head in chosen[layer])

    def _groups(self) -> Iterator[tuple[int, range, float]]:
        """Layer, heads that share keys, and the need of the strongest."""
        for layer, heads in self.heads.items():
            for first in range(0, len(heads), self.groups[layer]):
                group = range(first, first + self.groups[layer])
                yield layer, group, max(heads[head] if np.isfinite(heads[head]) else -np.inf for head in group)

    def pattern(self, kept: Collection[int], student: str) -> str:
        """The pattern that keeps some layers and makes the others students of a kind."""
        if student not in STUDENTS:
            raise ConvertError(
                f"student={student!r} cannot take the place of softmax attention; use one of {choices([*STUDENTS])}"
            )
        changed = self.layers.keys() - {*kept}
        return pattern_of([student if index in changed else name for index, name in enumerate(self.names)])


def _check_some(option: str, count: int, total: int, what: str) -> None:
    if not 0 < count < total:
        raise ConvertError(
            f"{option}={count} of {total} {what} of softmax attention; it must be at least 1 and leave one to change, use {max(1, total // 4)}"
        )


def rank(run: Path, by: By, *, text: Path | None, far: int, seed: int, gates: GatesConfig) -> Ranking:
    """The layers of the model in `run`, ranked.

    Args:
        text: of which pieces are read, as long as the run's rows.
        far: tokens back from which attention is far, and that a window has from which gates keep heads.
        seed: of what is drawn.
        gates: how they are trained.

    Raises:
        ConvertError: nothing to rank, no text, or rows in which nothing is so far back.
    """
    need = NEEDS[by]
    if need.text == "must" and text is None:
        raise ConvertError(f"by={by} is measured on text; give --text FILE, or use --by recall")
    if need.text == "no" and text is not None:
        raise ConvertError(
            f"by={by} reads random ids and no text={str(text)!r}; leave --text out, or use --by gates, far or entropy"
        )
    if by != "gates" and gates != GatesConfig():
        raise ConvertError(f"by={by} trains no gates; leave --gates.* out, or use --by gates")
    trained = opened(run)
    model, length = trained.program.config.model, trained.program.config.data.seq_len
    configs = {index: mixer for index, mixer in enumerate(model.layer_mixers) if type(mixer) is SoftmaxConfig}
    if len(configs) < 2:
        raise ConvertError(
            f"{str(run)!r} has {len(configs)} layers of plain softmax attention, and of two or more some can stay; it has "
            f"model.pattern={model.pattern!r}"
        )
    if by in ("far", "gates") and far >= length:
        raise ConvertError(f"far={far} must be below the run's rows of {length} tokens; use {max(1, length // 8)}")
    heads = need.measure(Asked(trained, [*configs], None if text is None else ids_of(text, trained), far, seed, gates))
    scores = {index: float(need.of_layer(one)) if np.isfinite(one).any() else -np.inf for index, one in heads.items()}
    if not np.isfinite([*scores.values()]).all():
        raise ConvertError(f"by={by} has no value in some layer, on rows of {length} tokens; use longer rows, or another measure")
    order = sorted(configs, key=lambda index: (-scores[index], index))
    groups = {
        index: num_heads // num_kv_heads for index in order for num_heads, num_kv_heads in [configs[index].heads(model.d_model)]
    }
    return Ranking(by, {i: scores[i] for i in order}, {i: [float(x) for x in heads[i]] for i in order}, model.layers, groups)
