"""CPU seconds to trace and compile the fresh state and the step at several depths: `python benchmarks/startup.py [PRESET] [--layers 8 24 96]`.

A stack of repeated periods is made and run by one traced period, so neither should grow with depth.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import jax

from plait.configs.mesh import MeshConfig
from plait.configs.presets import preset
from plait.configs.vocabulary import with_vocabulary
from plait.train.mesh import make_mesh
from plait.train.program import Program


def seconds(name: str, layers: int) -> tuple[float, float]:
    """CPU seconds of the fresh state and of the step, each traced and compiled anew."""
    jax.clear_caches()
    config = preset(name)
    model = dataclasses.replace(config.model, num_layers=layers)
    config = with_vocabulary(dataclasses.replace(config, model=model, mesh=MeshConfig(data=1)), elsewhere=4096)
    program = Program.of(config, make_mesh(config.mesh, jax.devices()[:1]))
    start = time.process_time()
    program.lower_fresh().compile()
    middle = time.process_time()
    program.lower().compile()
    return middle - start, time.process_time() - middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset", nargs="?", default="lm_tiny")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 24, 96])
    options = parser.parse_args()
    print("layers  fresh state  step   (CPU seconds)")
    seconds(options.preset, options.layers[0])  # what is imported and initialised once
    for layers in options.layers:
        fresh, step = seconds(options.preset, layers)
        print(f"{layers:6d}  {fresh:11.2f}  {step:5.2f}")


if __name__ == "__main__":
    main()
