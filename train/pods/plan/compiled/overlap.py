"""How long a step waits for its collectives: the compiled program run in the compiler's order on a machine at its peak."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import get_args

import jax

from plait.train.pods.plan.compiled.hlo import Instruction, Kind, channel_of
from plait.train.pods.plan.compiled.traffic import Operation, Traffic, is_free
from plait.train.pods.plan.roofline import route
from plait.train.pods.plan.topology import Target

Key = tuple[str, tuple[str, ...]]
_DIMS = re.compile(r"\[([\d,]*)\]")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_LABELS = re.compile(r"dim_labels=\w+_(\w+)->\w+")
_EXCHANGES = {*get_args(Kind), *(f"{kind}-start" for kind in get_args(Kind)), "send"}


def waits(traffic: Traffic, mesh: jax.sharding.Mesh, target: Target) -> dict[Key, float]:
    """Seconds of a step in which a device has nothing to do but wait, by kind and mesh axes of the collective under way.

    A collective runs from where it is issued to where it is needed, beside the operations between; those inside a slice or host one
    after the other, those over the network too, both at once. An operation takes as long as its products or its memory traffic; kernels
    their memory traffic only, so that less is hidden behind them than there could be.
    """
    return _Machine(traffic, mesh, target).run(traffic.program.entry).waits


@dataclasses.dataclass
class _Run:
    """One run of a computation."""

    seconds: float = 0.0
    waits: dict[Key, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))

    def add(self, other: _Run, times: int = 1) -> None:
        self.seconds += times * other.seconds
        for key, wait in other.waits.items():
            self.waits[key] += times * wait


@dataclasses.dataclass
class _Way:
    """The links, or the network, and what goes over them, one after the other."""

    sent: list[tuple[float, float, Key]] = dataclasses.field(default_factory=list)
    """Begin, end and key of each collective."""

    def issue(self, now: float, seconds: float, key: Key) -> float:
        """When a collective issued now ends."""
        begin = max(now, self.sent[-1][1]) if self.sent else now
        self.sent.append((begin, begin + seconds, key))
        return begin + seconds

    def wait(self, run: _Run, until: float) -> None:
        """Lets the run wait for what ends then."""
        for begin, end, key in self.sent:
            run.waits[key] += max(0.0, min(end, until) - max(begin, run.seconds))
        run.seconds = max(run.seconds, until)


class _Machine:
    """Devices of a target that run a program in the order it is written in."""

    def __init__(self, traffic: Traffic, mesh: jax.sharding.Mesh, target: Target):
        assert target.chip is not None
        self.traffic, self.program, self.chip = traffic, traffic.program, target.chip
        self.route = functools.cache(lambda axes: route(mesh, axes, target))

    def run(self, computation: str) -> _Run:
        inside = self.traffic.operations(computation)
        sent = {name: dict(self._sent(one, computation)) for name, one in inside.items()}
        first: dict[str, str] = {}
        last: dict[str, str] = {}
        for name, one in inside.items():
            for key in sent[name]:
                first.setdefault(key, name)
                last[key] = name
            if one.opcode.endswith("-done") and one.operands and one.operands[0] in last:
                last[one.operands[0]] = name
        ends: dict[str, list[str]] = collections.defaultdict(list)
        for key, name in last.items():
            ends[name].append(key)
        run, links, network = _Run(), _Way(), _Way()
        under_way: dict[str, tuple[_Way, float]] = {}

        def issue(keys: list[str], name: str) -> None:
            for key in keys:
                what = sent[name][key]
                route = self.route(what.axes)
                way = network if route.outer > 1 else links
                under_way[key] = way, way.issue(run.seconds, route.seconds(what.kind, what.bytes), (what.kind, what.axes))

        for name, one in inside.items():
            begun = [key for key in sent[name] if first[key] == name]
            issue([key for key in begun if last[key] != name], name)
            if one.opcode not in _EXCHANGES:
                self._work(one, inside, run)
            issue([key for key in begun if last[key] == name], name)
            for key in ends[name]:
                way, ready = under_way.pop(key)
                way.wait(run, ready)
        return run

    def _work(self, one: Operation, inside: dict[str, Operation], run: _Run) -> None:
        if one.opcode == "while":
            _, body, trips = self.program.loop(one.line)
            run.add(self.run(body), trips or 1)
        elif one.opcode in ("call", "conditional"):
            run.add(max((self.run(other) for other in self.program.called(one.line)), key=lambda r: r.seconds, default=_Run()))
        elif not is_free(one):
            products = self._products(one, inside)
            run.seconds += max(self.traffic.moved(one, inside) / self.chip.memory_bandwidth, products / self.chip.flops)

    def _sent(self, one: Operation, computation: str) -> Iterator[tuple[str, Instruction]]:
        """What an operation, or a fusion's parts, exchange; parts of one collective have the same key."""
        if one.opcode in _EXCHANGES:
            what = self.program.collective(one.line, computation)
            if what is not None and what.axes:
                yield one.name, what
        elif one.opcode in ("fusion", "fusion-start", "async-start"):
            for called in self.program.called(one.line):
                for part in self.traffic.operations(called).values():
                    channel = channel_of(part.line) if part.opcode in _EXCHANGES else None
                    for key, what in self._sent(part, called):
                        yield one.name if one.opcode == "async-start" else channel or key, what

    def _products(self, one: Operation, inside: dict[str, Operation]) -> float:
        """Operations of the matrix products of an operation."""
        if one.opcode in ("fusion", "fusion-start"):
            bodies = [self.traffic.operations(called) for called in self.program.called(one.line)]
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
