"""Cycles of the kernels of a compiled TPU program: each is compiled by itself, which the compiler has an estimate for, and kept in a file."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.data.remote.address import cache
from plait.train.pods.plan.compiled.traffic import Operation
from plait.train.pods.plan.topology import Target

TIMEOUT = 600
"""Seconds that a kernel may take to compile."""
_COMMAND = [sys.executable, "-m", "plait.train.pods.plan.compiled.kernel_estimate"]
_CONFIG = "backend_config="
_TYPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_SOURCE = re.compile(r"(\w+)\)*/pallas_call")
_FLOPS = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "pred": "bool", **{f"s{n}": f"int{n}" for n in (8, 16, 32)}}
_DTYPES |= {f"u{n}": f"uint{n}" for n in (8, 16, 32)}


def usual() -> Path:
    """Where estimates are kept: a folder in the user's cache.

    Raises:
        RuntimeError: this user has no home.
    """
    return cache() / "kernel_cycles"


class KernelCycles:
    """What is known of the kernels of one plan, and how."""

    def __init__(self, target: Target, folder: Path | None = None):
        """Args: `folder` holds estimates, a file each; None for the `usual` one."""
        self.target, self.folder = target, folder or usual()
        self.made: list[str] = []
        """Files written for this plan."""
        self.kept: list[str] = []
        """Files that were there."""
        self.unknown: dict[str, str] = {}
        """Kernels without an estimate, and why."""

    def of(self, one: Operation, inside: Mapping[str, Operation]) -> int | None:
        """Cycles of an operation that is a kernel; `inside` are the operations of its computation. None where they are not known."""
        if "pallas_call" not in one.op and "tpu_custom_call" not in one.line:
            return None
        name = found[1] if (found := _SOURCE.search(one.op)) else one.name
        cycles, reason = self._estimate(name, one, inside)
        if reason is not None:
            self.unknown[name] = reason
        return cycles

    def described(self) -> dict[str, Any]:
        """As a plan saves it."""
        return {"made": len(self.made), "kept": len(self.kept), "unknown": self.unknown}

    def _estimate(self, name: str, one: Operation, inside: Mapping[str, Operation]) -> tuple[int | None, str | None]:
        chip = self.target.chip
        if chip is None or chip.platform != "tpu":
            return None, f"no compiler for {self.target.generation} estimates cycles"
        operands = [type_ for operand in one.operands for type_ in _types(inside[operand].type)]
        if any("int" in dtype and len(shape) < 2 for dtype, shape in operands):
            return None, "its control is read from memory, which an estimate counts as nothing"
        config = _config(one.line)
        if config is None:
            return None, "the program does not hold its code"
        shape = "x".join(map(str, (2, 2, 1)[: len(self.target.shape)]))
        job = {"target": f"{chip.generation}:{shape}", "operands": operands, "results": _types(one.type), "config": config}
        file = self._file(name, job)
        known = file.exists()
        if not known:
            cycles, reason = _estimated(job)
            if reason is not None:
                return None, reason
            self.folder.mkdir(parents=True, exist_ok=True)
            what = {key: value for key, value in job.items() if key != "config"}
            partial = file.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps({"kernel": name, **what, "cycles": cycles}))
            partial.replace(file)  # whole, whoever plans beside
        cycles = json.loads(file.read_text())["cycles"]
        if cycles is None:
            return None, "the compiler has no estimate"
        flops = _FLOPS.search(one.line)
        if flops and cycles * chip.flops < int(flops[1]) * chip.clock * chip.cores:
            return None, "its estimate is below its operations at the peak"
        if file.name not in (*self.made, *self.kept):
            (self.kept if known else self.made).append(file.name)
        return cycles, None

    def _file(self, name: str, job: dict[str, Any]) -> Path:
        words = json.dumps([job, importlib.metadata.version("libtpu")], sort_keys=True)
        return self.folder / f"{self.target.generation}-{name}-{hashlib.sha256(words.encode()).hexdigest()[:16]}.json"


def _estimated(job: dict[str, Any]) -> tuple[int | None, str | None]:
    """Cycles by the compiler, in a process that it may end, which says that it has none; or why it was not asked."""
    try:
        done = subprocess.run(_COMMAND, input=json.dumps(job), capture_output=True, text=True, check=False, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return None, f"it did not compile within {TIMEOUT} s"
    if done.returncode > 0:
        return None, f"it does not compile by itself: {(done.stderr.strip().splitlines() or ['no word'])[-1]}"
    return (json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None), None


def _types(type_: str) -> list[tuple[str, list[int]]]:
    """Dtypes and shapes of an array, or of the arrays of a tuple."""
    return [(_DTYPES.get(dtype, dtype), [int(n) for n in dims.split(",") if n]) for dtype, dims in _TYPE.findall(type_)]


def _config(line: str) -> dict[str, Any] | None:
    """The code of a kernel and what the compiler is told of it."""
    if _CONFIG not in line:
        return None
    found, _ = json.JSONDecoder().raw_decode(line[line.index(_CONFIG) + len(_CONFIG) :])
    config = found.get("custom_call_config", {})
    return config if "body" in config else None
