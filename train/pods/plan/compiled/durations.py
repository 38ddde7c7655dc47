"""How long the operations of a compiled program take: by the compiler's own estimates, by those of our kernels, else at the machine's peak."""

from __future__ import annotations

import math
import re
from typing import Literal, NamedTuple

from plait.kernels.chips import Chip
from plait.train.pods.plan.compiled.kernel_cycles import KernelCycles
from plait.train.pods.plan.compiled.kernel_shares import SHARES
from plait.train.pods.plan.compiled.traffic import Operation, Traffic

Source = Literal["compiler", "exact", "kernels", "peak"]
"""What says how long: the TPU compiler's estimate of an operation; that of a kernel, compiled by itself; the share of the peak that kernels of
its kind reach by such estimates; or nothing but operations and memory traffic, each at the peak."""

SOURCES: dict[Source, str] = {
    "compiler": "by the compiler's estimate",
    "exact": "kernels, each estimated as it is",
    "kernels": "kernels, by their estimates alone",
    "peak": "at the peak",
}

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_KERNEL_FLOPS = re.compile(r'(?:"cost_estimate":\{"flops":"|cost_estimate_json = "\{\\22flops\\22: )(\d+)')  # on TPU, on GPU
_DIMS = re.compile(r"\[([\d,]*)\]")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_LABELS = re.compile(r"dim_labels=\w+_(\w+)->\w+")


class Duration(NamedTuple):
    """Of one operation."""

    seconds: float
    source: Source


class Durations:
    """Of the operations of one program on one chip."""

    def __init__(self, traffic: Traffic, chip: Chip, cycles: KernelCycles | None = None):
        """Args: `cycles` estimates the kernels of the program; without, each is at the share of its kind."""
        self.traffic, self.chip, self.cycles = traffic, chip, cycles

    def of(self, one: Operation, inside: dict[str, Operation]) -> Duration:
        """How long an operation that calls nothing but a fusion takes; `inside` are those of its computation."""
        if one.opcode == "custom-call" and self.cycles is not None and (cycles := self.cycles.of(one, inside)) is not None:
            return Duration(cycles / self.chip.clock / self.chip.cores, "exact")
        if one.opcode == "custom-call" and (seconds := self._kernel(one, inside)) is not None:
            return Duration(seconds, "kernels")
        if self.chip.clock and (found := _CYCLES.search(one.line)):
            return Duration(int(found[1]) / self.chip.clock, "compiler")
        moved = self.traffic.moved(one, inside) / self.chip.memory_bandwidth
        said = _KERNEL_FLOPS.search(one.line)
        products = int(said[1]) if said else self._products(one, inside)
        return Duration(max(moved, products / self.chip.flops), "peak")

    def _kernel(self, one: Operation, inside: dict[str, Operation]) -> float | None:
        """Seconds of a kernel that says its operations and whose share of the peak is known, at the least width that is as large; a narrower
        head fills so much less of the lanes."""
        flops, kernels = _KERNEL_FLOPS.search(one.line), SHARES.get(self.chip.generation, {})
        name = max((kernel for kernel in kernels if kernel in one.name), key=len, default=None)
        if flops is None or name is None:
            return None
        shapes = (_dims(inside[operand].type) for operand in one.operands if operand in inside)
        width = next((shape[-1] for shape in shapes if len(shape) == 4), 0)
        by_width = kernels[name]
        nearest = min((w for w in by_width if w >= width), default=max(by_width))
        filled = width / nearest if 0 < width < nearest else 1.0
        return int(flops[1]) / self.chip.flops / (by_width[nearest] * filled)

    def _products(self, one: Operation, inside: dict[str, Operation]) -> float:
        """Operations of the matrix products of an operation."""
        if one.opcode in ("fusion", "fusion-start"):
            bodies = [self.traffic.operations(called) for called in self.traffic.program.called(one.line)]
            return sum(self._products(part, body) for body in bodies for part in body.values())
        if one.opcode not in ("dot", "convolution") or any(name not in inside for name in one.operands[:2]):
            return 0.0
        result = math.prod(_dims(one.type))
        if one.opcode == "dot":
            contracted = _CONTRACTED.search(one.line)
            left = _dims(inside[one.operands[0]].type)
            return 2.0 * result * math.prod(left[int(i)] for i in contracted[1].split(",") if i) if contracted else 0.0
        labels = _LABELS.search(one.line)
        right = _dims(inside[one.operands[1]].type)
        return 2.0 * result * right[labels[1].index("i")] if labels else 0.0


def _dims(type_: str) -> tuple[int, ...]:
    found = _DIMS.search(type_)
    return tuple(int(n) for n in found[1].split(",") if n) if found else ()
