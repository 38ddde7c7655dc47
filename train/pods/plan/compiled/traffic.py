"""Bytes that a compiled program reads from and writes to device memory in a step, loop trips included."""

from __future__ import annotations

import collections
import dataclasses
import math
import re

from plait.train.pods.plan.compiled.hlo import ITEM_BYTES, Computations

_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id", "iota", "while",
         "call", "conditional", "optimization-barrier", "opt-barrier", "async-start", "async-update", "async-done"}  # fmt: skip
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_SLICES = {"dynamic-slice", "slice", "gather"}


@dataclasses.dataclass(frozen=True)
class Operation:
    """A line of a computation."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    line: str
    root: bool

    @property
    def op(self) -> str:
        """The JAX operation that it came from."""
        found = _OP_NAME.search(self.line)
        return found[1] if found else ""


def is_free(one: Operation) -> bool:
    """Whether it moves nothing itself."""
    return one.opcode in _FREE or one.opcode.endswith("-done")


class Traffic:
    """Of one device. Operands and results of each operation outside fusions, kernels included, count once; of an array that a fusion
    slices or updates in place, only the slice. Arrays that the TPU compiler keeps in VMEM are free."""

    def __init__(self, program: Computations):
        self.program = program
        self.parsed: dict[str, dict[str, Operation]] = {}

    def total(self) -> float:
        """Bytes of a step."""
        return self.of(self.program.entry)

    def of(self, name: str) -> float:
        """Bytes of one run of a computation, with the computations that it calls."""
        total = 0.0
        inside = self.operations(name)
        for one in inside.values():
            if one.opcode == "while":
                condition, body, trips = self.program.loop(one.line)
                total += (trips or 1) * self.of(body) if condition else 0.0
            elif one.opcode in ("call", "conditional", "async-start"):
                total += max((self.of(other) for other in self.program.called(one.line)), default=0.0)
            elif not is_free(one):
                total += self.moved(one, inside)
        return total

    def moved(self, one: Operation, inside: dict[str, Operation]) -> float:
        """Bytes of an operation that calls nothing but a fusion; `inside` are those of its computation."""
        if one.opcode in _SLICES:
            return 2 * _size(one.type)
        if one.opcode == "dynamic-update-slice":
            update = inside.get(one.operands[1]) if len(one.operands) > 1 else None
            return 2 * _size(update.type) if update else 0.0
        if one.opcode in ("fusion", "fusion-start") and (called := self.program.called(one.line)):
            return self._fusion(one, inside, called[0])
        if one.opcode == "copy-start":  # the type holds both ends
            return _size(one.type)
        if one.opcode == "slice-start":
            result = one.type[one.type.find("), ") :]
            return _size(result, everywhere=True) + _size(result)
        operands = sum(_size(inside[name].type) for name in one.operands if name in inside)
        return operands + _size(self.program.results.get(one.name, "") if one.opcode.endswith("-start") else one.type)

    def _fusion(self, one: Operation, inside: dict[str, Operation], called: str) -> float:
        body = self.operations(called)
        users: dict[str, list[Operation]] = collections.defaultdict(list)
        for user in body.values():
            for name in user.operands:
                users[name].append(user)
        parameters = {
            int(m[1]): p for p in body.values() if p.opcode == "parameter" and (m := re.search(r"parameter\((\d+)\)", p.line))
        }
        total = 0.0
        for position, name in enumerate(one.operands):
            if name not in inside:
                continue
            whole = _size(inside[name].type)
            parameter = parameters.get(position)
            reads = [self._read(user, parameter.name, body) for user in users[parameter.name]] if parameter else []
            total += min(whole, sum(reads)) if reads and None not in reads else whole  # type: ignore[arg-type]
        roots = [p for p in body.values() if p.root]
        if roots and roots[0].opcode == "tuple":
            roots = [body[name] for name in roots[0].operands if name in body]
        written = [_size(body[r.operands[1]].type) for r in roots if r.opcode == "dynamic-update-slice" and r.operands[1] in body]
        in_place = [_size(r.type) for r in roots if r.opcode == "dynamic-update-slice"]
        result = _size(one.type) if one.opcode == "fusion" else sum(_size(r.type) for r in roots)
        return total + max(0.0, result - sum(in_place)) + sum(written)

    @staticmethod
    def _read(user: Operation, name: str, body: dict[str, Operation]) -> float | None:
        """Bytes that a user reads of a parameter, or None for all."""
        if user.opcode in _SLICES and user.operands[0] == name:
            return _size(user.type)
        if user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            return 0.0
        return None

    def operations(self, computation: str) -> dict[str, Operation]:
        """By name, in the compiler's order."""
        if computation not in self.parsed:
            found = {}
            for line in self.program.lines.get(computation, ()):
                if m := _LINE.match(line[: line.find(", metadata=")] if ", metadata=" in line else line):
                    operands = tuple(re.findall(r"%([\w.\-]+)", m[4].split(")")[0]))
                    found[m[1]] = Operation(m[1], m[2], m[3], operands, line, line.lstrip().startswith("ROOT"))
            self.parsed[computation] = found
        return self.parsed[computation]


def _size(type_: str, *, everywhere: bool = False) -> float:
    """Bytes in device memory of a type: arrays in VMEM, S(1), semaphores, S(2), or on the host, S(5), are not there."""
    total = 0.0
    for dtype, dims, layout in _ARRAY.findall(type_):
        if ("S(" not in layout or everywhere) and "S(2)" not in layout:
            total += ITEM_BYTES.get(dtype, 1) * math.prod(int(n) for n in dims.split(",") if n)
    return total
