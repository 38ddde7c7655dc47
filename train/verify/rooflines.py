"""What a chip can do at most, and what an op must do at least: FLOPs and bytes by formula."""

from __future__ import annotations

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from plait.kernels.chips import CHIPS


class Peak(NamedTuple):
    """One chip, by its data sheet: dense bfloat16 FLOP/s and bytes/s of main memory; for a TPU also its clock and cores."""

    flops: float
    bandwidth: float
    clock: float = 0.0
    cores: int = 1

    def seconds(self, flops: float, num_bytes: float) -> float:
        """The roofline: the least time for this much arithmetic and traffic, which overlap."""
        return max(flops / self.flops, num_bytes / self.bandwidth)


PEAKS = {
    name: Peak(
        chip.flops * chip.devices_per_chip,
        chip.memory_bandwidth * chip.devices_per_chip,
        chip.clock,
        chip.cores * chip.devices_per_chip,
    )
    for name, chip in CHIPS.items()
}


def measured_peak(dtype: str) -> Peak:
    """This machine's own best matrix product and sum over memory: the peak where no data sheet is at hand, such as of a CPU."""
    size = 1536
    a, long = jnp.ones((size, size), dtype), jnp.ones((1 << 25,), jnp.float32)

    def best(function, *args) -> float:
        function = jax.jit(function)
        jax.block_until_ready(function(*args))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready(function(*args))
            times.append(time.perf_counter() - start)
        return min(times)

    return Peak(2 * size**3 / best(lambda a: a @ a, a), long.nbytes / best(jnp.sum, long))


class Shape(NamedTuple):
    """Sizes of a call: B sequences of T tokens, H heads with keys and values of D; V words where there is a vocabulary."""

    batch: int
    length: int
    heads: int
    dim: int
    vocabulary: int
    group: int = 1
    """Heads that share a key head."""

    @property
    def kv_heads(self) -> int:
        """Key heads."""
        return self.heads // self.group

    def __str__(self) -> str:
        return f"B {self.batch}, T {self.length}, H {self.heads}, D {self.dim}"


CHUNK = 64
"""Of the chunk form that the recurrences are counted in."""

TAPS = 4


def least(op: str, shape: Shape, itemsize: int, *, backward: bool) -> tuple[float, float]:
    """FLOPs and bytes that an op needs: inputs and outputs moved once, triangles as halves, nothing computed twice.

    Causal attention has two products over half the square, and four more backward. A recurrence in chunks of 64 reads and writes its
    state for each token (4 K V) and has the scores of its chunk and their product with the values; the delta rule also reads the
    state at the keys and inverts a triangle. A product costs twice its FLOPs again in the backward pass. With `backward`, both passes
    count.
    """
    b, t, h, d, v, _ = shape
    tokens, wide = b * t, b * t * h * d * itemsize  # one array [B, T, H, D]
    passes = 3 if backward else 1
    if op == "attention":
        return passes * 2 * b * h * t * t * d, (4 + 8 * backward) * wide
    if op == "short_conv":
        return passes * 2 * TAPS * tokens * h * d, (2 + 3 * backward) * wide
    if op == "cross_entropy":
        width = h * d
        return passes * 2 * tokens * width * v, (1 + 2 * backward) * (tokens * width + width * v) * itemsize
    flops: float = 4 * d * d + 2 * CHUNK * d
    if op not in ("scalar_decay", "vector_decay"):
        flops += 2 * d * d + 2 * CHUNK * d + CHUNK * CHUNK / 3
    gates = 4 * tokens * h * (d if op in ("vector_decay", "kda") else 1)
    return passes * tokens * h * flops, (4 + 8 * backward) * wide + (1 + 2 * backward) * gates
