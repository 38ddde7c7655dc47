"""`launch.py convert inspect|import|export`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from plait.configs.domains import Counted
from plait.configs.words import parse
from plait.train.console import console, write_text
from plait.train.convert.options import ImportOptions

USAGE = """usage: launch.py convert inspect DIR|FILE.gguf
       launch.py convert import DIR|FILE.gguf RUN [--param-dtype bfloat16] [--seq-len 4096] [--tokenizer FILE] [--mesh.fsdp 8]
       launch.py convert export RUN DIR [--model-type llama] [--dtype bfloat16] [--step N]"""


@dataclasses.dataclass(frozen=True)
class InspectArgs:
    """Says what a published model is, and how its tensors go with the model here; reads no weights."""

    folder: Annotated[Path, tyro.conf.Positional]
    """With config.json and safetensors files; or a GGUF file."""


@dataclasses.dataclass(frozen=True)
class ImportArgs(ImportOptions):
    """Makes a run folder of a published model."""

    folder: Annotated[Path, tyro.conf.Positional]
    """With config.json, safetensors files and tokenizer.json; or a GGUF file."""
    run: Annotated[Path, tyro.conf.Positional]
    """Run folder to be made."""


@dataclasses.dataclass(frozen=True)
class ExportArgs:
    """Writes the model of a run as a published one."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    folder: Annotated[Path, tyro.conf.Positional]
    """To be made."""
    model_type: str | None = None
    """The family; by default one that has such models, or else the project's own."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the tensors; by default that of an imported model's files, or else that of the run's parameters."""
    step: Counted | None = None
    """Checkpoint; the newest by default."""


ARGS: dict[str, Any] = {"inspect": InspectArgs, "import": ImportArgs, "export": ExportArgs}
"""The options of each conversion."""


def run(args: Sequence[str]) -> int:
    """One of the conversions."""
    actions: dict[str, Callable[[Any], None]] = {"inspect": _inspect, "import": _import, "export": _export}
    if not args or args[0] in ("-h", "--help"):
        write_text(USAGE)
        return 0
    if args[0] not in actions:
        raise ValueError(f"convert {args[0]!r} is none of {', '.join(actions)}\n\n{USAGE}")
    actions[args[0]](parse(ARGS[args[0]], args[1:], prog=f"launch.py convert {args[0]}"))
    return 0


def _inspect(options: InspectArgs) -> None:
    from plait.train.convert.inspecting import describe

    write_text(describe(options.folder))


def _import(options: ImportArgs) -> None:
    from plait.train.convert.importing import import_model

    model = import_model(options.folder, options.run, options).model
    console.print(f"{options.run}: {model.num_layers} layers of {model.pattern}; try launch.py eval {options.run}", markup=False)


def _export(options: ExportArgs) -> None:
    from plait.train.convert.exporting import export_model

    family = export_model(options.run, options.folder, model_type=options.model_type, dtype=options.dtype, step=options.step)
    console.print(f"{options.folder}: {family.architecture}", markup=False)
