"""How long a step takes as it is scheduled, waits for collectives included: the compiled program run in the compiler's order."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator
from typing import get_args

import jax

from plait.train.pods.plan.compiled.durations import Durations
from plait.train.pods.plan.compiled.hlo import Instruction, Kind, channel_of, layer_of
from plait.train.pods.plan.compiled.kernel_cycles import KernelCycles
from plait.train.pods.plan.compiled.schedule import Key, Schedule
from plait.train.pods.plan.compiled.traffic import Operation, Traffic, is_free
from plait.train.pods.plan.roofline import route
from plait.train.pods.plan.topology import Target

_AHEAD = {"copy-start", "slice-start"}
_EXCHANGES = {*get_args(Kind), *(f"{kind}-start" for kind in get_args(Kind)), "send"}


def schedule(traffic: Traffic, mesh: jax.sharding.Mesh, target: Target, cycles: KernelCycles | None = None) -> Schedule:
    """A step in the compiler's order.

    A collective runs from where it is issued to where it is needed, beside the operations between; those inside a slice or host one
    after the other, those over the network too, both at once. Operations come one after the other and take what `Durations` says; copies
    that the compiler starts ahead run beside them.
    """
    return _Machine(traffic, mesh, target, cycles).run(traffic.program.entry)


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

    def wait(self, run: Schedule, until: float) -> None:
        """Lets the run wait for what ends then."""
        for begin, end, key in self.sent:
            run.waits[key] += max(0.0, min(end, until) - max(begin, run.seconds))
        run.seconds = max(run.seconds, until)


class _Machine:
    """Devices of a target that run a program in the order it is written in."""

    def __init__(self, traffic: Traffic, mesh: jax.sharding.Mesh, target: Target, cycles: KernelCycles | None):
        assert target.chip is not None
        self.traffic, self.program, self.durations = traffic, traffic.program, Durations(traffic, target.chip, cycles)
        self.route = functools.cache(lambda axes: route(mesh, axes, target))

    def run(self, computation: str) -> Schedule:
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
        run, links, network = Schedule(), _Way(), _Way()
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

    def _work(self, one: Operation, inside: dict[str, Operation], run: Schedule) -> None:
        if one.opcode == "while":
            _, body, trips = self.program.loop(one.line)
            run.add(self.run(body), trips or 1)
        elif one.opcode in ("call", "conditional"):
            run.add(
                max((self.run(other) for other in self.program.called(one.line)), key=lambda r: r.seconds, default=Schedule())
            )
        elif not is_free(one) and one.opcode not in _AHEAD:
            seconds, source = self.durations.of(one, inside)
            run.seconds += seconds
            run.work[layer_of(one.op), source] += seconds

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
