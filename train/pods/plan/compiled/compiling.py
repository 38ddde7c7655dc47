"""Compiles a described step and keeps what the compiler says on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator

import jax

from plait.train.program import Program

_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", re.IGNORECASE)
_TEMPORARIES = re.compile(r"required for HLO temporaries \(([\d.]+)([KMGT]?)\)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_REMATERIALIZED = "Involuntary full rematerialization"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A compile, done or refused for want of memory."""

    compiled: jax.stages.Compiled | None
    """None where the program does not fit."""
    refusal: str | None
    """What the compiler said then."""
    rematerialized: tuple[str, ...]
    """Resharding for which the compiler found no way but to gather the whole array first, one line each."""
    lower_seconds: float
    compile_seconds: float


def compile_step(step: Program, generation: str | None) -> Outcome:
    """Lowers and compiles; only want of memory is caught."""
    start = time.monotonic()
    with standard_error() as said:
        lowered = step.lower(generation=generation)
        middle = time.monotonic()
        compiled, refusal = None, None
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refusal = str(error)
    lines = tuple(line for line in said if _REMATERIALIZED in line)
    return Outcome(compiled, refusal, lines, middle - start, time.monotonic() - middle)


def largest_allocations(refusal: str, most: int = 5) -> list[str]:
    """The largest arrays in a TPU compiler's refusal: size, shape and the operation that makes them."""
    found = []
    for entry in re.split(r"\n\s*\d+\. Size: ", refusal)[1:]:
        size = entry.split("\n")[0].strip()
        op = re.search(r'op_name="([^"]*)"', entry)
        shape = re.search(r"Shape: (\S+)", entry)
        found.append(f"{size} {shape[1].split('{')[0] if shape else ''} {op[1] if op else ''}".strip())
    return found[:most]


def required_temporaries(refusal: str, arguments: float) -> float | None:
    """Bytes of temporaries for which a program was refused; None where the compiler does not say.

    Args:
        arguments: bytes of the program's arguments, which some messages count in.
    """
    if found := _TEMPORARIES.search(refusal):
        return float(found[1]) * _UNITS[found[2].upper()]
    if found := _USED.search(refusal):
        return max(0.0, float(found[1]) * _UNITS[found[2].upper()] - arguments)
    return None


@contextlib.contextmanager
def standard_error() -> Iterator[list[str]]:
    """Collects what the process writes to standard error, compilers in C++ included; it is shown only if the block raises."""
    lines: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        failed = True
        try:
            yield lines
            failed = False
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()
            if failed:
                sys.stderr.write("\n".join(lines) + "\n")
