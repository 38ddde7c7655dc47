"""ListOps: nested lists of digits under operators, of which the value is asked for at the end.

    tokens    [MAX 2 9 [MIN 4 7 ] 0 ]  =  (filled up with =)
    targets     .  . .   .  . . . . .  9

Ids 0 to 9 are digits, then come the operators [MIN, [MAX, [MED (the median, cut to a whole number) and [SM (the sum modulo 10), then ]
and =. A tree grows as published: a node is a list one time in four, and a digit at the largest depth. Trees whose length is not
between the bounds are drawn again.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, NamedTuple

import numpy as np

from plait.configs.domains import Whole
from plait.data.config import DataConfig
from plait.data.splitmix import GAMMA, mix
from plait.data.tasks.base import TASKS
from plait.data.tasks.draws import Draws
from plait.data.tasks.generated import NOT_ASKED, GeneratedTask

MIN, MAX, MED, SUM, CLOSE, ASK = range(10, 16)
LIST_SHARE = 0.25
ATTEMPTS = 8
RAREST = 0.01
"""Share of the trees below which those of the lengths asked for are too rare to wait for."""


class Level(NamedTuple):
    """The nodes of one depth of some trees, those of a list side by side."""

    tree: np.ndarray
    digit: np.ndarray
    is_list: np.ndarray
    operator: np.ndarray
    num_args: np.ndarray
    """0 of a digit."""


@TASKS.register("listops", source="ListOps (1804.06028) with the generator of Long Range Arena (2011.04006)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ListOpsTask(GeneratedTask):
    """Values of nested lists of operators: the share of the ten classes named rightly."""

    leaks_to_the_past = False

    max_depth: Annotated[int, Whole(2, 20)] = 10
    """Depth of the deepest digits."""
    max_args: Annotated[int, Whole(2, 20)] = 10
    """Arguments of a list, from 2 on, one number as likely as another."""
    min_length: Annotated[int, Whole(1, 2**14)] = 100
    """Tokens of an expression are more than this; published: 500."""
    max_length: Annotated[int, Whole(3, 2**14)] = 500
    """Tokens of an expression are fewer than this; published: 2000."""

    def vocabulary(self, data: DataConfig) -> int:
        return ASK + 1

    def check(self) -> None:
        share = share_of_lengths(self.max_depth, self.max_args, self.min_length, self.max_length)
        if share < RAREST:
            raise ValueError(
                f"min_length={self.min_length} and max_length={self.max_length} must hold at least {RAREST:g} of the expressions of "
                f"max_depth={self.max_depth} and max_args={self.max_args}, not {share:.4f}; use lengths further apart or shorter"
            )

    def fit(self, data: DataConfig) -> None:
        if self.max_length > data.seq_len:
            raise ValueError(
                f"max_length={self.max_length} must be at most data.seq_len={data.seq_len}; "
                f"use {data.seq_len} or less, or data.seq_len={self.max_length} or more"
            )

    def generate(self, draws: Draws, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        roots, waiting = np.zeros(draws.num_rows, np.uint64), np.arange(draws.num_rows)
        while len(waiting):
            keys = draws.integers(2**53, ATTEMPTS).astype(np.uint64)[waiting]
            lengths = self._grow(keys.ravel())[1].reshape(keys.shape)
            fits = (lengths > self.min_length) & (lengths < self.max_length)
            found = fits.any(1)
            roots[waiting[found]] = keys[found, fits.argmax(1)[found]]
            waiting = waiting[~found]
        levels, _ = self._grow(roots)
        tokens, targets = np.full((draws.num_rows, seq_len), ASK), np.full((draws.num_rows, seq_len), NOT_ASKED)
        values, sizes = evaluate(levels)
        write(tokens, levels, sizes)
        targets[np.arange(len(tokens)), sizes[0]] = values
        return tokens, targets

    def _grow(self, roots: np.ndarray) -> tuple[list[Level], np.ndarray]:
        """The trees of these keys, each a list, level by level, and their tokens; what is too long already grows no further."""
        keys, tree = roots, np.arange(len(roots))
        lengths, levels = np.zeros(len(roots), np.int64), list[Level]()
        while len(keys):
            own, depth = Draws(keys, "listops"), len(levels) + 1
            is_list = (own.uniform(1)[:, 0] < LIST_SHARE) & (depth < self.max_depth) | (depth == 1)
            digit, operator = own.integers(10, 1)[:, 0], MIN + own.integers(4, 1)[:, 0]
            lengths += np.bincount(tree, np.where(is_list, 2, 1), len(lengths)).astype(np.int64)
            grows = is_list & (lengths[tree] < self.max_length)
            count = np.where(grows, 2 + own.integers(self.max_args - 1, 1)[:, 0], 0)
            levels.append(Level(tree, digit, is_list, operator, count))
            parent = np.repeat(np.arange(len(keys)), count)
            child = np.arange(1, len(parent) + 1) - (np.cumsum(count) - count)[parent]
            keys, tree = mix(keys[parent] + GAMMA * child.astype(np.uint64)), tree[parent]
        return levels, lengths


def evaluate(levels: list[Level]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Values of the trees, and the tokens at and below each node, level by level, those of the empty level below all included."""
    values, sizes = np.zeros(0, np.int64), [np.zeros(0, np.int64)]
    for level in reversed(levels):
        own, own_sizes = level.digit.copy(), np.ones_like(level.digit)
        lists, count = np.flatnonzero(level.is_list), level.num_args[level.is_list]
        if len(lists):
            starts = np.cumsum(count) - count
            ordered = values[np.lexsort((values, np.repeat(lists, count)))]
            median = (ordered[starts + (count - 1) // 2] + ordered[starts + count // 2]) // 2
            results = [ordered[starts], ordered[starts + count - 1], median, np.add.reduceat(values, starts) % 10]
            own[lists] = np.choose(level.operator[lists] - MIN, results)
            own_sizes[lists] = 2 + np.add.reduceat(sizes[0], starts)
        values, sizes = own, [own_sizes, *sizes]
    return values, sizes


def write(tokens: np.ndarray, levels: list[Level], sizes: list[np.ndarray]) -> None:
    """Writes the expressions into rows, from the left."""
    places = np.zeros(len(tokens), np.int64)
    for level, size, below in zip(levels, sizes[:-1], sizes[1:], strict=True):
        tokens[level.tree, places] = np.where(level.is_list, level.operator, level.digit)
        lists = level.is_list
        tokens[level.tree[lists], places[lists] + size[lists] - 1] = CLOSE
        before = np.cumsum(below) - below  # tokens of the nodes before it in the level below
        parent = np.repeat(np.arange(len(size)), level.num_args)
        first = (np.cumsum(level.num_args) - level.num_args)[parent]
        places = places[parent] + 1 + before - before[first]


@functools.cache
def share_of_lengths(max_depth: int, max_args: int, above: int, below: int) -> float:
    """Share of the trees, all of them lists, whose number of tokens lies between two bounds."""
    node = np.zeros(below)
    node[1] = 1
    for _ in range(max_depth - 1):
        power, lists, spectrum = node, np.zeros(below), np.fft.rfft(node, 2 * below)
        for _ in range(2, max_args + 1):
            power = np.fft.irfft(np.fft.rfft(power, 2 * below) * spectrum)[:below]
            lists[2:] += power[:-2] / (max_args - 1)
        node = LIST_SHARE * lists
        node[1] = 1 - LIST_SHARE
    return max(0.0, float(lists[above + 1 :].sum()))
