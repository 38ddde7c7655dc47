"""Shards of a prepared corpus pushed to a store: those that it has stay, and the description comes last."""

from __future__ import annotations

import logging
from pathlib import Path

from plait.data.remote.store import Store
from plait.data.sources.source import PREPARED
from plait.train.prepare.job import CLAIMS, JOB

log = logging.getLogger("plait")


def push_shards(store: Store, folder: Path) -> None:
    """Makes the store hold what `folder` does, and nothing else of shards.

    A large file of the same size is taken for the same: tokens are named by their shard, which the description, pushed last, has the hash of.

    Raises:
        StoreError: it cannot be written. StoreLost: it does not answer; what is there stays, and the same command goes on.
    """
    there = store.objects()
    names = [
        path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".tmp"
    ]
    names = [name for name in names if name not in (JOB, PREPARED) and not name.startswith((f"{CLAIMS}/", "."))]
    if PREPARED in there and store.read(PREPARED) != (folder / PREPARED).read_bytes():
        store.remove([PREPARED])
        there = {}
    old = {name for name in there if name.startswith("shard-")} - set(names)
    left = [name for name in names if name not in there or there[name].size != (folder / name).stat().st_size]
    log.info("pushing %d of %d files to %s", len(left), len(names), store.address)
    store.each(lambda name: store.upload(name, folder / name), left)
    store.remove(old)
    store.write(PREPARED, (folder / PREPARED).read_bytes())
