"""A small run folder, written as training writes one."""

import numpy as np

from plait.train.run_folder.probe_files import write_probes
from plait.train.run_folder.writer import MetricsWriter


def write_run(run, steps, **options):
    with MetricsWriter(run, tensorboard=False, **options) as writer:
        for step in steps:
            writer.write(step, {"loss/train": 5.0 - step / 10}, tokens=step * 64, seconds=step / 2)
            writer.write_events(
                [{"step": step, "kind": "k", "layer": None, "head": None, "value": 1.0, "threshold": 0.5, "message": "m"}]
            )
            write_probes(run, step, {"entropy": np.full((2, 2), step)})
