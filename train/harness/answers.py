"""What a run writes after texts, until each has come to an end."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from plait.configs.components import at as under
from plait.kernels import Tokens
from plait.train.harness.shapes import Shapes
from plait.train.harness.texts import Ends
from plait.train.mesh import on_mesh
from plait.train.run import Trained
from plait.train.scoring.generate import Place, Sampling, written
from plait.train.state import Arrays

_AT_ONCE = 32
"""Tokens that are written before it is asked whether any text goes on."""
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the length of an answer, of which the first that is there counts."""
_USUAL = 256
"""Tokens of an answer where nobody says how many."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """How an answer is written."""

    until: tuple[str, ...]
    """Texts that end it and are no part of it."""
    num_tokens: int
    """Tokens at most."""
    sampling: Sampling

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Wanted:
        """The options of a task (`generation_kwargs`), greedy unless they ask for draws.

        Raises:
            ValueError: an option that nothing here does, or a value that cannot be.
        """
        until = options.get("until") or []
        until = (until,) if isinstance(until, str) else tuple(until)
        if not all(isinstance(text, str) for text in until):
            raise ValueError(f"generation_kwargs.until={until!r} must be texts that end an answer; write them in quotes")
        num_tokens = next((options[name] for name in _LENGTHS if options.get(name) is not None), _USUAL)
        if not isinstance(num_tokens, int) or num_tokens < 1:
            raise ValueError(f"generation_kwargs.max_gen_toks={num_tokens!r} must be a whole number from 1; use {_USUAL}")
        known = {"until", "do_sample", "temperature", "top_k", "top_p", "num_beams", *_LENGTHS}
        for name, value in options.items():
            if name not in known or (name == "num_beams" and value != 1):
                raise ValueError(
                    f"generation_kwargs.{name}={value!r} is nothing that is done here; use until, max_gen_toks, do_sample, temperature, top_k "
                    "and top_p"
                )
        draws, temperature = options.get("do_sample"), options.get("temperature") or 0.0
        if draws is False or not (draws or temperature):
            return cls(until=until, num_tokens=num_tokens, sampling=Sampling(temperature=0.0))
        make = lambda: Sampling(temperature=temperature or 1.0, top_k=options.get("top_k"), top_p=options.get("top_p"))
        return cls(until=until, num_tokens=num_tokens, sampling=under("generation_kwargs", make))


class Answers:
    """Writes with a run; compiled once for a shape."""

    def __init__(self, trained: Trained, shapes: Shapes):
        assert trained.tokenizer is not None
        self._trained, self._shapes, self._tokenizer = trained, shapes, trained.tokenizer
        blueprint, vocab_size = trained.program.blueprint, trained.tokenizer.vocab_size

        def begin(params: Arrays, buffers: Arrays, at: Tokens, lengths: jax.Array, *, longest: int) -> Place:
            with on_mesh(shapes.mesh):
                model = blueprint.build(params, buffers)
                return *model.prefill(at, model.init_state(len(at.ids), longest)), lengths

        def go_on(
            params: Arrays, buffers: Arrays, place: Place, keys: jax.Array, *, sampling: Sampling
        ) -> tuple[Place, jax.Array]:
            with on_mesh(shapes.mesh):
                place, out = written(blueprint.build(params, buffers), place, keys, vocab_size, sampling)
                return place, jax.lax.with_sharding_constraint(out, NamedSharding(shapes.mesh, PartitionSpec()))

        self._begin = jax.jit(begin, static_argnames="longest")
        self._go_on = jax.jit(go_on, static_argnames="sampling", donate_argnames="place")

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        wanted: Sequence[Wanted],
        *,
        ends: Sequence[int] = (),
        seed: int = 0,
        told: Callable[[int], None] = lambda done: None,
    ) -> list[str]:
        """The text after each prompt, before its end.

        A prompt that leaves no room for its answer loses its first tokens.

        Args:
            prompts: of at least one token.
            wanted: how each is answered.
            ends: tokens beside end-of-text that end an answer.
            seed: of the draws.
            told: is told how many are answered so far.

        Raises:
            ValueError: an answer has as many tokens as a row, or more.
        """
        for one in set(wanted):
            if one.num_tokens >= self._shapes.longest:
                raise ValueError(
                    f"max_length={self._shapes.longest} must be more than the max_gen_toks={one.num_tokens} tokens of an answer; raise it, "
                    f"or use --max-gen-tokens {max(1, self._shapes.longest // 2)}"
                )
        cut = [list(prompt)[-(self._shapes.longest - one.num_tokens) :] for prompt, one in zip(prompts, wanted, strict=True)]
        groups: dict[Wanted, list[int]] = collections.defaultdict(list)
        for number in sorted(range(len(prompts)), key=lambda number: (-len(cut[number]), cut[number])):
            groups[wanted[number]].append(number)
        found, done = [""] * len(prompts), 0
        for one, group in groups.items():
            until = Ends.of(self._tokenizer, one.until, ends)
            while group:
                width = self._shapes.width(len(cut[group[0]]))
                numbers = group[: self._shapes.rows(width + one.num_tokens, len(group))]
                del group[: len(numbers)]
                rows = self._shapes.rows(width + one.num_tokens, len(numbers))
                key = jax.random.fold_in(jax.random.key(seed), numbers[0])
                for number, text in zip(numbers, self._answered([cut[n] for n in numbers], width, rows, one, until, key)):
                    found[number] = text
                done += len(numbers)
                told(done)
        return found

    def _answered(
        self, prompts: Sequence[Sequence[int]], width: int, rows: int, wanted: Wanted, until: Ends, key: jax.Array
    ) -> list[str]:
        arrays = self._trained.params, self._trained.buffers
        lengths = np.ones(rows, np.int32)
        lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
        filled = [*prompts, *[prompts[0][:1]] * (rows - len(prompts))]
        place = self._begin(
            *arrays,
            self._shapes.place(filled, width, rows),
            self._shapes.everywhere(lengths),
            longest=min(width + wanted.num_tokens, self._shapes.longest),
        )
        keys = jax.random.split(key, wanted.num_tokens)
        ids: list[list[int]] = [[] for _ in prompts]
        for first in range(0, wanted.num_tokens, _AT_ONCE):
            place, out = self._go_on(*arrays, place, keys[first : first + _AT_ONCE], sampling=wanted.sampling)
            for one, new in zip(ids, np.asarray(out)):
                one.extend(new.tolist())
            if all(until.cut(self._tokenizer, one)[1] for one in ids):
                break
        return [until.cut(self._tokenizer, one)[0] for one in ids]
