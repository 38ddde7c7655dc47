"""Whether each implementation at hand gives what the plain reference gives, forward and backward, and the same bits twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from plait.kernels import registered
from plait.kernels.tolerances import bound, rms_error, wave
from plait.train.verify.findings import Finding
from plait.train.verify.rooflines import Shape
from plait.train.verify.trials import TRIALS, Arrays, Trial, differentiable

PART = "agreement with the reference"
QUICK = {"xla_backend_optimization_level": 0}
"""Of programs on the CPU that run once: they are compiled in half the time."""


def agreement(names: Mapping[str, Trial], shape: Shape, dtypes: tuple[str, ...]) -> Iterator[Finding]:
    """A finding for each trial, implementation and dtype; what cannot be computed is one too, and the rest goes on."""
    for name, trial in names.items():
        for dtype in dtypes:
            try:
                exact, plain = _references(trial, shape, dtype)
            except Exception as error:
                yield Finding(
                    part=PART, what=f"{name}, {dtype}", op=trial.op, by="reference", status="failed", detail=first_line(error)
                )
                continue
            for implementation in registered()[trial.op]:
                if implementation != "reference" and (found := _compared(trial, implementation, shape, dtype, exact, plain)):
                    yield Finding(part=PART, what=f"{name}, {dtype}", op=trial.op, by=implementation, **found)


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else ''}"


def _references(trial: Trial, shape: Shape, dtype: str) -> tuple[Any, Any]:
    """The reference in float64, and in the tested dtype, both on the CPU."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]), jax.default_matmul_precision("highest"):
        x = trial.draw(shape, dtype)
        run = jax.jit(lambda x: with_gradients(trial, "reference", x), compiler_options=QUICK)
        plain = jax.tree.map(np.asarray, run(x))
        with jax.enable_x64(True):
            exact = run({k: jnp.asarray(np.asarray(a, np.float64)) if k in differentiable(x) else a for k, a in x.items()})
            return jax.tree.map(np.asarray, exact), plain


def with_gradients(trial: Trial, implementation: str, x: Arrays) -> dict[str, Any]:
    """The results and, for cotangents that are a fixed wave over each, the gradients of all arguments that have one."""
    learned = differentiable(x)
    results = lambda learned: trial.run({**x, **learned}, implementation)
    if not trial.learns:
        return {"value": results(learned)}
    values, pullback = jax.vjp(results, learned)
    return {"value": values, "gradient": pullback(jax.tree.map(wave, values))[0]}


def _compared(trial: Trial, implementation: str, shape: Shape, dtype: str, exact: Any, plain: Any) -> dict[str, Any] | None:
    """The fields of a finding; None for an implementation of another backend."""
    x = trial.draw(shape, dtype)
    precision = "highest" if dtype == "float32" else "default"
    try:
        with jax.default_matmul_precision(precision):
            run: Callable[[Arrays], Any] = jax.jit(lambda x: with_gradients(trial, implementation, x)).lower(x).compile()
        got, again = (jax.tree.map(np.asarray, run(x)) for _ in range(2))
    except NotImplementedError as error:
        reason = str(error).partition("does not support this call: ")[2] or str(error)
        return None if "the backend is" in reason or "the target is" in reason else {"status": "declined", "detail": reason}
    except Exception as error:
        return {"status": "failed", "detail": first_line(error)}
    worst, ratio, largest, limit = "", -1.0, 0.0, 0.0
    for (path, a), (_, want), (_, own) in zip(*map(jax.tree.leaves_with_path, (got, exact, plain)), strict=True):
        name = path[0].key + " " + str(path[-1].key)
        if not np.isfinite(np.asarray(a, np.float64)).all():
            return {"status": "failed", "detail": f"{name} is not finite"}
        kind = dtype if a.dtype != np.float64 else "float64"
        allowed, found = bound(kind, rms_error(own, want)), rms_error(a, want)
        if found / allowed > ratio:
            worst, ratio, largest, limit = name, found / allowed, found, allowed
    if implementation in trial.unordered:
        got, again = got["value"], again["value"]
    if not all(a.tobytes() == b.tobytes() for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(again))):
        return {"status": "failed", "detail": "two calls with the same arguments gave different bits"}
    detail = f"error {largest:.1e} of {limit:.1e} allowed, in the {worst}"
    return {"status": "passed" if ratio <= 1 else "failed", "detail": detail, "numbers": {"error": largest, "allowed": limit}}


def known(op_names: tuple[str, ...] | None, of: Mapping[str, Trial] = TRIALS) -> dict[str, Trial]:
    """The trials of these ops, or all, `of` some. Raises ValueError for an op that has none."""
    ops = sorted({trial.op for trial in TRIALS.values()})
    for name in op_names or ():
        if name not in ops:
            raise ValueError(f"ops={name!r} is no op that is tried; use some of {', '.join(ops)}")
    return {name: trial for name, trial in of.items() if op_names is None or trial.op in op_names}
