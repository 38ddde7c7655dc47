"""The collectives in compiled programs for TPU, GPU and CPU, read from their text."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import Literal, cast, get_args

import jax
import numpy as np

Kind = Literal["all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast"]

ITEM_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4,
          "f64": 8, "s64": 8, "u64": 8, "c64": 8, "c128": 16}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"%?([\w.\-]+) = (.*?) ({'|'.join(get_args(Kind))})(-start|-done)?\(%?([\w.\-]*)")
_MATTERS = re.compile(rf" (?:{'|'.join(get_args(Kind))}|while|fusion|call|conditional|async-start|send)(?:-start|-done)?\(")
_BETWEEN_SLICES = re.compile(r"= \((.*?), u32.* send\(.*_xla_megascale_transfer_type=\"(\w+)\"")
_TRANSFERS: dict[str, Kind] = {"ALL_GATHER": "all-gather", "ALL_REDUCE": "all-reduce", "REDUCE_SCATTER": "reduce-scatter",
                               "ALL_TO_ALL": "all-to-all", "ONE_TO_ONE": "collective-permute"}  # fmt: skip
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}")
_ORDER = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_LAYER = re.compile(r"\blayer_([\w+.]+)")  # see `plait.models.block.layer_scope`
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind over the same mesh axes."""

    kind: Kind
    axes: tuple[str, ...]
    """Mesh axes whose devices exchange, in the mesh's order; axes of size 1 are left out."""
    count: int
    """Times a device takes part in a step."""
    bytes: float
    """Of the full arrays, per device, over all `count` times: what an all-gather returns and a reduce-scatter takes."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One collective of the program."""

    kind: Kind
    axes: tuple[str, ...]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    """Dtype and dimensions of each full array."""
    times: int = 1
    """How often it runs in a step: the trip counts of the loops around it multiplied."""
    trips_known: bool = True
    """False where a loop's trip count could not be read, and counts as one."""
    op: str = ""
    """The JAX operation that it came from."""

    @property
    def bytes(self) -> float:
        """Of the full arrays, for one execution."""
        return sum(ITEM_BYTES.get(dtype, 1) * math.prod(shape) for dtype, shape in self.shapes)


def collectives(text: str, mesh: jax.sharding.Mesh) -> list[Collective]:
    """The collectives that one device runs in a step, loop trips included, summed by kind and mesh axes; most bytes first.

    Args:
        text: `compiled.as_text()` of a program whose devices are the mesh's, in the mesh's order.
        mesh: names the axes.
    """
    return by_kind(instructions(text, mesh))


def by_kind(found: Iterable[Instruction]) -> list[Collective]:
    """Count and bytes of a step by kind and mesh axes, most bytes first."""
    count: dict[tuple[Kind, tuple[str, ...]], int] = collections.Counter()
    size: dict[tuple[Kind, tuple[str, ...]], float] = collections.defaultdict(float)
    for one in found:
        count[one.kind, one.axes] += one.times
        size[one.kind, one.axes] += one.times * one.bytes
    sums = [Collective(kind, axes, count[kind, axes], size[kind, axes]) for kind, axes in count]
    return sorted(sums, key=lambda c: -c.bytes)


def by_layer_kind(found: Iterable[Instruction]) -> dict[tuple[str, tuple[str, ...]], tuple[int, float]]:
    """Count and bytes of a step by (kind of layer, mesh axes), most bytes first."""
    sums: dict[tuple[str, tuple[str, ...]], tuple[int, float]] = {}
    for one in found:
        key = layer_of(one.op), one.axes
        count, size = sums.get(key, (0, 0.0))
        sums[key] = count + one.times, size + one.times * one.bytes
    return dict(sorted(sums.items(), key=lambda item: -item[1][1]))


def layer_of(op: str) -> str:
    """The kind of layer that a JAX operation belongs to: "others" are embedding, head, loss and optimizer, "unnamed" what the compiler rewrote
    without a name."""
    layer = _LAYER.search(op)
    return layer[1].replace(".", "/") if layer else "others" if op else "unnamed"


def instructions(text: str, mesh: jax.sharding.Mesh) -> list[Instruction]:
    """Every collective of the program; one that runs on one device only (a group of one) is none."""
    return list(Computations(text, mesh).collectives())


