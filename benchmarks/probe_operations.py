"""What probes add to a training step, counted in its trace and not measured: operations of products, and numbers that are written.

    python benchmarks/probe_operations.py [--preset hybrid_340m] [--rows 8]

Both are of the whole step, forward and backward, for a batch of `rows` rows on one device in plain JAX; loops count as often as they turn
(those whose turns are not known, once). Numbers written are those of every operation before any is fused: an upper bound of traffic.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import Any

import jax
import numpy as np

from plait.configs.mesh import MeshConfig
from plait.configs.presets import preset
from plait.data.batch import Batch
from plait.train.mesh import make_mesh
from plait.train.optimizers import make_optimizer
from plait.train.probes.base import Probes
from plait.train.state import Blueprint, create_state
from plait.train.step import make_step


def counted(jaxpr: Any) -> np.ndarray:
    """Operations of products, and numbers written."""
    total = np.zeros(2)
    for eqn in jaxpr.eqns:
        inner = [part for value in eqn.params.values() for part in (value if isinstance(value, tuple | list) else (value,))]
        inner = [getattr(part, "jaxpr", part) for part in inner if hasattr(getattr(part, "jaxpr", part), "eqns")]
        if inner:
            parts = [counted(part) for part in inner]
            total += (
                max(parts, key=lambda part: part[0]) if eqn.primitive.name == "cond" else sum(parts) * eqn.params.get("length", 1)
            )
            continue
        written = sum(math.prod(out.aval.shape) for out in eqn.outvars if hasattr(out.aval, "shape"))
        operations = 0
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            operations = 2 * written * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        total += operations, written
    return total


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="hybrid_340m")
    parser.add_argument("--rows", type=int, default=8)
    args = parser.parse_args()
    config = preset(args.preset)
    config = dataclasses.replace(config, model=config.model.with_vocab(config.model.vocab_size or 32_000))
    blueprint = Blueprint(config)
    tx, mesh = make_optimizer(config.optimizer, config.steps, blueprint.parameters()), make_mesh(MeshConfig())
    state = jax.eval_shape(lambda: create_state(blueprint, tx))
    shape = (args.rows, config.data.seq_len)
    batch = Batch(*(jax.ShapeDtypeStruct(shape, dtype) for dtype in (np.int32, np.int32, np.int32, np.int32, np.float32)))
    print(f"{args.preset}, {args.rows} rows of {config.data.seq_len} tokens, of which probes look at {config.probe.sequences}\n")
    print("| step | operations of products | over plain | numbers written | over plain |\n|---|---|---|---|---|")
    plain = None
    for words, only in (("plain", None), ("default probes", "default"), ("all probes", "all")):
        observer = None if only is None else Probes(dataclasses.replace(config.probe, only=only))
        found = counted(jax.make_jaxpr(make_step(blueprint, tx, mesh, observer))(state, batch).jaxpr)
        plain = found if plain is None else plain
        ratio = found / plain
        print(f"| {words} | {found[0] / 1e12:.3f} T | {ratio[0]:.4f} | {found[1] / 1e9:.2f} G | {ratio[1]:.4f} |", flush=True)


if __name__ == "__main__":
    main()
