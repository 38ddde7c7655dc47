"""CPU time and memory of a step of every linear mixer against the length of a sequence: `python benchmarks/linear_time.py [MIXER ...]`.

A step is the output and its gradients in the parameters and in x, of a layer of width 64 on one row; memory is what the compiled program
needs besides its arguments. `T^a` is the slope of a least-squares line through the logarithms: 1 is linear. Decoding is one token
after a prompt of each length, with the state that such a sequence needs.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from plait.kernels import Tokens
from plait.models.build import BuildContext
from plait.models.mixers.base import MIXERS, Mixer, MixerConfig

WIDTH = 64
LENGTHS = (2048, 4096, 8192, 16384, 32768)


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one mixer, a number for each length."""

    seconds: tuple[float, ...]
    """CPU time of a step, the median."""
    temp_bytes: tuple[int, ...]
    """That a step needs besides its arguments and results."""
    state_bytes: tuple[int, ...]
    """Of the decode state of one sequence."""
    decode_seconds: tuple[float, ...]
    """CPU time of one token, the median."""


def linear_mixers() -> dict[str, MixerConfig]:
    """The example of every registered linear mixer that can be causal, by name."""
    return {
        name: config.example()
        for name, config in MIXERS.all().items()
        if getattr(config, "kind", None) == "linear" and "causal" in config.directions
    }


def slope(lengths: Sequence[int], values: Sequence[float]) -> float:
    """The power of the length by which values grow."""
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """CPU seconds of a call, after one that warms up: what else the machine does counts little."""
    jax.block_until_ready(run())
    found = []
    for _ in range(repeats):
        start = time.process_time()
        jax.block_until_ready(run())
        found.append(time.process_time() - start)
    return statistics.median(found)


class Layer:
    """A mixer's layer of width 64, for rows of at most `longest` tokens."""

    def __init__(self, config: MixerConfig, longest: int):
        ctx = BuildContext(rngs=nnx.Rngs(0), seq_len=longest, num_layers=2)
        self.graph, self.params, self.rest = nnx.split(config.build(WIDTH, ctx), nnx.Param, ...)

    def mixer(self, params: nnx.State) -> Mixer:
        """The layer with its parameters."""
        return nnx.merge(self.graph, params, self.rest)

    def step(self, length: int) -> tuple[Callable[[], Any], int]:
        """A training step of a row, compiled, and the bytes that it needs besides its arguments and results."""
        x, at = jax.random.normal(jax.random.key(1), (1, length, WIDTH)), Tokens().placed(1, length)
        loss = lambda params, x: jnp.square(self.mixer(params)(x, at=at, carry={}).y).sum()
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(self.params, x).compile()
        return lambda: compiled(self.params, x), compiled.memory_analysis().temp_size_in_bytes

    def decoding(self, length: int) -> tuple[Callable[[], Any], int]:
        """The token after `length` others, compiled, and the bytes of its state."""
        state = self.mixer(self.params).init_state(1, length + 1)
        x, one = jnp.ones((1, 1, WIDTH)), Tokens(positions=jnp.full((1, 1), length, jnp.int32))
        decode = jax.jit(lambda params, x, state: self.mixer(params).step(x, state, at=one, carry={})[::2])
        return lambda: decode(self.params, x, state), sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def measure(config: MixerConfig, lengths: Sequence[int], repeats: int) -> Costs:
    """What a mixer costs at each length."""
    layer, rows = Layer(config, max(lengths)), []
    for length in lengths:
        (step, temp), (decode, state) = layer.step(length), layer.decoding(length)
        rows.append((median_seconds(step, repeats), temp, state, median_seconds(decode, 10 * repeats)))
    return Costs(*zip(*rows, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mixers", nargs="*", help="all that are linear by default")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    lengths, ends = options.lengths, f"{options.lengths[0]} / {options.lengths[-1]}"
    print(
        f"{'mixer':20} {'time':>7} {'CPU ms at ' + ends:>24} {'memory':>7} {'MiB at ' + ends:>22} {'state B':>16} {'decode us':>16}"
    )
    for name, config in linear_mixers().items():
        if options.mixers and name not in options.mixers:
            continue
        costs = measure(config, lengths, options.repeats)
        both = lambda values, scale, digits: f"{values[0] * scale:.{digits}f} / {values[-1] * scale:.{digits}f}"
        print(
            f"{name:20} T^{slope(lengths, costs.seconds):<5.2f} {both(costs.seconds, 1e3, 1):>24} "
            f"T^{slope(lengths, costs.temp_bytes):<5.2f} {both(costs.temp_bytes, 2**-20, 1):>22} "
            f"{both(costs.state_bytes, 1, 0):>16} {both(costs.decode_seconds, 1e6, 0):>16}",
            flush=True,
        )


if __name__ == "__main__":
    main()