def _between_slices(mesh: jax.sharding.Mesh) -> tuple[tuple[str, ...], int]:
    """The mesh axes along which the TPU slice changes, and the number of slices."""
    devices = getattr(mesh, "devices", None)
    if devices is None:
        return (), 1
    of = np.vectorize(lambda device: getattr(device, "slice_index", None) or 0, otypes=[int])(np.asarray(devices))
    axes = tuple(name for i, name in enumerate(mesh.shape) if (of != np.take(of, [0], axis=i)).any())
    return axes, len(np.unique(of))


class Computations:
    """A compiled program taken apart."""

    def __init__(self, text: str, mesh: jax.sharding.Mesh):
        self._groups = _Groups(dict(mesh.shape), _between_slices(mesh))
        self.lines: dict[str, list[str]] = {}
        """Those of each computation, by its name."""
        self.entry = ""
        self.results: dict[str, str] = {}  # type of what a collective's -done returns, by the name of its -start
        name = None
        for line in text.splitlines():
            if not line.startswith(" ") and (found := _COMPUTATION.match(line)):
                name = found[2]
                self.lines[name] = []
                if found[1]:
                    self.entry = name
            elif name is not None:
                self.lines[name].append(line)
                if "-done(" in line and (found := _COLLECTIVE.search(line)):
                    self.results[found[5]] = found[2]

    def collectives(self) -> Iterator[Instruction]:
        """In the order of the text, those in loops with their counts; a group of one exchanges nothing."""
        return (one for one in self._visit(self.entry, 1, True, set()) if one.axes)

    def _visit(self, name: str, times: int, known: bool, seen: set[str], fused: bool = False) -> Iterator[Instruction]:
        """The collectives of a computation. TPU splits one over several fusions, which share its channel: `seen` holds those."""
        seen = seen if fused else set()
        for line in self.lines.get(name, ()):
            if not _MATTERS.search(line[: line.find("metadata=")]):
                continue
            if _LOOP.search(line):
                _, body, trips = self.loop(line)
                yield from self._visit(body, times * (trips or 1), known and trips is not None, set())
                continue
            if one := self.collective(line, name):
                if fused and (channel := channel_of(line)):
                    if channel in seen:
                        continue
                    seen.add(channel)
                yield dataclasses.replace(one, times=times, trips_known=known)
                continue
            for other in self.called(line):
                yield from self._visit(other, times, known, seen, fused=" fusion(" in line)

    def collective(self, line: str, inside: str) -> Instruction | None:
        """What a line of the computation `inside` begins to exchange, if anything."""
        if found := _BETWEEN_SLICES.search(line):
            axes, slices = self._groups.slices
            kind = _TRANSFERS.get(found[2], "all-to-all")
            return Instruction(kind, axes, _arrays(found[1]) * (slices if kind == "all-gather" else 1))
        found = _COLLECTIVE.search(line)
        if found is None or found[4] == "-done":
            return None
        kind = cast(Kind, found[3])
        result = self.results.get(found[1], found[2]) if found[4] else found[2]
        axes, size = self._groups.of(line)
        if kind == "all-reduce" and inside.startswith("all-reduce-scatter"):  # TPU's fusion of a reduction and a slice
            kind = "reduce-scatter"
        elif kind == "reduce-scatter":  # the result is a part of the full array
            dimension = re.search(r"dimensions=\{(\d+)\}", line)
            result = _grown(result, int(dimension[1]) if dimension else 0, size)
        op = re.search(r'op_name="([^"]*)"', line)
        return Instruction(kind, axes, _arrays(result), op=op[1] if op else "")

    def loop(self, line: str) -> tuple[str, str, int | None]:
        """Condition, body and trip count (None: not known) of a while loop."""
        found = _LOOP.search(line)
        assert found is not None, line
        return found[1], found[2], self._trips(line, found[1])

    @staticmethod
    def called(line: str) -> list[str]:
        """The computations that an instruction other than a loop runs."""
        branches = _BRANCHES.search(line)
        return _CALLED.findall(line) + (re.findall(r"[\w.\-]+", branches[1]) if branches else [])

    def _trips(self, line: str, condition: str) -> int | None:
        """Of a while loop: as the compiler says, else the constant that its condition compares the counter with."""
        if found := _TRIPS.search(line):
            return int(found[1])
        lines = self.lines.get(condition, [])
        constants = {
            m[1]: int(m[2]) for line in lines if (m := re.search(r"%?([\w.\-]+) = s32\[\][^ ]* constant\((\d+)\)", line))
        }
        root = next((line for line in lines if line.lstrip().startswith("ROOT")), "")
        operands = re.search(r" (?:compare|fusion)\(([^)]*)\)", root)
        compared = [constants[name] for name in re.findall(r"%([\w.\-]+)", operands[1]) if name in constants] if operands else []
        return compared[0] if len(compared) == 1 else None


