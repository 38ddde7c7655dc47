"""The smallest sweep: a layer of softmax on bytes."""

from pathlib import Path

from plait.train.sweep.asked import asked_for
from plait.train.sweep.record import Sweep, begun

SMALL = [
    "--model.pattern=softmax",
    "--model.num-layers=1",
    "--model.d-model=16",
    "--model.channel-mixer.hidden-dim=16",
    "--mesh.data=1",
    "--optimizer.warmup-steps=1",
    "--data.seq-len=16",
    "--data.batch-size=2",
    "--data.val-fraction=0.1",
    "--probe-every=None",
    "--eval-every=None",
    "--eval-batches=1",
    "--log-every=1",
]


def small(folder: Path, corpus: Path, *args: str) -> Sweep:
    """A sweep that has begun in `folder`, by words of its command line."""
    words = [*SMALL, "--data.source", str(corpus), *args]
    return begun(folder, asked_for("lm_tiny", words, folder).sweep)
