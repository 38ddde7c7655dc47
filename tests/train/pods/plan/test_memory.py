"""A plan's memory against what the process of a real run takes."""

import os
import subprocess
import sys

import pytest

from plait.configs.command_line.cli import parse_experiment
from plait.train.pods.plan.memory import saved_activations
from plait.train.state import Blueprint

RUN = """
import threading, time
from pathlib import Path
import jax
import numpy as np
from plait.configs.command_line.cli import parse_experiment
from plait.tests.train.common import random_batch
from plait.train.program import Program
from plait.train.mesh import batch_sharding, make_mesh
from plait.configs.vocabulary import with_vocabulary
from plait.train.pods.plan.planning import make_plan
from plait.train.pods.plan.topology import parse_target

options = "--mesh.fsdp 8 --data.batch-size 64 --model.pattern softmax".split()
config = parse_experiment("lm_quick", options)
planned = make_plan(config, parse_target("cpu:8")).memory.temporaries
config = with_vocabulary(config)
mesh = make_mesh(config.mesh)
step = Program.of(config, mesh)
state = jax.tree.map(lambda a, s: jax.device_put(np.zeros(a.shape, a.dtype), s), step.like, step.shardings)
rows = batch_sharding(mesh, config.data.batch_size, config.data.seq_len, 1)
batch = jax.device_put(random_batch(config.data.batch_size, config.data.seq_len), rows)
run = step.lower().compile()
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
before = peak = resident()
done = False

def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
for _ in range(3):
    state, _ = jax.block_until_ready(run(state, batch))
done = True
thread.join()
print("MEASURED", planned, (peak - before) / 8)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the resident memory from /proc")  # noqa: PTH110
def test_a_run_takes_the_planned_memory():
    """The most that the process grows by during steps on eight devices is eight times the planned temporaries."""
    done = subprocess.run(
        [sys.executable, "-c", RUN], capture_output=True, text=True, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    planned, measured = map(float, done.stdout.split("MEASURED ")[1].split())
    assert planned > 50e6
    assert measured == pytest.approx(planned, rel=0.1)


def test_activations_of_a_model_that_is_not_causal_are_counted():
    """For whose task no other stands in."""
    config = parse_experiment(
        "lm_tiny", ["--data.task", "mlm", "--model.no-causal", "--model.pattern", "softmax", "--model.vocab-size", "512"]
    )
    found = saved_activations(config, Blueprint(config), None)
    assert found.whole > 0 and found.divided > 0
