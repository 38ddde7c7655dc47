"""The paths that a run reads, and what this machine can tell of those that the hosts may not find."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from plait.configs.experiment import ExperimentConfig
from plait.data.remote.address import Address
from plait.data.sources.source import NAMED
from plait.train.pods.launch_files.options import GkeOptions, LaunchOptions, SlurmOptions, TpuVmOptions

Paths = tuple[tuple[str, str], ...]
"""Options and the paths that they name."""


def paths_of(configs: Iterable[ExperimentConfig]) -> Paths:
    """What the runs read that is no address and comes with no package; each once."""
    found = (pair for config in configs for pair in _read(config))
    return tuple(dict.fromkeys((field, path) for field, path in found if Address.of(path) is None))


def _read(config: ExperimentConfig) -> Iterator[tuple[str, str]]:
    texts = {name: part.source for name, part in (config.data.parts or {"": config.data}).items() if part.task.reads_text}
    for name, source in texts.items():
        if source not in NAMED:
            own = name and config.data.sources[name].source is not None
            yield f"data.sources.{name}.source" if own else "data.source", source
    if texts and config.data.tokenizer not in ("byte", "bpe"):
        yield "data.tokenizer", config.data.tokenizer
    if config.init_from is not None:
        yield "init_from", config.init_from


def doubts(options: LaunchOptions, paths: Paths) -> list[str]:
    """What is odd about paths, a sentence each: the hosts alone can tell whether they are there."""
    return [f"{field}={path!r} {found}" for field, path in paths if (found := _doubt(options, PurePosixPath(path))) is not None]


def _doubt(options: LaunchOptions, path: PurePosixPath) -> str | None:
    if not path.is_absolute():
        return (
            "is a relative path, which each host looks for in the folder that it starts in; give an absolute one that all hosts see, "
            "or an address, as gs://BUCKET/FOLDER"
        )
    if isinstance(options, GkeOptions | TpuVmOptions):
        if not path.is_relative_to(options.mount):
            where = "the image" if isinstance(options, GkeOptions) else "the disk of each host"
            return f"is outside of mount={options.mount!r}, which all hosts share; put it there, give an address, or see that it is in {where}"
    elif isinstance(options, SlurmOptions):
        shown = (str(PurePosixPath(options.run_folder).parent), *options.mount)
        if options.image is not None and not any(path.is_relative_to(folder) for folder in shown):
            return "is in no folder that the container sees; give one that holds it with --mount"
        if not Path(path).exists() and not any(Path(path.anchor).glob(str(path.relative_to(path.anchor)))):
            return "is not on this machine; see that every host finds it there, or give another path"
    return None
