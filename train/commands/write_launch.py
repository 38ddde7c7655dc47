"""`launch.py write-launch gke|slurm|tpu-vm PRESET [train overrides]`."""

from __future__ import annotations

import os
from collections.abc import Sequence

from plait.train.terminal.console import console


def run(args: Sequence[str]) -> None:
    """Writes the file that starts a run on a pod."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # looks at no accelerator that is here
    from plait.train.pods import launch_files

    path, job = launch_files.write_launch(args)
    console.print(f"{path}: {job.machines.describe()}; its first lines say how to submit, watch, resume and delete", markup=False)
