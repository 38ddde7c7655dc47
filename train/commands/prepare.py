"""`launch.py prepare PRESET|CONFIG --out FOLDER [overrides]`. Needs no accelerator."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

from plait.configs.command_line.options import split_options
from plait.configs.command_line.words import parse
from plait.configs.domains import Whole
from plait.train.pods.hosts.supervise import DONE, STOPPED
from plait.train.terminal.console import console


@dataclasses.dataclass(frozen=True)
class PrepareArgs:
    """Tokenises what a preset trains on into shards, which its runs then only read.

    By many processes and, with the same command on each, on many machines that share the folder. The same command goes on after an end.
    Every data option of `train PRESET` may follow.
    """

    ADDRESSES: ClassVar = ("out",)

    out: Path
    """Folder of the shards: a new one, or one to go on with; or an address, to which one machine pushes them when all are made."""
    workers: Annotated[int, Whole(1, 4096)] | None = None
    """Processes on this machine; None for one a core."""
    shard_mib: Annotated[int, Whole(1, 1 << 20)] = 128
    """MiB of files that a shard is made of, about."""


def run(args: Sequence[str]) -> int:
    """Prepares the data of a preset, or of the config or run folder at a path."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if not args or (args[0].startswith("-") and args[0] not in ("-h", "--help")):
        raise ValueError("prepare needs a preset or a config.json first, as in 'launch.py prepare lm_quick --out tokens/sotu'")
    mine, rest = split_options(PrepareArgs, args)
    options = parse(PrepareArgs, mine, prog="launch.py prepare PRESET [train overrides]")  # --help ends here
    from plait.configs import codec
    from plait.configs.command_line.cli import parse_experiment
    from plait.configs.experiment import ExperimentConfig
    from plait.configs.presets import preset
    from plait.data.remote.address import Address, written
    from plait.train.prepare.pool import prepare
    from plait.train.remote.session import new_store
    from plait.train.remote.shards import push_shards
    from plait.train.run_folder.contents import CONFIG

    what, path = rest[0], Path(rest[0])
    if path.exists():
        base = codec.load(ExperimentConfig, path / CONFIG if path.is_dir() else path)
        config = parse_experiment(base, rest[1:])
    else:
        config, base = parse_experiment(what, rest[1:], prog="launch.py prepare"), preset(what)
    if not config.data.task.reads_text:
        raise ValueError(f"data.task={config.data.task.name} reads no text, so that there is nothing to prepare; train at once")
    if config.data.sources:
        named = ", ".join(config.data.sources)
        raise ValueError(
            f"data.sources={named} are several, and a folder is of one; prepare each with --data.source and the same --data.tokenizer, "
            "which may be the first folder made"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    address = Address.of(options.out)
    store = None if address is None else new_store(address)
    out = written(options.out)
    found = prepare(config.data, out, workers=options.workers or cores, shard_mib=options.shard_mib)
    if found is None:
        console.print("stopped; the same command goes on")
        return STOPPED
    if store is not None:
        push_shards(store, out)
    place = str(address or options.out)
    words = ["--data.source", place, "--data.tokenizer", "byte" if config.data.tokenizer == "byte" else place]
    if base.data.vocab_size is not None:  # of a vocabulary to learn, and the folder has one
        words += ["--data.vocab-size", "None"]
    console.print(
        f"{place}: {found.num_tokens:,} tokens of {found.num_documents:,} documents in {len(found.shards)} shards; train on it with\n"
        f"  launch.py train {shlex.join(['PRESET' if path.exists() else what, *words])}"
    )
    return DONE
