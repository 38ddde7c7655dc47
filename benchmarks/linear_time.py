"""Step time and memory of every linear mixer against the length of a sequence: `python benchmarks/linear_time.py [MIXER ...]`.

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
from plait.models.mixers.base import MIXERS, MixerConfig

WIDTH = 64
LENGTHS = (2048, 4096, 8192, 16384, 32768)


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one mixer, a number for each length."""

    seconds: tuple[float, ...]
    """Of a step, the median."""
    temp_bytes: tuple[int, ...]
    """That a step needs besides its arguments and results."""
    state_bytes: tuple[int, ...]
    """Of the decode state of one sequence."""
    decode_seconds: tuple[float, ...]
    """Of one token, the median."""


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
    """Of a call, after one that warms up."""
    jax.block_until_ready(run())
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def measure(config: MixerConfig, lengths: Sequence[int] = LENGTHS, repeats: int = 5) -> Costs:
    """What a mixer costs at each length."""
    ctx = BuildContext(rngs=nnx.Rngs(0), seq_len=max(lengths), num_layers=2)
    graph, params, rest = nnx.split(config.build(WIDTH, ctx), nnx.Param, ...)
    mixer = lambda params: nnx.merge(graph, params, rest)

    def loss(params, x, at):
        return jnp.square(mixer(params)(x, at=at, carry={}).y).sum()

    @jax.jit
    def decode(params, x, state, at):
        return mixer(params).step(x, state, at=at, carry={})[::2]

    rows = []
    for length in lengths:
        x, at = jax.random.normal(jax.random.key(1), (1, length, WIDTH)), Tokens().placed(1, length)
        step = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x, at).compile()
        state = mixer(params).init_state(1, length + 1)
        one = Tokens(positions=jnp.full((1, 1), length, jnp.int32))
        rows.append(
            (
                median_seconds(lambda step=step, x=x, at=at: step(params, x, at), repeats),
                step.memory_analysis().temp_size_in_bytes,
                sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
                median_seconds(lambda x=x, state=state, one=one: decode(params, x[:, :1], state, one), 10 * repeats),
            )
        )
    return Costs(*zip(*rows, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mixers", nargs="*", help="all that are linear by default")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    lengths, ends = options.lengths, f"{options.lengths[0]} / {options.lengths[-1]}"
    print(
        f"{'mixer':20} {'time':>7} {'ms at ' + ends:>22} {'memory':>7} {'MiB at ' + ends:>22} {'state B':>16} {'decode us':>16}"
    )
    for name, config in linear_mixers().items():
        if options.mixers and name not in options.mixers:
            continue
        costs = measure(config, lengths, options.repeats)
        both = lambda values, scale, digits: f"{values[0] * scale:.{digits}f} / {values[-1] * scale:.{digits}f}"
        print(
            f"{name:20} T^{slope(lengths, costs.seconds):<5.2f} {both(costs.seconds, 1e3, 1):>22} "
            f"T^{slope(lengths, costs.temp_bytes):<5.2f} {both(costs.temp_bytes, 2**-20, 1):>22} "
            f"{both(costs.state_bytes, 1, 0):>16} {both(costs.decode_seconds, 1e6, 0):>16}",
            flush=True,
        )


if __name__ == "__main__":
    main()