def channel_of(line: str) -> str | None:
    """The channel of a collective, which the parts that TPU makes of one share."""
    found = re.search(r"channel_id=(\d+)", line)
    return found[1] if found else None


class _Groups:
    """Which mesh axes the devices of a group differ in."""

    def __init__(self, shape: dict[str, int], slices: tuple[tuple[str, ...], int]):
        self.slices = slices  # axes and number of TPU slices
        self.names, self.sizes = tuple(shape), tuple(shape.values())
        self.cache: dict[str, tuple[tuple[str, ...], int]] = {}

    def of(self, line: str) -> tuple[tuple[str, ...], int]:
        """Axes and size of the groups of a collective."""
        key = next((m[0] for pattern in (_MESH, _PAIRS) if (m := pattern.search(line))), None)
        if key is None:
            start = line.find("replica_groups=")
            key = (
                line[start : line.find(", ", start)]
                if "<=" in line[start : start + 60]
                else (m[0] if (m := _LISTED.search(line)) else "")
            )
        if key not in self.cache:
            self.cache[key] = self._read(key)
        return self.cache[key]

    def _read(self, text: str) -> tuple[tuple[str, ...], int]:
        total = math.prod(self.sizes)
        if found := _PAIRS.search(text):
            pairs = np.array([_numbers(pair) for pair in re.findall(r"\{(\d+,\d+)\}", found[1])], np.int64).reshape(-1, 2)
            return self._differing(pairs[pairs[:, 0] != pairs[:, 1]]), 2
        if found := _MESH.search(text):
            groups = _mesh_groups(found)
        elif found := _IOTA.search(text):
            groups = _permuted(_numbers(found[2]), found[3]).reshape(_numbers(found[1]))
        elif (found := _LISTED.search(text)) and found[1]:
            listed = [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", found[1])]
            groups = np.array([group for group in listed if len(group) == max(map(len, listed))])
        else:
            groups = np.arange(total)[None]
        return self._differing(groups), groups.shape[1]

    def _differing(self, groups: np.ndarray) -> tuple[str, ...]:
        coordinates = np.unravel_index(groups, self.sizes)
        return tuple(name for name, at in zip(self.names, coordinates) if at.size and (at != at[:, :1]).any())


def _mesh_groups(found: re.Match[str]) -> np.ndarray:
    """Groups written as `mesh['a'=4,'b'=2] {'a'}`, or with a part of an axis as in `{'a':(2)2}`, `(2)` being the product before it."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
    split: list[tuple[int, bool]] = []
    parts: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found[3]):
        parts[name].append((int(before), int(size)) if before else (1, sizes[name]))
    for name, size in sizes.items():
        done = 1
        for before, part in sorted(parts[name]):
            split += [(before // done, False), (part, True)]
            done = before * part
        split.append((size // done, False))
    grid = np.arange(math.prod(sizes.values()))
    if found[2]:
        order = _ORDER.search(found[2])
        grid = _permuted(_numbers(order[1]), order[2]) if order else np.array(_numbers(found[2]))
    inside = [i for i, (_, member) in enumerate(split) if member]
    outside = [i for i, (_, member) in enumerate(split) if not member]
    grid = grid.reshape([size for size, _ in split]).transpose(outside + inside)
    return grid.reshape(-1, math.prod(split[i][0] for i in inside))


def _permuted(dims: tuple[int, ...], permutation: str | None) -> np.ndarray:
    """The numbers from 0 as an array of `dims`, transposed, flat."""
    grid = np.arange(math.prod(dims)).reshape(dims)
    return (grid.transpose(_numbers(permutation)) if permutation else grid).reshape(-1)


def _arrays(type_: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Dtype and dimensions of each array of a type."""
    return tuple(
        (dtype, _numbers(dims)) for dtype, dims in _ARRAY.findall(type_) if dtype in ITEM_BYTES or dtype.startswith("f8")
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _grown(result: str, dimension: int, ways: int) -> str:
    """The type with one dimension of each array multiplied."""

    def grow(found: re.Match[str]) -> str:
        dims = list(_numbers(found[2]))
        if dimension < len(dims):
            dims[dimension] *= ways
        return f"{found[1]}[{','.join(map(str, dims))}]"

    return _ARRAY.sub(grow, result)
