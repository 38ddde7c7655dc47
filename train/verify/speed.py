"""How long each op takes: its implementations and peers beside one another, and beside the least that the device allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from plait.kernels import registered
from plait.train.verify.agreement import first_line
from plait.train.verify.findings import Finding
from plait.train.verify.peers import peers
from plait.train.verify.rooflines import Peak, Shape, least
from plait.train.verify.timing import timed
from plait.train.verify.trials import Arrays, Trial, differentiable

PART = "speed of the ops"


def speed(trials: Mapping[str, Trial], shape: Shape, dtype: str, peak: Peak, repeats: int) -> Iterator[Finding]:
    """A finding for each op, pass and implementation."""
    for name, trial in trials.items():
        x = trial.draw(shape, dtype)
        functions = implementations(trial) | peers(name)
        for backward in (False, True):
            calls = {by: prepared(function, x, backward) for by, function in functions.items()}
            bound = peak.seconds(*least(name, shape, np.dtype(jnp.dtype(dtype)).itemsize, backward=backward))
            what = f"{name}, {'forward and backward' if backward else 'forward'}, {shape}, {dtype}"
            first = None
            for by, taken in timed(calls, repeats).items():
                if isinstance(taken, Exception):
                    if not isinstance(taken, NotImplementedError):
                        yield Finding(part=PART, what=what, op=trial.op, by=by, status="failed", detail=first_line(taken))
                    continue
                first = first or taken.middle
                share = bound / taken.middle
                yield Finding(
                    part=PART,
                    what=what,
                    op=trial.op,
                    by=by,
                    detail=f"{1e3 * taken.middle:.3g} ms ({1e3 * taken.low:.3g} to {1e3 * taken.high:.3g}), "
                    f"{100 * share:.0f}% of the roofline, {first / taken.middle:.2f}x",
                    numbers={**{f"seconds_{k}": v for k, v in taken._asdict().items()}, "roofline_share": share},
                )


def implementations(trial: Trial) -> dict[str, Callable[[Arrays], jax.Array]]:
    """The main result of a trial by implementation, the one that `auto` tries first first; without the reference, which is only slow."""
    names = [name for name in registered()[trial.op] if name != "reference"]
    return {name: partial(_main, trial, name) for name in names}


def _main(trial: Trial, implementation: str, x: Arrays) -> jax.Array:
    return next(iter(trial.run(x, implementation).values()))


def prepared(function: Callable[[Arrays], jax.Array], x: Arrays, backward: bool) -> Callable[[], Any]:
    """The compiled call, which waits for its result; with `backward` also the gradients of every argument that has one."""

    def both(x: Arrays) -> Any:
        learned = differentiable(x)
        out, pullback = jax.vjp(lambda learned: function({**x, **learned}), learned)
        return out, pullback(jnp.ones_like(out))

    compiled = jax.jit(both if backward else function)
    return lambda: jax.block_until_ready(compiled(x))
